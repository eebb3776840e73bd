"""What a home holds, counted without reading it all.

Runs are counted many at a time, behind their writing: :func:`catch_up` counts those that are not
counted yet, and the readers here add them, so that their answers are right at any time and only
sooner where somebody caught up. All else the database counts by itself (see the step ``tallies``).
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from agentpref.record.database import transaction

LAG = 2_000
"""Runs that a busy writer lets wait before it counts them: they cost a reader 3 ms."""

AT_ONCE = 20_000
"""Runs that are counted in one transaction at most: some 50 ms of work."""


class Scale(NamedTuple):
    """What the scores of one key look like that one kind of source gave, corrections aside."""

    key: str
    source: str
    scores: int
    negative: int
    """How many are below 0."""
    beyond: int
    """How many are below -1 or above 1."""


def catch_up(connection: sqlite3.Connection, *, lag: int = 1, limit: int = AT_ONCE) -> bool:
    """Count the oldest runs that are not counted, ``limit`` at most; say whether any is left.

    Where fewer than ``lag`` wait (or seem to: removed ones may be taken for waiting), nothing is
    done, which costs 10 µs.
    """
    with transaction(connection):
        newest, counted = connection.execute(_ENDS).fetchone()
        if newest - counted < lag:
            return False
        upto, last = connection.execute(_LAST_OF, {"limit": limit}).fetchone()
        for statement in _COUNT:
            connection.execute(statement, {"upto": upto})
        connection.execute("UPDATE counted SET last = ?", (last,))
    return bool(upto < newest)


def namespaces(connection: sqlite3.Connection) -> list[str]:
    """Name the namespaces that have runs, in alphabetical order."""
    return [name for (name,) in connection.execute(_NAMESPACES)]


def stats(connection: sqlite3.Connection, namespace: str | None) -> dict[str, Any]:
    """Count what a namespace holds, or the whole home; see ``Reader.stats``."""
    query = _STATS_OF_HOME if namespace is None else _STATS_OF_NAMESPACE
    cursor = connection.execute(query, {"namespace": namespace})
    names = [column[0] for column in cursor.description]
    return dict(zip(names, cursor.fetchone(), strict=True))


def scales(connection: sqlite3.Connection, namespace: str) -> list[Scale]:
    """Say what the scores look like that the runs of a namespace were given."""
    query = f"SELECT {', '.join(Scale._fields)} FROM scale WHERE namespace = ? AND scores > 0"
    return [Scale(*row) for row in connection.execute(query, (namespace,))]


_COUNTED = "coalesce((SELECT run.rowid FROM counted JOIN run ON run_id = last), 0)"
_NEW = f"FROM run NOT INDEXED WHERE rowid > {_COUNTED}"

_ENDS = f"SELECT coalesce((SELECT max(rowid) FROM run), 0), {_COUNTED}"
_LAST_OF = f"""
SELECT * FROM (SELECT rowid AS number, run_id {_NEW} ORDER BY rowid LIMIT :limit)
ORDER BY number DESC LIMIT 1
"""


def _members(table: str, key: str) -> str:
    return f"""
    INSERT INTO {table} ({key}, namespace, runs)
    SELECT {key}, namespace, count(*) {_NEW} AND rowid <= :upto AND {key} IS NOT NULL
    GROUP BY {key}, namespace
    ON CONFLICT ({key}, namespace) DO UPDATE SET runs = runs + excluded.runs
    """


_COUNT = (
    f"""
    INSERT INTO tally (namespace, runs)
    SELECT namespace, count(*) {_NEW} AND rowid <= :upto GROUP BY namespace
    ON CONFLICT (namespace) DO UPDATE SET runs = runs + excluded.runs
    """,
    _members("thread", "thread_id"),
    _members("asker", "user_id"),
)

_NAMESPACES = f"""
SELECT namespace FROM tally WHERE runs > 0 UNION SELECT namespace {_NEW} ORDER BY namespace
"""


def _statement(*, whole: bool) -> str:
    """One statement, since two would see two states of a home that others write to."""
    this = "true" if whole else "namespace = :namespace"
    known = "true" if whole else "known.namespace = :namespace"

    def members(table: str, key: str, count: str) -> str:
        return f"""(SELECT coalesce(sum({count}), 0) FROM tally WHERE {this})
        + (SELECT count(DISTINCT {key}) FROM new WHERE NOT EXISTS (
            SELECT 1 FROM {table} AS known WHERE known.{key} = new.{key} AND {known}))"""

    def total(count: str) -> str:
        return f"(SELECT coalesce(sum({count}), 0) FROM tally WHERE {this})"

    def extreme(function: str) -> str:
        return f"""(SELECT {function}((
            SELECT {function}(created_at) FROM run WHERE run.namespace = name.namespace))
            FROM name)"""

    return f"""
    WITH new AS (SELECT namespace, thread_id, user_id {_NEW} AND {this}),
    name AS (
        SELECT namespace FROM tally WHERE runs > 0 AND {this} UNION SELECT namespace FROM new)
    SELECT {total("runs")} + (SELECT count(*) FROM new) AS runs,
        {members("thread", "thread_id", "threads")} AS threads,
        {members("asker", "user_id", "users")} AS users,
        {total("feedback")} AS feedback,
        {total("corrections")} AS corrections,
        {total("comparisons")} AS comparisons,
        {extreme("min")} AS first_at,
        {extreme("max")} AS last_at
    """


_STATS_OF_HOME, _STATS_OF_NAMESPACE = _statement(whole=True), _statement(whole=False)
