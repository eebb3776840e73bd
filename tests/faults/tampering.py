"""A home with every kind of file in it, ways to damage one, and the doors that a user has.

:func:`made` leaves the home as a killed process does: with a log of changes, a spill, locks and
pins. :func:`told` tries doors on damaged copies of it, in a child process, so that a hang and a bus
error are seen too, and returns what each door said.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sqlite3
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import torch
import typer
from typer.testing import CliRunner

import agentpref
from agentpref.config import UpdateConfig
from agentpref.errors import AgentprefError, UnknownRun
from agentpref.home import Home
from agentpref.learn import resume
from agentpref.learn.checkpoint import Checkpoint, TrainingState, path_of
from agentpref.learn.data import UpdateData
from agentpref.learn.objective import StepResult
from agentpref.models.base_files import read_base
from agentpref.outcome import Outcome
from agentpref.record.database import connect, exclusive
from agentpref.record.deletion.removal import merging
from agentpref.record.messages import new_id
from agentpref.record.spill import REST_SECONDS
from agentpref.record.store import Store
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref.types import UpdateReport
from agentpref_cli.main import app

ASKED = [{"role": "user", "content": "Where do I send it? I am ana@example.org."}]
ENGINE = "http://127.0.0.1:8000"
STRANGER = 61_061
"""A user who owns the home, all but one file of it: uid and gid."""

SECONDS = 60


@dataclass(frozen=True)
class Made:
    """A home, its revisions by role, a judged run, and the feedback that was acknowledged."""

    path: Path
    revisions: dict[str, str]
    run: str
    acknowledged: list[str]

    def find(self, name: str) -> Path:
        """The path of a file inside the home; ``live/…`` and so on stand for revisions."""
        role, _, rest = name.partition("/")
        if role in self.revisions:
            return Path("adapters", self.revisions[role], rest)
        found = sorted(self.path.glob(name))
        assert found, f"{name} is missing in {self.path}"
        return found[0].relative_to(self.path)


# A home


def made(folder: Path, seed: int) -> Made:
    """Make a home in a child process that then kills itself."""
    notes = folder.with_suffix(".json")
    child = os.fork()
    if not child:
        try:
            logging.disable()
            notes.write_bytes(orjson.dumps(_live(folder, seed)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return Made(folder, **orjson.loads(notes.read_bytes()))


def _live(folder: Path, seed: int) -> dict[str, Any]:
    home = Home.create(folder)
    with agentpref.Log(folder, redact=agentpref.redact) as log:
        runs = [log.record(ASKED, f"To office {n}.", user_id=f"u{n % 2}") for n in range(4)]
        said = [log.thumbs(run, up=n < 2, user_id=f"u{n % 2}") for n, run in enumerate(runs)]
    with agentpref.Log(folder, namespace="idle", redact=agentpref.redact) as log:
        log.record(ASKED, "Nobody judged it.")
    base = read_base("tiny")
    registry, revisions = Registry(home), {}
    for number, role in enumerate(("previous", "live", "canary")):
        adapter = write_adapter(folder.with_suffix(f".{role}"), seed=number, rank=8 * seed)
        revisions[role] = _updated(registry, adapter, base.identity)
    registry.promote(revisions["previous"])
    registry.promote(revisions["live"])
    registry.canary(revisions["canary"], 0.5)
    with Router(registry, FakeBackend(place=ENGINE)):
        pass  # the engine keeps what it has loaded, and the home its pins
    _interrupt_training(home, base.identity, seed)
    with exclusive(home), merging(home):
        pass
    # All of that is in the database. What follows is in its log of changes, or in the spill.
    log = agentpref.Log(folder, redact=agentpref.redact)
    with closing(sqlite3.connect(home.database, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        said.append(log.thumbs(runs[0], up=True, user_id="u0"))
        log.thumbs("no such run", up=True, user_id="u1")
    time.sleep(REST_SECONDS + 0.2)
    log.record(ASKED, "To office 0.", user_id="u0")
    assert log.flush(30)
    assert home.refused.exists()
    lock = sqlite3.connect(home.database, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    said.append(log.thumbs(runs[1], up=False, user_id="u1"))
    assert home.spill.exists()
    return {"revisions": revisions, "run": runs[0], "acknowledged": said}


def _updated(registry: Registry, adapter: Path, identity: Any) -> str:
    """Publish as an update does, with its row in the ledger; return the revision's id."""
    learner = SimpleNamespace(
        base=SimpleNamespace(identity=identity, numbers="n"),
        instructions=lambda policy: "",
        save=lambda folder: shutil.copytree(adapter, folder, dirs_exist_ok=True),
    )
    counts = {"trained": 1, "trained_thumbs": 0}
    parent = registry.state().live
    report = UpdateReport(new_id(), "default", "tiny", 1.0, "insufficient", parent, counts=counts)
    with closing(connect(registry.home)) as connection:
        outcome = Outcome(report, defaultdict(list))
        done = outcome.settle(registry, connection, learner, registry.state())
    assert done.revision is not None
    return done.revision


