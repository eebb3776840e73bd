"""A home that two users of the machine share: root and an app's user, or two users of a group.

Only root may become another user. Each user acts in a process of its own, on real files.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")

SCRIPT = """
import encodings.ascii, filelock, logging, os, stat, sys
from contextlib import closing
from pathlib import Path
import numpy, pickle, safetensors.numpy, shlex, shutil, traceback, pwd, grp, phonenumbers, glob
import agentpref, agentpref.record.log, agentpref.record.writer, agentpref.record.seals
from agentpref import Log, Registry
from agentpref.home import Home, make_private_folder, own_folder, replacing
from agentpref.record.database import connect, exclusive
from agentpref.record.deletion.forget import forget
from agentpref.record.spill import Spill, drain
from agentpref.record.transfer.merge import merge
from agentpref.serve import registry, pruning, pins, quarantine
from agentpref.serve.pins import Pins
from agentpref.types import Feedback
from agentpref_cli.machine import owners

home, adapter = Home(Path(sys.argv[1])), Path(sys.argv[2])
ASK = [{"role": "user", "content": "Hello!"}]
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("agentpref").addHandler(handler)

def logs(name):
    with Log(home.path) as log:
        run = log.record(ASK, f"Hi from {name}!", user_id=name)
        log.thumbs(run, up=True, user_id=name)
        assert log.flush(10)
        Spill(home).append([Feedback("waits-" + name, run, 1.0, "k", 1.0)])
        assert log.dropped == {}

def updates(name):
    with exclusive(home), closing(connect(home)):
        drain(home)
        make_private_folder(home.training)
        with replacing(home.training / "state.safetensors") as draft:
            draft.unlink()
            draft.write_bytes(name.encode())  # as a library that makes the file anew
        candidate = home.path / (".candidate-" + name)
        candidate.mkdir(0o700)
        own_folder(candidate)  # as if the update was killed
    registry = Registry(home)
    for _ in range(2):  # the first one is for pruning
        made = registry.publish(adapter, parent=None, model={"name": "tiny"}, training={})
    registry.promote(made.revision_id)
    with closing(Pins(home.pins, "http://127.0.0.1:1")) as pins:
        pins.take(made.revision_id)

def tidies(name):
    for folder in home.path.glob(".candidate-*"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert Registry(home).prune(keep=1, ask=lambda place, name: False).removed
    forget(home, "nobody we know")

def main(one, other):
    def act(user, *acts):
        child = os.fork()
        if child == 0:
            uid, gid, groups = user
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            os.umask(0o077)
            try:
                for each in acts:
                    each(str(uid))
                assert warnings == [], warnings
                rows = [row for row in owners(home) if not row.passed]
                assert rows == [], rows
            except BaseException:
                import traceback
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, f"as {user}"

    act(one, logs, updates, logs)
    act(other, logs, updates, tidies)
    act(one, logs, updates, tidies)
    act(other, logs, updates)

    # Both at once: what the first one's open connection has made serves the second one, too.
    ready, told = os.pipe()
    until, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)  # so that it ends with this script, also if that fails
        os.setgroups(one[2]); os.setgid(one[1]); os.setuid(one[0])
        with Log(home.path) as log:
            log.record(ASK, "I stay")
            log.flush(10)
            os.write(told, b"!")
            os.read(until, 1)
        os._exit(0)
    os.read(ready, 1)
    assert (home.path / "agentpref.db-wal").exists()
    act(other, logs)
    act((0, 0, []), logs)
    os.write(end, b"!")
    assert os.waitpid(child, 0)[1] == 0

main(*eval(sys.argv[3]))
"""

APP, CRON, GROUP = 65534, 65533, 64321


def shared_home(around: Path, uid: int, gid: int, mode: int) -> Path:
    folder = around / "home"
    folder.mkdir()
    os.chown(folder, uid, gid)
    folder.chmod(mode)
    return folder


def work(folder: Path, *users: tuple[int, int, list[int]]) -> None:
    from agentpref.testing import write_adapter

    adapter = write_adapter(folder.parent / "adapter")
    for path in (adapter, *adapter.iterdir()):
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(adapter), repr(users)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def everything(folder: Path) -> dict[str, os.stat_result]:
    return {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}


ROOT = (0, 0, [0])
SERVICE = (APP, APP, [])


@pytest.mark.guarantee("privacy")
@pytest.mark.parametrize("users", [(ROOT, SERVICE), (SERVICE, ROOT)], ids=["root first", "app"])
def test_what_root_makes_in_a_home_belongs_to_the_homes_owner(reachable: Path, users) -> None:
    folder = shared_home(reachable, APP, APP, 0o711)
    work(folder, *users)
    found = everything(folder)
    assert {"agentpref.db", "user.keys", "update.lock", "spill.lock", "training"} <= found.keys()
    assert {(one.st_uid, one.st_gid) for one in found.values()} == {(APP, APP)}
    private = {name: one for name, one in found.items() if not name.startswith("adapters")}
    modes = {stat.S_IMODE(one.st_mode) for one in private.values()}
    assert modes <= {0o600, 0o700}


@pytest.mark.parametrize("mode", [0o770, 0o2770], ids=oct)
def test_two_users_of_a_group_share_a_home_whose_folder_the_group_may_write(
    reachable: Path, mode: int
) -> None:
    folder = shared_home(reachable, 0, GROUP, mode)
    work(folder, (APP, APP, [GROUP]), (CRON, CRON, [GROUP]))
    found = everything(folder)
    assert {one.st_gid for one in found.values()} == {GROUP}
    for name, one in found.items():
        in_adapters = name.startswith("adapters/rev-") and stat.S_ISREG(one.st_mode)
        assert one.st_mode & stat.S_IWGRP or in_adapters, name
        assert name.startswith("adapters") or not one.st_mode & 0o007, name


def test_what_root_exports_from_a_home_stays_roots(reachable: Path) -> None:
    from agentpref.home import replacing

    folder = shared_home(reachable, APP, APP, 0o755)
    with replacing(folder / "pairs.jsonl") as draft:
        draft.write_bytes(b"text")
    found = (folder / "pairs.jsonl").lstat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
