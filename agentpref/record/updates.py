"""The ledger of updates: what each was trained on, what it led to, and what the gate said.

It answers two questions. Which pairs has the revision that serves already learned? Those are what
its line of ancestors trained on as new. And which revisions have seen what somebody said? Those
that trained on a pair that was made of it, and all that descend from them. Knows nothing of how
pairs are made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from agentpref.errors import UpdateError
from agentpref.record.database import transaction

Role = Literal["new", "replay", "held_out"]


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """One update as it is kept.

    ``pairs`` maps the ids of the pairs it used to their role, ``sources`` to the ids of the
    feedback and comparisons that each was made of.
    """

    update_id: str
    namespace: str
    created_at: float
    finished_at: float
    parent: str | None
    candidate: str | None
    verdict: str
    report: Mapping[str, Any]
    pairs: Mapping[str, Role] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
            self._connection.executemany(
                "INSERT OR IGNORE INTO pair_source (source, pair_id) VALUES (?, ?)",
                [(source, pair) for pair, sources in update.sources.items() for source in sources],
            )

    def has(self, update_id: str) -> bool:
        """Whether an update has come to its end and was kept."""
        query = "SELECT 1 FROM updates WHERE update_id = ?"
        return self._connection.execute(query, (update_id,)).fetchone() is not None

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

    def revisions_trained_on(self, sources: Iterable[str]) -> list[str]:
        """Name the revisions whose training, or whose ancestors', saw any of these, oldest first.

        Ask while the feedback and comparisons that ``sources`` names are still there: of a pair
        that was used before its sources were kept, it is not known what it was made of, and every
        update since the first of them that used such a pair counts.
        """
        found = self._connection.execute(_TRAINED_ON, {"sources": _json(sources)})
        return [revision for (revision,) in found]

    def forget_words(self, sources: Iterable[str]) -> None:
        """Take what hosts' checks said out of the reports of updates that used any of these.

        All else in a report is numbers, names of strata, and words of ours around them; but a check
        may quote what the candidate answered to it.
        """
        reports = self._connection.execute(_REPORTS_ON, {"sources": _json(sources)}).fetchall()
        with transaction(self._connection):
            self._connection.executemany(
                "UPDATE updates SET report = ? WHERE update_id = ?",
                [(_without_words(report), update_id) for update_id, report in reports],
            )

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


_USED = """
WITH RECURSIVE source(id) AS (SELECT value FROM json_each(:sources)),
since(at) AS (
    SELECT min(created_at) FROM (
        SELECT created_at FROM feedback WHERE feedback_id IN source
        UNION ALL SELECT created_at FROM comparison WHERE comparison_id IN source)
),
used(update_id, role) AS (
    SELECT DISTINCT update_id, role FROM updates JOIN update_pair USING (update_id), since
    WHERE pair_id IN (SELECT pair_id FROM pair_source WHERE source IN source)
        OR created_at >= at AND pair_id NOT IN (SELECT pair_id FROM pair_source)
)
"""
_TRAINED_ON = f"""{_USED}, seen(name) AS (
    SELECT candidate FROM updates JOIN used USING (update_id)
    WHERE role IN ('new', 'replay') AND candidate IS NOT NULL
    UNION SELECT revision_id FROM revision JOIN seen ON parent = name
)
SELECT revision_id FROM revision WHERE revision_id IN seen ORDER BY seq
"""
_REPORTS_ON = f"""{_USED}
SELECT update_id, report FROM updates WHERE update_id IN (SELECT update_id FROM used)
"""


def _json(values: Iterable[str]) -> str:
    return orjson.dumps([*values]).decode()


def _without_words(report: str) -> str:
    found = orjson.loads(report)
    for check in found.get("checks", ()):
        if check.get("name", "").startswith("check "):
            check["words"] = "(removed: the training saw what was forgotten since)"
    return orjson.dumps(found).decode()
