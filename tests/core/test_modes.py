"""Only its people can read a home, whatever the umask, and the group where that is meant."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentpref import Log
from agentpref.errors import NotAHome
from agentpref.home import Home, open_to_others, replacing
from agentpref.prefer.exchange import export_file
from agentpref.record.database import connect, exclusive
from agentpref.record.spill import Spill
from agentpref.record.transfer.backup import backup
from agentpref.types import Comparison

ASK = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def used(folder: Path) -> Home:
    """A home with all kinds of files that logging, updating and merging make."""
    home = Home.create(folder)
    log = Log(home.path)
    log.thumbs(log.record(ASK, "Hi!", user_id="ana"), up=True)
    assert log.flush(10)
    waiting = Comparison("c", 1.0, "x", "y", "a", "human", None, None)
    Spill(home).append([waiting])
    with exclusive(home), replacing(home.refused) as draft:
        draft.write_bytes(b"refused\n")
    return home


@pytest.mark.guarantee("privacy")
def test_nobody_else_can_read_what_a_home_holds(tmp_path: Path, umask: int) -> None:
    home = used(tmp_path / "home")
    with closing(connect(home)):  # while it is open, there are -wal and -shm
        found = {path.name: mode(path) for path in home.path.iterdir() if path.is_file()}
    assert found.keys() >= {
        "agentpref.db", "agentpref.db-wal", "agentpref.db-shm", "user.keys", "spill.jsonl",
        "refused.jsonl", "spill.lock", "update.lock",
    }  # fmt: skip
    assert set(found.values()) == {0o600}
    assert mode(home.path) == 0o711, "an engine of another user passes through to adapters/"
    assert mode(home.adapters) == 0o755
    assert mode(home.reports) == 0o700
    assert open_to_others(home) == []


@pytest.mark.parametrize("shared", [0o2770, 0o770, 0o2750], ids=oct)
def test_a_folder_that_is_shared_with_a_group_stays_shared(
    tmp_path: Path, umask: int, shared: int
) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(shared)
    home = used(folder)
    found = {path.name: mode(path) for path in home.path.iterdir() if path.is_file()}
    assert set(found.values()) == {0o660}
    assert mode(folder) == shared


def test_a_folder_for_everybody_is_not_shared_on_purpose(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with replacing(tmp_path / "file") as draft:
        draft.write_bytes(b"text")
    assert mode(tmp_path / "file") == 0o600


def test_exports_and_backups_are_private(tmp_path: Path, umask: int) -> None:
    home = used(tmp_path / "home")
    export_file([], tmp_path / "pairs.jsonl")
    assert mode(tmp_path / "pairs.jsonl") == 0o600
    backup(home, tmp_path / "copy")
    copied = [path for path in (tmp_path / "copy").iterdir() if path.is_file()]
    assert {mode(path) for path in copied} == {0o600}
    assert open_to_others(Home(tmp_path / "copy")) == []


def test_an_older_home_is_closed_to_others_when_it_is_opened(tmp_path: Path) -> None:
    home = used(tmp_path / "home")
    for path in (home.database, home.spill, home.user_keys):
        path.chmod(0o644)
    assert open_to_others(home) == [home.database, home.spill, home.user_keys]
    connect(home).close()
    Spill(home).append([])
    assert open_to_others(home) == [home.user_keys], "which nobody wrote; doctor names it"


def test_a_mode_that_somebody_chose_stays(tmp_path: Path) -> None:
    home = used(tmp_path / "home")
    home.database.chmod(0o640)
    connect(home).close()
    assert mode(home.database) == 0o640


@pytest.mark.parametrize("inside", ["agentpref.db", "adapters/new", "link/new"])
def test_nothing_is_exported_into_a_home(tmp_path: Path, inside: str) -> None:
    home = used(tmp_path / "home")
    (home.path / "link").symlink_to(home.adapters)
    before = home.database.read_bytes()
    with pytest.raises(ValueError, match=r"inside the home .*; name a file elsewhere"):
        export_file([], home.path / inside)
    with pytest.raises(ValueError, match="inside the home"):
        backup(home, home.path / inside)
    assert home.database.read_bytes() == before


def test_no_home_is_made_inside_another(tmp_path: Path) -> None:
    home = used(tmp_path / "home")
    with pytest.raises(NotAHome, match="is inside the home"):
        Home.create(home.adapters / "new")


def test_an_export_replaces_nothing_but_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match=r"is no plain file.*standard output"):
            export_file([], tmp_path / name)
    with pytest.raises(ValueError, match="is no plain file"):
        export_file([], "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


LOCKED_OUT = """
import os, sys
from pathlib import Path
import filelock  # the interpreter may be out of the other user's reach
from agentpref.errors import NotKept
from agentpref.home import Home
from agentpref.record.database import exclusive
from agentpref.record.spill import Spill
home = Home(Path(sys.argv[1]))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for act in (lambda: exclusive(home).__enter__(), lambda: Spill(home).append([])):
    try:
        act()
    except NotKept as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_lock_of_another_user_is_named(reachable: Path) -> None:
    home = used(reachable / "home")
    home.path.chmod(0o777)
    for name in ("update.lock", "spill.lock"):
        (home.path / name).chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", LOCKED_OUT, str(home.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    for line, lock in ((first, "update.lock"), (second, "spill.lock")):
        assert f"{home.path / lock} cannot be locked (Permission denied)" in line
        assert "chown or chmod" in line
