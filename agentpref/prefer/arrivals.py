"""How many new pairs a home has, asked every few seconds.

New are the examples that the list of a namespace (:mod:`agentpref.prefer.catalog`) does not have
yet. Every update brings the list up to date, whatever its verdict, so these came in since the last
update. To read or to change the list would take the update's lock and time that grows with the
home. So this builds the examples of the prompts that were judged since, and nothing else: it only
reads, and a look costs what came in since the look before.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from agentpref.prefer.catalog import build
from agentpref.record.messages import as_json
from agentpref.record.store import Store

_AT_ONCE = 2_000
"""Judgements that are read at once: so much may be read beyond what was wanted."""


class _Place(NamedTuple):
    """Row ids of the last judgements that were read."""

    feedback: int
    comparison: int


class Arrivals:
    """Counts the new examples of one namespace: pairs, and thumbs that are in no pair.

    It remembers what it has read. When an update has listed it, or somebody was forgotten, it
    begins again with what is left.

    Args:
        namespace: whose examples to count.
        held_out: the share of prompts that is held out; these count too.
    """

    def __init__(self, namespace: str, *, held_out: float) -> None:
        self._namespace, self._share = namespace, held_out
        self._listed: tuple[int, int] | None = None  # what the list has seen, when counting began
        self._place = _Place(0, 0)
        self._runs: dict[str, set[str]] = defaultdict(set)  # judged since, by their prompt
        self._new: dict[str, int] = {}  # examples by the prompt of their runs

    def count(self, connection: sqlite3.Connection, enough: int) -> int:
        """How many examples are new. From ``enough`` on it does not read on, and may say less."""
        with Store(connection).one_state():
            self._follow_the_list(connection)
            while (found := sum(self._new.values())) < enough and self._read_some(connection):
                pass
        return found

    def _follow_the_list(self, connection: sqlite3.Connection) -> None:
        """Begin again where the list is not what it was."""
        query = "SELECT feedback, comparisons FROM listing WHERE namespace = ?"
        listed = connection.execute(query, (self._namespace,)).fetchone() or (0, 0)
        if listed != self._listed:
            self._listed = listed
            self._runs.clear()
            self._new.clear()
            self._place = _Place(
                _after(connection, "feedback", listed[0]),
                _after(connection, "comparison", listed[1]),
            )

    def _read_some(self, connection: sqlite3.Connection) -> bool:
        """Count the examples of the prompts of some judgements; return whether there were any."""
        values = {"namespace": self._namespace, "limit": _AT_ONCE, **self._place._asdict()}
        rows = connection.execute(_JUDGED_SINCE, values).fetchall()
        for table, number, run_id, prompt in rows:
            self._place = self._place._replace(**{table: max(number, getattr(self._place, table))})
            if prompt is not None:  # else it is of another namespace
                self._runs[prompt].add(run_id)
        prompts = sorted({prompt for *_, prompt in rows if prompt is not None})
        self._count_anew(connection, prompts)
        return bool(rows)

    def _count_anew(self, connection: sqlite3.Connection, prompts: Sequence[str]) -> None:
        """Count the examples of some prompts that are not in the list."""
        these = (self._namespace, as_json(prompts))
        listed = {name for (name,) in connection.execute(_LISTED, these)}
        judged = {run_id for (run_id,) in connection.execute(_JUDGED_BEFORE, these)}
        judged.update(*(self._runs[prompt] for prompt in prompts))
        store = Store(connection)
        standards = store.standards(self._namespace)
        built = build(store, self._namespace, sorted(judged), standards, self._share)
        self._new |= dict.fromkeys(prompts, 0)
        for one in built.examples:
            if one.example_id not in listed:
                self._new[built.prompts[one.prompt.id]] += 1


def _after(connection: sqlite3.Connection, table: str, listed: int) -> int:
    """The row id of the last judgement that the list has seen: the others are the last ones."""
    (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    query = f"SELECT rowid FROM {table} ORDER BY rowid DESC LIMIT 1 OFFSET ?"
    found = connection.execute(query, (max(0, count - listed),)).fetchone()
    return int(found[0]) if found is not None else 0


_LISTED = """SELECT example_id FROM example
    WHERE namespace = ? AND prompt IN (SELECT value FROM json_each(?))"""
_JUDGED_BEFORE = """SELECT run_id FROM judged_run
    WHERE namespace = ? AND prompt IN (SELECT value FROM json_each(?))"""
# A plus keeps SQLite from reading a whole namespace by the index on it, to find a few runs.
_JUDGED_SINCE = """
WITH said(name, number, judged) AS (
    SELECT * FROM (SELECT 'feedback', rowid, run_id FROM feedback
        WHERE rowid > :feedback ORDER BY rowid LIMIT :limit)
    UNION ALL SELECT * FROM (SELECT 'comparison', rowid, run_a FROM comparison
        WHERE rowid > :comparison ORDER BY rowid LIMIT :limit)
    UNION ALL SELECT * FROM (SELECT 'comparison', rowid, run_b FROM comparison
        WHERE rowid > :comparison ORDER BY rowid LIMIT :limit)
)
SELECT name, number, run_id, prompt FROM said
LEFT JOIN run ON run_id = judged AND +namespace = :namespace
"""
