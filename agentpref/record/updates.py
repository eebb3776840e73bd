"""The ledger of updates: what each was trained on, what it led to, and what the gate said.

It answers one question that matters: which pairs has the revision that serves already learned?
Those are what its line of ancestors trained on as new. Knows nothing of how pairs are made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from agentpref.errors import UpdateError
from agentpref.record.database import transaction

Role = Literal["new", "replay", "held_out"]


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """One update as it is kept. ``pairs`` maps the ids of the pairs it used to their role."""

    update_id: str
    namespace: str
    created_at: float
    finished_at: float
    parent: str | None
    candidate: str | None
    verdict: str
    report: Mapping[str, Any]
    pairs: Mapping[str, Role] = field(default_factory=dict)


class Updates:
    """The updates of a home, over one open connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, update: UpdateRow) -> None:
        """Keep an update and the pairs it used, both or neither."""
        with transaction(self._connection):
            self._connection.execute(
                "INSERT INTO updates (update_id, namespace, created_at, finished_at, parent,"
                " candidate, verdict, report) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    update.update_id,
                    update.namespace,
                    update.created_at,
                    update.finished_at,
                    update.parent,
                    update.candidate,
                    update.verdict,
                    orjson.dumps(update.report).decode(),
                ),
            )
            self._connection.executemany(
                "INSERT INTO update_pair (update_id, pair_id, role) VALUES (?, ?, ?)",
                [(update.update_id, pair, role) for pair, role in update.pairs.items()],
            )

    def learned_by(self, revision: str | None) -> set[str]:
        """Ids of the pairs, held-out ones too, that were new to a revision or to an ancestor."""
        found = self._connection.execute(
            "WITH RECURSIVE line(name) AS ("
            "  SELECT ? UNION SELECT parent FROM revision JOIN line ON revision_id = name"
            ") SELECT DISTINCT pair_id FROM update_pair JOIN updates USING (update_id)"
            " JOIN line ON candidate = name WHERE role IN ('new', 'held_out')",
            (revision,),
        )
        return {pair for (pair,) in found}

    def tried_on(self, namespace: str, parent: str | None) -> set[str]:
        """Ids of the pairs that a namespace's last update used in vain on top of ``parent``."""
        last = self._connection.execute(
            "SELECT update_id, parent, verdict FROM updates WHERE namespace = ?"
            " ORDER BY created_at DESC, update_id DESC LIMIT 1",
            (namespace,),
        ).fetchone()
        if last is None or last[1] != parent or last[2] == "promoted":
            return set()
        pairs = self._connection.execute(
            "SELECT pair_id FROM update_pair WHERE update_id = ? AND role != 'replay'", (last[0],)
        )
        return {pair for (pair,) in pairs}

    def report(self, namespace: str, update_id: str | None = None) -> dict[str, Any]:
        """The report of an update, or of the namespace's last one.

        Raises:
            UpdateError: there is no such update.
        """
        row = self._connection.execute(
            "SELECT report FROM updates WHERE namespace = ? AND update_id = coalesce(?, update_id)"
            " ORDER BY created_at DESC, update_id DESC LIMIT 1",
            (namespace, update_id),
        ).fetchone()
        if row is None:
            which = f"no update {update_id!r}" if update_id else "no update yet"
            raise UpdateError(f"namespace {namespace!r} has {which}; run 'agentpref update' first")
        report: dict[str, Any] = orjson.loads(row[0])
        return report
