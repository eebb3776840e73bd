"""A home with every kind of file in it, ways to damage one, and the doors that a user has.

:func:`made` leaves the home as a killed process does: with a log of changes, a spill, locks and
pins. :func:`told` tries every door on a copy of it, in a child process, so that a hang or a bus
error is seen too, and returns what each door said.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
from agentpref.record.database import connect
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
OTHER_USER = 61_061
SECONDS = 60


@dataclass(frozen=True)
class Made:
    """A home, what is in it by name, and the ids of the feedback that was acknowledged."""

    path: Path
    revisions: dict[str, str]
    run: str
    acknowledged: list[str]


def made(folder: Path, seed: int) -> Made:
    """Make a home in a child process that then kills itself."""
    notes = folder.with_suffix(".json")
    child = os.fork()
    if not child:
        try:
            notes.write_bytes(orjson.dumps(_live_a_life(folder, seed)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return Made(folder, **orjson.loads(notes.read_bytes()))


def _live_a_life(folder: Path, seed: int) -> dict[str, Any]:
    home = Home.create(folder)
    log = agentpref.Log(folder, redact=agentpref.redact)
    runs = [log.record(ASKED, f"To office {n}.", user_id=f"u{n % 2}") for n in range(4)]
    said = [log.thumbs(run, up=n < 2, user_id=f"u{n % 2}") for n, run in enumerate(runs)]
    base = read_base("tiny")
    revisions = {}
    registry = Registry(home)
    for number, name in enumerate(("previous", "live", "canary")):
        adapter = write_adapter(folder.with_suffix(f".{name}"), seed=number, rank=8 * seed)
        revisions[name] = _updated(registry, adapter, base.identity)
    registry.promote(revisions["previous"])
    registry.promote(revisions["live"])
    registry.canary(revisions["canary"], 0.5)
    with Router(registry, FakeBackend(place=ENGINE)):
        pass  # the engine keeps what it has loaded, and the home its pins
    _interrupt_training(home, base.identity, seed)
    log.close()  # all of that is in the database, and what follows in its log of changes
    log = agentpref.Log(folder, redact=agentpref.redact)
    with _locked(home):
        said.append(log.thumbs(runs[0], up=True, user_id="u0"))
        log.thumbs("no such run", up=True, user_id="u1")
    import time

    time.sleep(REST_SECONDS + 0.2)
    runs.append(log.record(ASKED, "after the lock", user_id="u0"))
    assert log.flush(30)
    assert home.refused.exists()
    lock = sqlite3.connect(home.database, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    said.append(log.thumbs(runs[1], up=False, user_id="u1"))
    assert home.spill.exists()
    return {"revisions": revisions, "run": runs[0], "acknowledged": said}


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    with closing(sqlite3.connect(home.database, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield


def _updated(registry: Registry, adapter: Path, identity: dict[str, Any]) -> str:
    """Publish as an update does, with its row in the ledger; return the revision's id."""
    learner = SimpleNamespace(
        base=SimpleNamespace(identity=identity, numbers="n"),
        save=lambda folder: shutil.copytree(adapter, folder, dirs_exist_ok=True),
    )
    counts = {"trained": 1, "trained_thumbs": 0}
    parent = registry.state().live
    report = UpdateReport(new_id(), "default", "tiny", 1.0, "insufficient", parent, counts=counts)
    with closing(connect(registry.home)) as connection:
        outcome = Outcome(report, defaultdict(list))
        done = outcome.settle(registry, connection, learner, registry.state())
    return done.revision


def _interrupt_training(home: Home, identity: dict[str, Any], seed: int) -> None:
    """Leave the state of an update of the namespace "idle", in which nothing was judged."""
    base = SimpleNamespace(digest=identity["digest"], template_digest=identity["template_digest"])
    needed = resume.conditions("idle", None, base, UpdateConfig(seed=seed))
    about = resume.StartedUpdate(new_id(), 1.0, UpdateData()).freeze(needed)
    tensors = {"lora_A": torch.full((16, 64), float(seed)), "lora_B": torch.ones(64, 16)}
    history = [StepResult(0.7, 0.0, None)] * 3
    state = TrainingState("f" * 32, 3, 9, 1.0, {}, history, tensors)
    Checkpoint(path_of(home.training, "idle"), about).save(state)


# Doors


class Trouble(Exception):
    """What no user should meet."""


