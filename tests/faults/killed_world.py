"""The homes that are copied for each kill, and what was acknowledged in them.

``python killed_world.py FOLDER`` makes them: ``home``; ``other``, which shares its beginning and
its key, has a second key from a third home, and where Ada was forgotten; ``outbox``, a backup of
``home``; and ``old``, a home of version 0.1.0. ``told.json`` says what was acknowledged.

Whatever a user says has the mark ``<user>-said``, so that a search of bytes finds it.
"""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import orjson

from agentpref.home import Home
from agentpref.learn import cache  # noqa: F401  (before the steps are counted)
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn.checkpoint import Checkpoint, TrainingState
from agentpref.learn.data import UpdateData
from agentpref.learn.objective import StepResult
from agentpref.learn.resume import StartedUpdate, find
from agentpref.outcome import Outcome
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.examples import read_examples
from agentpref.record import spill
from agentpref.record.database import connect, exclusive, transaction
from agentpref.record.deletion.forget import forget
from agentpref.record.log import Log
from agentpref.record.messages import new_id
from agentpref.record.spill import drain
from agentpref.record.store import Store
from agentpref.record.transfer.backup import backup
from agentpref.record.transfer.merge import merge
from agentpref.record.updates import Updates
from agentpref.serve.pins import Pins
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import Example, UpdateReport

OLD = Path(__file__).parents[1] / "data" / "home-0.1.0"
IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
URL = "http://127.0.0.1:8000"
SYSTEM = {"role": "system", "content": "You are terse."}

Ids = dict[str, set[str]]
"""What was acknowledged: the ids of runs, feedback and comparisons, by user."""


class World(NamedTuple):
    """A folder with homes in it, and a folder of adapters to publish."""

    folder: Path
    adapters: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def copy(self, folder: Path, *names: str) -> World:
        """Copy some of its homes, or all that there is, to a folder that is made anew."""
        shutil.rmtree(folder, ignore_errors=True)
        for name in names:
            shutil.copytree(self.folder / name, folder / name)
        if not names:
            shutil.copytree(self.folder, folder)
        return self._replace(folder=folder)

    def adapter(self, number: int) -> Path:
        return self.adapters / str(number)

    def told(self) -> Told:
        return Told(**orjson.loads((self.folder / "told.json").read_bytes()))


class Told(NamedTuple):
    """What was acknowledged in ``home`` and ``other``, and which users taught which revision."""

    home: dict[str, list[str]]
    other: dict[str, list[str]]
    taught: dict[str, list[str]]


def publish(home: Path, adapter: Path, parent: str | None = None) -> str:
    """Publish by hand."""
    registry = Registry(home)
    return registry.publish(adapter, parent=parent, model=IDENTITY, training={}).revision_id


def talk(log: Log, user: str, about: str, ids: Ids) -> list[str]:
    """Log a question with two answers, which the user compares, corrects and likes."""
    asked = [SYSTEM, {"role": "user", "content": f"{user}-said {about}?"}]
    said = {"user_id": user, "metadata": {"page": f"{user}-said {about}"}, "tags": ["talk"]}
    runs = [log.record(asked, f"{user}-said {about}: {n}", **said) for n in range(2)]
    assert log.flush()
    ids[user] |= {
        *runs,
        log.compare(*runs, winner="a", user_id=user, comment=f"{user}-said why"),
        log.correct(runs[1], f"{user}-said {about}: better", user_id=user),
        log.thumbs(runs[0], up=True, user_id=user, comment=f"{user}-said so"),
    }
    return runs


@contextmanager
def spilling(home: Path) -> Iterator[Log]:
    """A log whose judgements go to the spill, because another process holds the database."""
    patience, spill.PATIENCE_SECONDS = spill.PATIENCE_SECONDS, 0.01
    with closing(connect(Home.open(home))) as holder, transaction(holder), Log(home) as log:
        yield log
    spill.PATIENCE_SECONDS = patience


class Trained:
    """What a learner is at the end of an update: a candidate that it can save, and its base."""

    base = SimpleNamespace(identity=IDENTITY, numbers="n")

    def __init__(self, adapter: Path) -> None:
        self.adapter = adapter

    def instructions(self, policy: str) -> str:
        return ""

    def save(self, folder: Path) -> None:
        shutil.copytree(self.adapter, folder, dirs_exist_ok=True)


def update(home: Path, adapter: Path, *, state: TrainingState | None = None) -> str | None:
    """Do what an update does around its training: resume, save a state, settle, tidy up.

    It learns what the live revision has not. Returns the revision; None if nothing is new.
    """
    place, registry = Home.open(home), Registry(home)
    with exclusive(place), closing(connect(place)) as connection:
        drain(place)
        checkpoints.sweep(place.training)
        for folder in place.candidates:
            shutil.rmtree(folder)
        serving, updates = registry.state(), Updates(connection)
        catalog = Catalog(connection, "default", held_out=0.0)
        catalog.refresh()
        found = read_examples(Store(connection), "default", held_out=0.0).examples
        learned = updates.learned_by(serving.live)
        data = UpdateData(new=tuple(one for one in found if one.example_id not in learned))
        saved = Checkpoint(checkpoints.path_of(place.training, "default"))
        needed = {"live revision": serving.live}
        started = find(saved, needed, catalog.find, ended=updates.has)
        if started is None and not data.new:
            return None
        started = started or StartedUpdate(new_id(), 1.0, data)
        if state is not None:
            saved.about = started.freeze(needed)
            saved.save(state)
        report = settle(registry, connection, adapter, started, serving.live)
        checkpoints.remove(saved.path)
        return report.revision