def _interrupt_training(home: Home, identity: Any, seed: int) -> None:
    """Leave the state of an update of the namespace "idle", in which nothing was judged."""
    base = SimpleNamespace(digest=identity["digest"], template_digest=identity["template_digest"])
    needed = resume.conditions("idle", None, base, UpdateConfig(seed=seed))
    about = resume.StartedUpdate(new_id(), 1.0, UpdateData()).freeze(needed)
    tensors = {"lora_A": torch.full((16, 64), float(seed)), "lora_B": torch.ones(64, 16)}
    history = [StepResult(0.7, 0.0, None)] * 3
    state = TrainingState("f" * 32, 3, 9, 1.0, {}, history, tensors)
    Checkpoint(path_of(home.training, "idle"), about).save(state)


# Damage


def edited(path: Path, swap: Path) -> None:
    """Change bytes in place: of a database an answer, of the spill an id, else every 16th part."""
    data = bytearray(path.read_bytes())
    if path.name == "agentpref.db":
        assert b"To office 1." in data
        data = data.replace(b"To office 1.", b"To office 9.")
    elif path.name == "spill.jsonl":  # elsewhere, a change may look like a line that a crash cut
        data, changed = re.subn(rb'("feedback_id":")..', rb"\1zz", data)
        assert changed
    else:
        for part in range(16):
            if data:
                data[len(data) * part // 16 + len(data) // 32] ^= 0x55
    with open(path, "r+b") as file:
        file.write(data)


def truncated(path: Path, swap: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path, swap: Path) -> None:
    os.truncate(path, 0)


def swapped(path: Path, swap: Path) -> None:
    """Put the same file of another home in its place."""
    missing(path, swap)
    if swap.is_dir():
        shutil.copytree(swap, path)
    else:
        shutil.copyfile(swap, path)
        path.chmod(swap.stat().st_mode)


def missing(path: Path, swap: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def foreign(path: Path, swap: Path) -> None:
    """Give a file to root, who alone may use it."""
    os.chown(path, 0, 0)
    path.chmod(0o700 if path.is_dir() else 0o600)


DAMAGE = {one.__name__: one for one in (edited, truncated, emptied, swapped, missing, foreign)}


# Doors


class Trouble(Exception):
    """What no user should meet."""


Door = Callable[[Path, Made], str]


def command(*words: str) -> Door:
    """A command of the command line: its exit code, and what it wrote."""

    def door(home: Path, made: Made) -> str:
        result = CliRunner().invoke(app, [*words, "--home", str(home)], prog_name="agentpref")
        if not isinstance(result.exception, (SystemExit, typer.Exit, type(None))):
            raise Trouble(" ".join(words)) from result.exception
        return f"[{result.exit_code}] {result.output}"

    return door


def log(home: Path, made: Made) -> str:
    """Judge a run from before, record and judge another, and look whether both are there."""
    said, words = [], ""
    with agentpref.Log(home, redact=agentpref.redact) as opened:
        try:
            said.append(opened.thumbs(made.run, up=False, user_id="u0"))
        except UnknownRun as error:
            words = str(error)
        run = opened.record(ASKED, "To office 9.", user_id="u0")
        said.append(opened.thumbs(run, up=True, user_id="u1"))
        assert opened.flush(10)
        words += f" dropped {opened.dropped}, altered {opened.altered}"
    lost = {*said} - held(home)
    if lost:
        raise Trouble(f"acknowledged and lost: {lost}")
    return words


def held(home: Path) -> set[str]:
    """The ids of all feedback in the database and in the spill."""
    place = Home.open(home)
    with closing(connect(place)) as connection:
        found = {said.feedback_id for said in Store(connection).feedback("default")}
    for line in place.spill.read_bytes().splitlines() if place.spill.exists() else ():
        found.add(orjson.loads(line.partition(b" ")[2])["feedback"]["feedback_id"])
    return found


def router(home: Path, made: Made) -> str:
    """Ask live, and threads of which the canary answers some."""
    asked = GenerationRequest(messages=({"role": "user", "content": "Hello"},))
    with Router(Registry(home), FakeBackend(place=ENGINE)) as opened:
        threads = (None, *(f"t{n}" for n in range(8)))
        return " ".join(opened.generate(asked, thread_id=one).revision for one in threads)


def backup(home: Path, made: Made) -> str:
    return command("backup", str(home.with_name(f"{home.name}-backup")))(home, made)


DOORS: dict[str, Door] = {
    "verify": command("verify"),
    "doctor": command("doctor"),
    "stats": command("stats"),
    "list": command("adapters", "list"),
    "log": log,
    "router": router,
    "promote": lambda home, made: str(Registry(home).promote(made.revisions["canary"])),
    "rollback": command("adapters", "rollback"),
    "backup": backup,
    "forget": command("forget", "--user-id", "u0", "--yes"),
}
"""The doors that are tried in every case."""

MORE: dict[str, Door] = {
    "update": command("update", "--model", "tiny"),
    "resume": command("update", "--model", "tiny", "--namespace", "idle"),
    "prune": command("adapters", "prune", "--keep", "1", "--yes"),
}
"""The doors that are tried where a case names them: they take longer."""


def told(
    home: Made, other: Made, file: str, damage: str, more: Iterable[str] = ()
) -> dict[str, str]:
    """Damage a file in copies of a home, and return what each door says of its copy."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        with open(writer, "wb") as pipe:
            pipe.write(orjson.dumps(_tried(home, other, file, damage, [*DOORS, *more])))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the process was ended by a signal, or hung"
    said: dict[str, str] = orjson.loads(answer)
    return said


def _tried(home: Made, other: Made, file: str, damage: str, doors: list[str]) -> dict[str, str]:
    signal.alarm(SECONDS)
    copies = {door: home.path.with_name(f"at-{door}") for door in doors}
    for copy in copies.values():
        for old in copy.parent.glob(f"{copy.name}*"):
            shutil.rmtree(old)
        shutil.copytree(home.path, copy)
        if damage == "foreign":
            for path in (copy, *copy.rglob("*")):
                os.chown(path, STRANGER, STRANGER)
        if file:
            DAMAGE[damage](copy / home.find(file), other.path / other.find(file))
    if damage == "foreign":
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
    every = DOORS | MORE
    return {door: tried(every[door], copy, home) for door, copy in copies.items()}


def tried(door: Door, home: Path, made: Made) -> str:
    """What a door says, warnings included, without what differs from try to try."""
    words: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agentpref").addHandler(handler)
    try:
        words.append(door(home, made))
    except AgentprefError as error:
        words.append(f"{type(error).__name__}: {error}")
    except BaseException:
        words.append(f"TROUBLE {traceback.format_exc()}")
    finally:
        logging.getLogger("agentpref").removeHandler(handler)
    text = "\n".join(words).replace(str(home), "HOME")
    varying = r"at 0x\w+|update [0-9a-f-]{36}.*|unfinished-[0-9a-f-]{36}|[\d.]+ [kMGT]B"
    return re.sub(varying, "", text)