def command(*words: str) -> Callable[[Path, Made], str]:
    def door(home: Path, made: Made) -> str:
        result = CliRunner().invoke(app, [*words, "--home", str(home)], prog_name="agentpref")
        unforeseen = (AgentprefError, SystemExit, typer.Exit, type(None))
        if not isinstance(result.exception, unforeseen):
            raise Trouble(f"{words}") from result.exception
        return f"[{result.exit_code}] {result.output}"

    return door


def log(home: Path, made: Made) -> str:
    """Judge a run from before, record and judge one, and look whether both are there."""
    with agentpref.Log(home, redact=agentpref.redact) as opened:
        try:
            said = [opened.thumbs(made.run, up=False, user_id="u0")]
        except UnknownRun as error:
            said, unknown = [], str(error)
        else:
            unknown = ""
        run = opened.record(ASKED, "To office 9.", user_id="u0")
        said.append(opened.thumbs(run, up=True, user_id="u1"))
        assert opened.flush(10)
        words = f"{unknown} dropped {opened.dropped} altered {opened.altered}"
    missing = set(said) - held(home)
    if missing:
        raise Trouble(f"acknowledged and lost: {missing}")
    return words


def held(home: Path) -> set[str]:
    """The ids of all feedback in the database and in the spill."""
    place = Home.open(home)
    with closing(connect(place)) as connection:
        found = {said.feedback_id for said in Store(connection).feedback("default")}
    spill = place.spill.read_bytes().splitlines() if place.spill.exists() else []
    for line in spill:
        entry = orjson.loads(line.partition(b" ")[2])
        found.add(entry.get("feedback", {}).get("feedback_id"))
    return found


def router(home: Path, made: Made) -> str:
    """Serve a request of live and one of the canary."""
    asked = GenerationRequest(messages=({"role": "user", "content": "Hello"},))
    with Router(Registry(home), FakeBackend(place=ENGINE)) as opened:
        return " ".join(
            str(opened.generate(asked, thread_id=thread).revision) for thread in (None, "t0", "t1")
        )


def promote(home: Path, made: Made) -> str:
    return str(Registry(home).promote(made.revisions["canary"]))


def rollback(home: Path, made: Made) -> str:
    return str(Registry(home).rollback())


def forget(home: Path, made: Made) -> str:
    return command("forget", "--user-id", "u0", "--yes")(home, made)


def backup(home: Path, made: Made) -> str:
    target = home.with_name("copy")
    try:
        return command("backup", str(target))(home, made)
    finally:
        shutil.rmtree(target, ignore_errors=True)


DOORS: dict[str, Callable[[Path, Made], str]] = {
    "verify": command("verify"),
    "doctor": command("doctor"),
    "stats": command("stats"),
    "adapters": command("adapters", "list"),
    "pairs": command("pairs"),
    "update": command("update", "--model", "tiny", "--namespace", "idle"),
    "log": log,
    "router": router,
    "promote": promote,
    "rollback": rollback,
    "backup": backup,
    "forget": forget,
}


def told(home: Made, damage: Callable[[Path], None], doors: list[str], *, uid: int = 0) -> dict:
    """Damage a copy of a home for each door, try it in a child, and return what was said."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            answer = orjson.dumps(_try_all(home, damage, doors, uid))
        except BaseException:
            answer = orjson.dumps({"!": traceback.format_exc()})
        with open(writer, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child ended with {status}"
    found = orjson.loads(answer)
    assert "!" not in found, found["!"]
    return found


def _try_all(home: Made, damage: Callable[[Path], None], doors: list[str], uid: int) -> dict:
    signal.alarm(SECONDS)
    said = {}
    for door in doors:
        copy = home.path.with_name(f"copy-{door}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(home.path, copy)
        damage(copy)
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    for door in doors:
        copy = home.path.with_name(f"copy-{door}")
        said[door] = _try(DOORS[door], copy, home)
    return said


def _try(door: Callable[[Path, Made], str], home: Path, made: Made) -> str:
    import logging

    words: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agentpref").addHandler(handler)
    try:
        words.append(door(home, made))
    except AgentprefError as error:
        words.append(f"{type(error).__name__}: {error}")
    except BaseException:
        words.append("TROUBLE " + traceback.format_exc())
    finally:
        logging.getLogger("agentpref").removeHandler(handler)
    return " | ".join(words)