def settle(registry, connection, adapter, started: StartedUpdate, live: str | None) -> UpdateReport:
    """The end of an update whose candidate passed."""
    groups = defaultdict[str, list[Example]](list, trained=[*started.data.new])
    answer = started.data.new[0].completions[0].message["content"]  # a check may quote such words
    if live is not None:
        answer += " and what live has learned, such as ada-said"
    counts = {"trained": len(started.data.new), "trained_thumbs": 0}
    report = UpdateReport(
        started.update_id, "default", "tiny", started.created_at, "passed", live, counts=counts,
        checks=[{"name": "check polite", "passed": True, "message": f"it answers {answer}"}],
    )  # fmt: skip
    return Outcome(report, groups).settle(registry, connection, Trained(adapter), registry.state())


def half_trained() -> TrainingState:
    """A state between two steps of training."""
    import torch

    tensors = {"weight": torch.ones(4)}
    return TrainingState("f", 1, 2, 1.0, {}, [StepResult(0.5, 0.1, None)], tensors)


def make_home(world: World, ids: Ids, taught: dict[str, list[str]]) -> None:
    """Six revisions: in quarantine, live once, previous, its twin, live, and a new one.

    The previous one learned from Ada, so the live one descends from what she said. The twin has
    the same weights under another number, and an engine has loaded it. There are examples that no
    update has seen yet.
    """
    registry, runs = Registry(Home.create(world.home)), dict[str, str]()
    spoilt = publish(world.home, world.adapter(0))
    registry.quarantine(spoilt, "it answers in Latin")

    def teach(user: str, number: int) -> str:
        with Log(world.home) as log:
            runs[user] = talk(log, user, f"lesson {number}", ids)[0]
            if user == "ada":  # each says something of what the other asked
                remark = {"key": "page", "value": {"x": "bob-said, and ada-said"}}
                ids["ada"].add(log.feedback(runs["ada"], **remark, user_id="bob"))
                ids["ada"].add(log.feedback(runs["bob"], **remark, user_id="ada"))
        name = update(world.home, world.adapter(number))
        assert name is not None
        taught[name] = [user]
        return name

    clean = teach("bob", 1)
    teach("ada", 2)
    twin = publish(world.home, world.adapter(2))
    with closing(Pins(registry.home.pins, URL)) as pins:
        pins.take(twin)
    teach("bob", 3)
    publish(world.home, world.adapter(4), parent=clean)
    with Log(world.home) as log:
        for user in ("ada", "bob"):
            talk(log, user, "news", ids)


def talk_on(world: World, ids: Ids) -> None:
    """What the backup does not have: entries that were refused, more talk, and a spill."""
    with spilling(world.home) as log:
        for user in ("ada", "bob"):
            log.thumbs("no-such-run", up=True, user_id=user, comment=f"{user}-said to nobody")
    assert drain(Home.open(world.home)).refused == 2
    with Log(world.home) as log:
        runs = {user: talk(log, user, "more", ids)[0] for user in ("ada", "bob")}
    with spilling(world.home) as log:
        for user, run in runs.items():
            words = f"{user}-said while it was locked"
            ids[user].add(log.thumbs(run, up=False, user_id=user, comment=words))


def talk_elsewhere(world: World, ids: Ids) -> None:
    """What only the other home has: Carol talks there, Bob goes on, and Ada is forgotten."""
    place = world.folder / "other"
    with Log(world.folder / "third") as log:
        talk(log, "dan", "elsewhere", ids)
    merge(place, [world.folder / "third"])
    shutil.rmtree(world.folder / "third")
    with Log(place) as log:
        run, _ = [talk(log, user, "elsewhere", ids)[0] for user in ("bob", "carol")]
    forget(place, "ada")
    with spilling(place) as log:
        ids["bob"].add(log.thumbs(run, up=False, user_id="bob", comment="bob-said late"))


def main(folder: Path) -> None:
    """Make all of it."""
    world, taught = World(folder, folder / "adapters"), dict[str, list[str]]()
    home, other = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for number in range(8):
        write_adapter(world.adapter(number), seed=number)
    make_home(world, home, taught)
    for name in ("outbox", "other"):
        backup(world.home, folder / name)
    talk_on(world, home)
    talk_elsewhere(world, other)
    shutil.copytree(OLD, folder / "old")
    told = Told(
        {user: sorted(ids) for user, ids in home.items()},
        {user: sorted(ids) for user, ids in other.items()},
        taught,
    )
    (folder / "told.json").write_bytes(orjson.dumps(told._asdict()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
