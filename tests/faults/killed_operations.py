"""The operations that are killed, and what must hold after the kill and after the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import invariants
import killed_world
from killed_world import Told, World

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.transfer.backup import backup
from agentpref.record.transfer.merge import merge
from agentpref.serve.registry import Registry
from agentpref.serve.regression import Finding, withdraw
from agentpref.serve.sequential import Rate


@dataclass
class Operation:
    """An operation on the home of a world.

    ``first`` and ``beside`` are the homes that it uses. ``is_the_same`` says that, repeated after a
    kill, it leaves the home as one that was not killed does.
    """

    world: World
    told: Told
    first: ClassVar[str] = "home"
    beside: ClassVar[Sequence[str]] = ()
    is_the_same: ClassVar[bool] = False

    @classmethod
    def prepare(cls) -> None:
        """Do once what is no part of the operation."""

    def run(self) -> object:
        """Do it, or complete it."""
        raise NotImplementedError

    def homes(self) -> list[Path]:
        """The homes that there are; what was acknowledged is in one of them."""
        return [self.world.home]

    def check_left(self) -> None:
        """Look at what the kill left."""
        there: set[str] = set()
        for home in self.homes():
            invariants.check(home, self.told)
            there |= invariants.acknowledged(Home.open(home))
        self.check_kept(there)

    def check_kept(self, there: set[str]) -> None:
        """All that was acknowledged is there."""
        invariants.check_kept(there, self.told.home)

    def go_on(self, expected: Mapping[str, Any]) -> None:
        """Repeat it; tidy up; forget everybody."""
        self.run()
        self.check_done()
        if self.is_the_same:
            found = invariants.contents(self.world.home)
            for what, rows in expected.items():
                assert found[what] == rows, what
        invariants.check_cleaned(self.world.home, self.world.adapter(6), self.told)
        users = sorted({*self.told.home, *self.told.other})
        invariants.check_forgotten(self.world.home, self.told, *users)

    def check_done(self) -> None:
        """Look at what the same again left."""
        self.check_left()


class Publish(Operation):
    def run(self) -> object:
        live = Registry(self.world.home).state().live
        return killed_world.publish(self.world.home, self.world.adapter(5), live)


class Update(Operation):
    """An update that saves a state and settles; its weights are ready made."""

    is_the_same = True

    @classmethod
    def prepare(cls) -> None:
        cls.state = killed_world.half_trained()

    def run(self) -> object:
        return killed_world.update(self.world.home, self.world.adapter(5), state=self.state)

    def check_left(self) -> None:
        """Whoever is forgotten takes the weights along that nobody knows of."""
        super().check_left()
        forget(self.world.home, "ada")
        home = Home.open(self.world.home)
        assert not home.training.exists()
        assert home.candidates == []

    def check_done(self) -> None:
        super().check_left()
        assert not Home.open(self.world.home).training.exists()


class Promote(Operation):
    def run(self) -> object:
        registry = Registry(self.world.home)
        return registry.promote(registry.list()[-1].revision_id)


class Canary(Operation):
    def run(self) -> object:
        registry = Registry(self.world.home)
        return registry.canary(registry.list()[-1].revision_id, 0.1)


class Rollback(Operation):
    def run(self) -> object:
        return Registry(self.world.home).rollback()


class Withdraw(Operation):
    def run(self) -> object:
        registry = Registry(self.world.home)
        live, votes = str(registry.state().live), Rate(0, 9)
        found = Finding(
            "default", "live", live, "base", 0.0, votes, votes, 99.0, 0.0, "worse", None
        )  # fmt: skip
        return withdraw(registry, found, registry.state())


class Prune(Operation):
    is_the_same = True

    def run(self) -> object:
        return Registry(self.world.home).prune(keep=1, ask=lambda place, name: False)


class Quarantine(Operation):
    is_the_same = True

    def run(self) -> object:
        registry = Registry(self.world.home)
        return registry.quarantine(registry.list()[-1].revision_id, "it answers in Latin")


class Release(Operation):
    is_the_same = True

    def run(self) -> object:
        registry = Registry(self.world.home)
        return registry.release(registry.list()[0].revision_id)


class Judge(Operation):
    """A log that is told something, beside a free database and beside a locked one."""

    def run(self) -> object:
        with Log(self.world.home) as log:
            runs = [log.record([killed_world.SYSTEM], f"bob-said {n}", user_id="bob") for n in "ab"]
            if log.flush():
                self.acknowledge(*runs)
            self.acknowledge(log.compare(*runs, winner="b", user_id="bob"))
        with killed_world.spilling(self.world.home) as log:
            self.acknowledge(log.correct(runs[0], "bob-said better", user_id="bob"))
        with Log(self.world.home) as log:
            self.acknowledge(log.thumbs(runs[1], up=True, user_id="bob"))
        return None

    def acknowledge(self, *ids: str) -> None:
        with (self.world.folder / "acknowledged").open("a") as file:
            file.writelines(f"{name}\n" for name in ids)

    def check_kept(self, there: set[str]) -> None:
        super().check_kept(there)
        file = self.world.folder / "acknowledged"
        assert not file.exists() or there >= set(file.read_text().split())


class Forget(Operation):
    is_the_same = True

    def run(self) -> object:
        return forget(self.world.home, "ada")

    def check_kept(self, there: set[str]) -> None:
        invariants.check_kept(there, self.told.home, forgetting="ada")

    def check_done(self) -> None:
        self.check_left()
        there = invariants.acknowledged(Home.open(self.world.home))
        assert there.isdisjoint(self.told.home["ada"])
        assert invariants.holding(self.world.home, "ada-said") == []


class Merge(Forget):
    """A merge of a home where Ada was forgotten."""

    beside = ("other",)

    def run(self) -> object:
        return merge(self.world.home, [self.world.folder / "other"])

    def check_done(self) -> None:
        super().check_done()
        there = invariants.acknowledged(Home.open(self.world.home))
        invariants.check_kept(there, self.told.other)


class Backup(Operation):
    def run(self) -> object:
        target = self.world.folder / "copy"
        return target.exists() or backup(self.world.home, target)

    def homes(self) -> list[Path]:
        return [home for home in (self.world.home, self.world.folder / "copy") if home.exists()]

    def check_done(self) -> None:
        self.check_left()
        self.check_kept(invariants.acknowledged(Home.open(self.world.folder / "copy")))


class Restore(Operation):
    """The guide's recipe: move the home away, the backup to its place, and merge the old home."""

    beside = ("outbox",)
    is_the_same = True

    def run(self) -> object:
        home, broken, outbox = (self.world.folder / name for name in ("home", "broken", "outbox"))
        if not broken.exists():
            home.rename(broken)
        if outbox.exists():
            outbox.rename(home)
        return merge(home, [broken])

    def homes(self) -> list[Path]:
        names = (self.world.folder / name for name in ("home", "broken"))
        return [home for home in names if home.exists()]

    def check_done(self) -> None:
        self.check_left()
        self.check_kept(invariants.acknowledged(Home.open(self.world.home)))


class Upgrade(Operation):
    """The first time that a home of version 0.1.0 is opened."""

    first = "old"
    is_the_same = True

    def run(self) -> object:
        if not self.world.home.exists():
            (self.world.folder / "old").rename(self.world.home)
        return connect(Home.open(self.world.home)).close()

    def homes(self) -> list[Path]:
        return [self.world.home if self.world.home.exists() else self.world.folder / "old"]

    def check_left(self) -> None:
        (home,) = self.homes()
        with closing(connect(Home.open(home))) as connection:
            assert examine(connection).problems == []
            assert connection.execute("SELECT count(*) FROM run").fetchone() == (404,)

    def go_on(self, expected: Mapping[str, Any]) -> None:
        self.run()
        assert invariants.contents(self.world.home) == expected


OPERATIONS: dict[str, type[Operation]] = {
    kind.__name__.lower(): kind
    for kind in (
        Publish, Update, Promote, Canary, Rollback, Withdraw, Prune, Quarantine, Release, Judge,
        Forget, Merge, Backup, Restore, Upgrade,
    )
}  # fmt: skip
