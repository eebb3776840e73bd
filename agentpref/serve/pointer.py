"""What a namespace serves: one row, changed step by step, and the history of its changes.

Functions over a connection that is in a transaction of the caller's, who has compared the
generation. Knows nothing of files and of engines.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import NamedTuple

from agentpref.errors import GenerationConflict, RevisionError
from agentpref.serve.status import unfit


class ServingState(NamedTuple):
    """What a namespace serves. ``live`` is ``None`` for the bare base model."""

    namespace: str
    live: str | None
    canary: str | None
    weight: float
    generation: int


class HistoryEntry(NamedTuple):
    """One change of what is served: ``action`` is ``promote``, ``canary`` or ``rollback``."""

    at: float
    generation: int
    action: str
    live: str | None
    canary: str | None
    weight: float


def state(connection: sqlite3.Connection, namespace: str) -> ServingState:
    """Read what is live and canary now."""
    query = "SELECT namespace, live, canary, weight, generation FROM serving WHERE namespace = ?"
    row = connection.execute(query, (namespace,)).fetchone()
    return ServingState(namespace, None, None, 0.0, 0) if row is None else ServingState(*row)


def require_generation(found: ServingState, expected: int | None) -> None:
    """Refuse a change of what is not what its author saw; ``None`` is one who did not look."""
    if expected is not None and found.generation != expected:
        raise GenerationConflict(
            f"{found.namespace!r} is at generation {found.generation}, not {expected}: "
            f"{found.live or 'the base model'} was made live by somebody else; look at "
            f"history() and try again"
        )


def history(connection: sqlite3.Connection, namespace: str) -> list[HistoryEntry]:
    """Read every change of what is served, oldest first."""
    query = (
        "SELECT at, generation, action, live, canary, weight FROM serving_history"
        " WHERE namespace = ? ORDER BY id"
    )
    return [HistoryEntry(*row) for row in connection.execute(query, (namespace,))]


def previous(connection: sqlite3.Connection, namespace: str) -> str | None:
    """Find the last promotion, to another revision that may serve, below the one that is live.

    Raises:
        RevisionError: no promotion is left to undo.
    """
    served = _served(history(connection, namespace))
    if len(served) == 1:
        raise RevisionError(
            f"nothing to roll back in {namespace!r}: the base model is live; "
            f"promote(revision) makes one live, canary(None, 0) ends a canary"
        )
    passed_over = {*unfit(connection), served[-1]}
    return next((name for name in reversed(served) if name not in passed_over), None)


def change(connection: sqlite3.Connection, new: ServingState, action: str) -> ServingState:
    """Write what is to be served, under the next generation, and append it to the history."""
    new = new._replace(generation=new.generation + 1)
    connection.execute(
        "INSERT OR REPLACE INTO serving (namespace, live, canary, weight, generation)"
        " VALUES (?, ?, ?, ?, ?)",
        new,
    )
    connection.execute(
        "INSERT INTO serving_history (namespace, at, generation, action, live, canary, weight)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (new.namespace, time.time(), new.generation, action, new.live, new.canary, new.weight),
    )
    return new


def _served(entries: Sequence[HistoryEntry]) -> list[str | None]:
    """Replay the history as a stack: promotions push, a rollback pops down to where it went."""
    served: list[str | None] = [None]
    for entry in entries:
        if entry.action == "rollback":
            served.pop()
            while served[-1] != entry.live:
                served.pop()
        elif entry.action == "promote" and entry.live != served[-1]:
            served.append(entry.live)
    return served
