"""Kills a change of the registry before each of its steps in turn, and looks at what is left.

``python killed_steps.py OPERATION FOLDER`` prints ``ok`` and how many steps there were. A step is
what the interpreter audits (opening, renaming, making, removing, locking), a statement that SQLite
is given, and an ``fsync``. Each try is a child that was forked off, on a fresh copy of one home.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import orjson

from agentpref.home import Home
from agentpref.learn import cache  # noqa: F401  (before the steps are counted)
from agentpref.outcome import Outcome
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.messages import new_id
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from agentpref.testing import write_adapter
from agentpref.types import UpdateReport

AUDITED = {
    "open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.listdir",
    "os.scandir", "fcntl.flock", "shutil.rmtree", "sqlite3.connect",
}  # fmt: skip
IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
URL = "http://127.0.0.1:8000"

Operation = Callable[[Registry, Path], object]


def publish(registry: Registry, adapter: Path) -> object:
    parent = registry.state().live
    return registry.publish(adapter, parent=parent, model=IDENTITY, training={})


class Trained:
    """What an update hands over at its end: a candidate that it can save, and its base."""

    base = SimpleNamespace(identity=IDENTITY, numbers="n")

    def __init__(self, adapter: Path) -> None:
        self.adapter = adapter

    def save(self, folder: Path) -> None:
        shutil.copytree(self.adapter, folder, dirs_exist_ok=True)


def update(registry: Registry, adapter: Path) -> object:
    """The end of an update whose candidate passed."""
    serving = registry.state()
    counts = {"trained": 1, "trained_thumbs": 0}
    report = UpdateReport(new_id(), "default", "tiny", 1.0, "passed", serving.live, counts=counts)
    with closing(connect(registry.home)) as connection:
        return Outcome(report, defaultdict(list)).settle(
            registry, connection, Trained(adapter), serving
        )


def promote(registry: Registry, adapter: Path) -> object:
    return registry.promote(registry.list()[-1].revision_id)


def canary(registry: Registry, adapter: Path) -> object:
    return registry.canary(registry.list()[-1].revision_id, 0.1)


def rollback(registry: Registry, adapter: Path) -> object:
    return registry.rollback()


def prune(registry: Registry, adapter: Path) -> object:
    return registry.prune(keep=1, ask=lambda place, name: False)


def quarantine(registry: Registry, adapter: Path) -> object:
    return registry.quarantine(registry.list()[-1].revision_id, "it answers in Latin")


def release(registry: Registry, adapter: Path) -> object:
    return registry.release(registry.list()[0].revision_id)


OPERATIONS = {
    function.__name__: function
    for function in (publish, update, promote, canary, rollback, prune, quarantine, release)
}


def home_to_copy(folder: Path, adapter: Path) -> None:
    """Five revisions: one in quarantine, one to prune that an engine held, previous, live, new."""
    registry = Registry(Home.create(folder))
    names = [publish(registry, adapter).revision_id for _ in range(3)]
    for name in names[1:]:
        registry.promote(name)
    registry.promote(publish(registry, adapter).revision_id)
    publish(registry, adapter)
    registry.quarantine(names[0], "it answers in Latin")
    pins = Pins(registry.home.pins, URL)
    pins.take(names[1])
    pins.close()


def tried(operation: Operation, home: Path, adapter: Path, steps: int) -> bool:
    """Run the operation in a child that kills itself before a step; say whether it was done."""
    child = os.fork()
    if not child:
        killed_before(steps)
        operation(Registry(home), adapter)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child ended with {status}"
    return status == 0


def killed_before(step: int) -> None:
    """Count steps from now on, and end this process as ``kill -9`` does before one of them."""
    left = step

    def count(*_: object) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in AUDITED:
            count()

    def traced(*arguments: object, real=sqlite3.connect, **settings: object) -> sqlite3.Connection:
        connection = real(*arguments, **settings)
        connection.set_trace_callback(count)
        return connection

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        count()
        real(descriptor)

    os.fsync, sqlite3.connect = fsync, traced
    sys.addaudithook(audit)


def check(home: Path) -> None:
    """What must hold whatever was killed."""
    registry = Registry(home)
    with closing(connect(registry.home, readonly=True)) as connection:
        assert examine(connection).problems == []
    for revision in registry.list():
        if revision.pruned_at is None or revision.path.exists():
            check_revision(revision)
    state = registry.state()
    assert state.live is not None
    for name in (state.live, state.canary):
        if name is not None:
            assert registry.get(name).pruned_at is None
    assert state.generation == registry.history()[-1].generation
    with closing(connect(registry.home, readonly=True)) as connection:
        query = "SELECT candidate, report FROM updates"
        told = {name: orjson.loads(text) for name, text in connection.execute(query)}
    for name, report in told.items():
        assert report["revision"] == name
        assert (report["verdict"] == "promoted") == (registry.service(name).since is not None)
    made = [one.revision_id for one in registry.list() if "update_id" in one.manifest["watermark"]]
    assert made == list(told), "a revision of an update and its ledger row are one fact"


def check_cleaned(home: Path, adapter: Path) -> None:
    """The next publisher and the next pruning work, and leave no trace of what was killed."""
    registry = Registry(home)
    for folder in registry.home.adapters.glob(".publishing-*"):
        os.utime(folder, (0, 0))  # an hour later
    publish(registry, adapter)
    prune(registry, adapter)
    check(home)
    there = {path.name for path in registry.home.adapters.iterdir()}
    assert there == {one.revision_id for one in registry.list() if one.pruned_at is None}
    assert registry.rollback().live in there


def main(name: str, folder: Path) -> None:
    adapter = write_adapter(folder / "adapter")
    home_to_copy(folder / "home", adapter)
    done, steps = False, 0
    while not done:
        home = shutil.copytree(folder / "home", folder / "tried")
        done = tried(OPERATIONS[name], home, adapter, steps)
        check(home)
        check_cleaned(home, adapter)
        shutil.rmtree(home)
        steps += 1
    print("ok", steps - 1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
