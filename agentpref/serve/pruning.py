"""Pruning: removing the folders of revisions that nothing needs, to make room.

A revision stays while it serves, may have to serve, or may be loaded in an engine. A pruning and a
router use two flags, and each sets its own before it reads the other's: a pruning marks the row and
then reads the pins; a router takes its pin and then reads the row. So no router loads what is being
removed. Two prunings at once tell their marks apart by the time in them. The row stays for good,
since history, lineage and taint refer to it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypeAlias

from agentpref.errors import ConfigError, RevisionError
from agentpref.home import Home, writing
from agentpref.leftovers import clear_adapters, discard
from agentpref.record.database import transaction
from agentpref.record.sums import counted
from agentpref.record.updates import last_clean
from agentpref.serve import folders, status
from agentpref.serve.pins import find_pins
from agentpref.types import BASE

KEEP = 5
"""How many of the newest revisions stay, whether or not anything needs them."""

Ask: TypeAlias = Callable[[str, str], bool | None]
"""Called with a place and a revision: is it loaded there? ``None`` if the engine does not say."""


def no_answer(place: str, revision_id: str) -> None:
    """The default :data:`Ask`: no engine says what it has loaded."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, oldest first, how many bytes that freed, and why each other one stayed."""

    removed: tuple[str, ...]
    kept: Mapping[str, str]
    bytes: int


@dataclass(frozen=True, slots=True)
class Pruning:
    """One pruning of one namespace; the arguments are those of ``Registry.prune``.

    ``connection`` is to the home's database; the pruning opens transactions of its own.
    """

    home: Home
    connection: sqlite3.Connection
    namespace: str
    keep: int
    ask: Ask

    def run(self, dry_run: bool) -> Pruned:
        """Remove what nothing needs, oldest first; with ``dry_run``, only say what that is."""
        if self.keep < 1:
            raise ConfigError(
                f"keep is {self.keep!r}, but must be 1 or more: the newest may be a candidate"
            )
        removed, kept, freed = list[str](), dict[str, str](), 0
        if not dry_run:
            self._clean()
        query = "SELECT revision_id, pruned_at FROM revision WHERE namespace = ? ORDER BY seq"
        for name, pruned_at in self.connection.execute(query, (self.namespace,)).fetchall():
            folder = self.home.adapters / name
            if pruned_at is not None and not folder.exists():
                continue  # removed before; where the folder is there, a crash interrupted that
            size = 0
            with suppress(FileNotFoundError):  # someone deleted it by hand, or another pruning did
                size = sum(file.stat().st_size for file in folder.iterdir())
            why = self._needed().get(name) or self._use(name)
            if why is None and not dry_run:
                why = self._remove(name)
            if why is None:
                removed.append(name)
                freed += size
            else:
                kept[name] = why
        return Pruned(tuple(removed), kept, freed)

    def _needed(self) -> dict[str, str]:
        """Which revisions of the namespace must stay whether or not they are loaded, and why."""
        state = status.read_state(self.connection, self.namespace)
        query = (
            "SELECT revision_id FROM revision WHERE namespace = ? AND pruned_at IS NULL"
            " ORDER BY seq DESC LIMIT ?"
        )
        newest = self.connection.execute(query, (self.namespace, self.keep))
        why = {name: f"one of the newest {self.keep}" for (name,) in newest}
        if state.live is not None:
            clean = last_clean(self.connection, state.live)
            why[clean] = "the last clean one of the live line"
        with suppress(RevisionError):  # nothing to roll back to
            previous = status.previous(self.connection, self.namespace)
            why[previous or BASE] = "what a rollback goes to"
        why |= {state.canary or BASE: "canary", state.live or BASE: "live"}
        why.pop(BASE, None)
        return why

    def _use(self, name: str) -> str | None:
        """Where a revision is or may be loaded; ``None`` if it is nowhere."""
        for pin in find_pins(self.home.pins, name):
            if pin.alive:
                return f"in use at {pin.place}"
            loaded = False if pin.is_stale else self.ask(pin.place, name)
            if loaded is None:
                return f"perhaps loaded at {pin.place}, which does not say"
            if loaded:
                return f"loaded at {pin.place}"
        return None

    def _remove(self, name: str) -> str | None:
        """Mark a revision, read the pins again, and remove it; say why if it has to stay."""
        folder, now = self.home.adapters / name, time.time()
        other = "another pruning is at it"
        with transaction(self.connection):
            why = other if self._is_marked(name) else self._needed().get(name)
            if why is not None:
                return why
            mark_pruned(self.connection, name, now)
        with writing(folder), ExitStack() as on_failure:
            on_failure.callback(_unmark, self.connection, name, now)
            why = self._use(name)
            if why is not None:
                return why
            with transaction(self.connection):
                if not self._is_marked(name, now):
                    return other
                leaving = folders.take_name(folder) if folder.exists() else None
            on_failure.pop_all()
        if leaving is not None:
            discard(leaving)
        for pin in find_pins(self.home.pins, name):
            pin.remove()
        return None

    def _is_marked(self, name: str, at: float | None = None) -> bool:
        query = "SELECT pruned_at FROM revision WHERE revision_id = ? AND pruned_at IS NOT NULL"
        row = self.connection.execute(query, (name,)).fetchone()
        return row is not None and at in (None, row["pruned_at"])

    def _clean(self) -> None:
        """Undo what crashes left: folders, marks of revisions still there, and pins of no use."""
        with transaction(self.connection):
            rows = self.connection.execute("SELECT revision_id, pruned_at FROM revision")
            marks: dict[str, float | None] = dict(rows.fetchall())
            clear_adapters(self.home.adapters, marks)
            for name, at in marks.items():
                if at is not None and (self.home.adapters / name).exists():
                    _unmark(self.connection, name, at)
                    marks[name] = None
        for pin in find_pins(self.home.pins):
            is_gone = marks.get(pin.revision_id) is not None
            if pin.is_stale or (is_gone and self._use(pin.revision_id) is None):
                pin.remove()


def mark_pruned(connection: sqlite3.Connection, revision_id: str, at: float) -> None:
    """Mark a revision as pruned since a time."""
    with transaction(connection), counted(connection, "standing"):
        query = "UPDATE revision SET pruned_at = ? WHERE revision_id = ?"
        connection.execute(query, (at, revision_id))


def _unmark(connection: sqlite3.Connection, revision_id: str, at: float) -> None:
    """Take back a mark of a pruning that began at a time."""
    with transaction(connection), counted(connection, "standing"):
        query = "UPDATE revision SET pruned_at = NULL WHERE revision_id = ? AND pruned_at = ?"
        connection.execute(query, (revision_id, at))
