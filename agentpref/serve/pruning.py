"""Which revisions may go, to make room, and letting them go.

A revision that serves, or may have to, stays; so does one that an engine may have loaded. Two flags
keep a pruning and a router out of each other's way, and each sets its own before it looks at the
other's: a pruning marks the row and then looks at the holds, a router takes its hold and then looks
at the row. Two prunings know their marks by the time that is in them. The row stays for good, since
history, lineage and taint lead through it. Knows nothing of engines: whether one has a revision
loaded, it asks who called.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from agentpref.errors import ConfigError, RevisionError
from agentpref.home import Home
from agentpref.record.database import transaction
from agentpref.record.lineage import last_clean
from agentpref.serve import folders, pointer, status
from agentpref.serve.pins import find_pins
from agentpref.types import BASE

KEEP = 5
"""How many of the newest revisions stay, whether or not anything needs them."""

_OTHER = "another pruning is at it"

Ask: TypeAlias = Callable[[str, str], bool | None]
"""Told a place and a revision: is it loaded there? ``None`` where the engine does not say."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a pruning removed, oldest first, how many bytes that freed, and why the rest stayed."""

    removed: tuple[str, ...]
    kept: Mapping[str, str]
    bytes: int


def silent(place: str, revision_id: str) -> None:
    """Answer for engines that nobody can ask: they do not say."""


def protected(connection: sqlite3.Connection, namespace: str, keep: int) -> dict[str, str]:
    """Say which revisions of a namespace must stay for what they are, and why."""
    state = pointer.state(connection, namespace)
    query = (
        "SELECT revision_id FROM revision WHERE namespace = ? AND pruned_at IS NULL"
        " ORDER BY seq DESC LIMIT ?"
    )
    why = {
        name: f"one of the newest {keep}"
        for (name,) in connection.execute(query, (namespace, keep))
    }
    if state.live is not None:
        why[last_clean(connection, state.live)] = "the last clean one of the live line"
    with suppress(RevisionError):  # nothing to roll back to
        why[pointer.previous(connection, namespace) or BASE] = "what a rollback goes to"
    why |= {state.canary or BASE: "canary", state.live or BASE: "live"}
    why.pop(BASE, None)
    return why


class Pruning:
    """One pruning of one namespace.

    Args:
        home: whose revisions.
        connection: to its database; it opens transactions of its own.
        namespace: whose revisions go; other namespaces' are not looked at.
        keep: how many of the newest stay.
        ask: whether an engine that outlives its users has a revision loaded.

    Raises:
        ConfigError: ``keep`` is below 1, and so the candidate of an update might go.
    """

    def __init__(
        self, home: Home, connection: sqlite3.Connection, namespace: str, *, keep: int, ask: Ask
    ) -> None:
        """Touch nothing yet."""
        if keep < 1:
            raise ConfigError(f"keep is {keep!r}, but must be 1 or more: the newest may be a trial")
        self._home = home
        self._connection = connection
        self._namespace = namespace
        self._keep = keep
        self._ask = ask

    def run(self, *, dry_run: bool) -> Pruned:
        """Let go of what may go, oldest first; where ``dry_run``, only say what that is.

        Raises:
            NotKept: a folder cannot be removed.
        """
        removed: list[str] = []
        kept: dict[str, str] = {}
        freed = 0
        if not dry_run:
            self._clean()
        for name in self._candidates():
            size = _size(self._home.adapters / name)
            why = self._needed(name) or (None if dry_run else self._let_go(name))
            if why is None:
                removed.append(name)
                freed += size
            else:
                kept[name] = why
        return Pruned(tuple(removed), kept, freed)

    def _candidates(self) -> list[str]:
        """Those that are there, and those whose pruning was cut short."""
        query = "SELECT revision_id, pruned_at FROM revision WHERE namespace = ? ORDER BY seq"
        rows = self._connection.execute(query, (self._namespace,)).fetchall()
        return [name for name, at in rows if at is None or (self._home.adapters / name).exists()]

    def _needed(self, name: str) -> str | None:
        """Say what the revision is needed for, or None."""
        why = protected(self._connection, self._namespace, self._keep)
        return why.get(name) or self._in_use(name)

    def _in_use(self, name: str) -> str | None:
        for pin in find_pins(self._home.pins, name):
            if pin.alive:
                return f"in use at {pin.place}"
            loaded = False if pin.is_stale else self._ask(pin.place, name)
            if loaded is None:
                return f"perhaps loaded at {pin.place}, which does not say"
            if loaded:
                return f"loaded at {pin.place}"
        return None

    def _let_go(self, name: str) -> str | None:
        """Mark, look at the holds again, and remove; say why not where that was not to be."""
        folder, at = self._home.adapters / name, time.time()
        with transaction(self._connection):
            if name in status.pruned(self._connection):
                return _OTHER
            why = protected(self._connection, self._namespace, self._keep).get(name)
            if why is not None:
                return why
            status.mark_pruned(self._connection, name, at)
        with folders.written(folder), ExitStack() as otherwise:
            otherwise.callback(status.unmark_pruned, self._connection, name, at)
            why = self._in_use(name)
            if why is not None:
                return why
            with transaction(self._connection):
                if not status.is_marked(self._connection, name, at):
                    return _OTHER
                leaving = folders.take_name(folder) if folder.exists() else None
            otherwise.pop_all()
        if leaving is not None:
            folders.discard(leaving)
        for pin in find_pins(self._home.pins, name):
            pin.remove()
        return None

    def _clean(self) -> None:
        """Undo what crashes left: half-removed folders, marks, and holds whose engine has ended."""
        with transaction(self._connection):
            folders.clean(self._home.adapters, status.names(self._connection))
            for name, at in status.pruned(self._connection).items():
                if (self._home.adapters / name).exists():
                    status.unmark_pruned(self._connection, name, at)
        for pin in find_pins(self._home.pins):
            if pin.is_stale:
                pin.remove()


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:  # somebody deleted it, or another pruning is at it
        return 0
