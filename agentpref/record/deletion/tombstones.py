"""What was forgotten in another home, forgotten here too.

Whoever was forgotten at one host has asked to be forgotten, not to be forgotten there: a home that
takes over tombstones must not keep what was said before them. Names are hashes under a key, so only
homes that share the key know that they mean the same user. Where it is interrupted, the same call
again completes it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

from agentpref.home import Home
from agentpref.record.database import connect, transaction, translated
from agentpref.record.deletion.forget import Forgotten
from agentpref.record.deletion.refused import purge
from agentpref.record.deletion.removal import (
    Removed,
    choose,
    chosen_judgements,
    delete,
    removal,
)
from agentpref.record.updates import Updates, rebuilds, taint
from agentpref.types import Progress


def adopt(home: Home, tombstones: Mapping[str, float], tell: Progress) -> Forgotten:
    """Remove what these users said before they were forgotten, and keep the tombstones.

    Args:
        home: the home that adopts them.
        tombstones: when each user was forgotten, by the name that the homes share.
        tell: called with ``(stage, done, total)`` as work goes on.

    Raises:
        UpdateRunning: an update of the home, or a removal from it, is running.
        NotKept: as for :func:`~agentpref.record.deletion.forget.forget`.
    """
    with removal(home, tell) as connection:
        connection.execute("CREATE TEMP TABLE tombstone (name TEXT PRIMARY KEY, until REAL)")
        connection.executemany("INSERT INTO tombstone VALUES (?, ?)", tombstones.items())
        _purge_refused(home, connection, tombstones)
        with transaction(connection):
            removed, revisions = _remove(connection)
        done = Forgotten(**asdict(removed), revisions=revisions, rebuild=rebuilds(connection, home))
    _keep(home, tombstones)  # last: until then, the same call does all of it again
    return done


_SAID_BEFORE = "created_at <= (SELECT until FROM tombstone WHERE name = user_id)"


def _remove(connection: sqlite3.Connection) -> tuple[Removed, tuple[str, ...]]:
    """Do all that is in the database, as one transaction of the caller's."""
    choose(connection, _SAID_BEFORE, _SAID_BEFORE, {})
    updates, sources = Updates(connection), chosen_judgements(connection)
    revisions = tuple(updates.revisions_trained_on(sources))
    updates.forget_words(sources)
    taint(connection, revisions, time.time())
    return delete(connection), revisions


def _keep(home: Home, tombstones: Mapping[str, float]) -> None:
    with translated(home), closing(connect(home)) as connection, transaction(connection):
        connection.executemany(
            "INSERT INTO forgotten (user_id, at) VALUES (?, ?)"
            " ON CONFLICT (user_id) DO UPDATE SET at = max(at, excluded.at)",
            tombstones.items(),
        )


def _purge_refused(
    home: Home, connection: sqlite3.Connection, tombstones: Mapping[str, float]
) -> None:
    runs = {run for (run,) in connection.execute(f"SELECT run_id FROM run WHERE {_SAID_BEFORE}")}

    def is_gone(fields: Mapping[str, Any]) -> bool:
        about = {fields.get(name) for name in ("run_id", "run_a", "run_b")}
        until = tombstones.get(fields.get("user_id") or "", float("-inf"))
        return fields["created_at"] <= until or not runs.isdisjoint(about)

    purge(home, is_gone)
