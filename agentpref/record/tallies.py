"""What a home holds, counted without reading it all.

Rows are counted many at a time, behind their writing: :func:`catch_up` counts those that are not
counted yet, and the readers here add them, so that their answers are right at any time and only
sooner where somebody caught up. What goes, the database takes off by itself (see the step
``tallies``).
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from agentpref.record.database import transaction
from agentpref.record.tally_schema import additions, counted

LAG = 2_000
"""Rows that a busy writer lets wait before it counts them: they cost a reader some milliseconds."""

AT_ONCE = 20_000
"""Rows of a table that are counted in one transaction at most: some 50 ms of work."""


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
    """Count the oldest rows that are not counted, ``limit`` of a table at most; is any left?

    Where fewer than ``lag`` wait (or seem to: removed ones may be taken for waiting), nothing is
    done, which costs some microseconds.
    """
    with transaction(connection):
        left = [_count(connection, table, lag, limit) for table in _ADDITIONS]
    return any(left)


def _count(connection: sqlite3.Connection, table: str, lag: int, limit: int) -> bool:
    newest, since = connection.execute(_ENDS[table]).fetchone()
    if newest - since < lag:
        return False
    upto, last = connection.execute(_LAST_OF[table], {"since": since, "limit": limit}).fetchone()
    for statement in _ADDITIONS[table]:
        connection.execute(statement, {"since": since, "upto": upto})
    connection.execute("UPDATE counted SET last = ? WHERE what = ?", (last, table))
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
    """Say what the scores look like that the runs of a namespace were given, in any order."""
    return [Scale(*row) for row in connection.execute(_SCALES, {"namespace": namespace})]


_ADDITIONS = additions("{table}.rowid > :since AND {table}.rowid <= :upto")

_ENDS = {
    table: f"SELECT coalesce((SELECT max(rowid) FROM {table}), 0), {counted(table)}"
    for table in _ADDITIONS
}

_LAST_OF = {
    table: f"""
    SELECT * FROM (
        SELECT rowid AS number, {table}_id FROM {table} WHERE rowid > :since
        ORDER BY rowid LIMIT :limit)
    ORDER BY number DESC LIMIT 1
    """
    for table in _ADDITIONS
}

_NEW_RUNS = f"FROM run NOT INDEXED WHERE rowid > {counted('run')}"
_NEW_FEEDBACK = f"""FROM feedback NOT INDEXED CROSS JOIN run ON run.run_id = feedback.run_id
WHERE feedback.rowid > {counted("feedback")}"""
_NEW_COMPARISONS = f"""FROM comparison NOT INDEXED CROSS JOIN run ON run.run_id IN ({{runs}})
WHERE comparison.rowid > {counted("comparison")}"""

_NAMESPACES = f"""
SELECT namespace FROM tally WHERE runs > 0 UNION SELECT namespace {_NEW_RUNS} ORDER BY namespace
"""

_SCALES = f"""
SELECT key, source, sum(scores), sum(negative), sum(beyond) FROM (
    SELECT key, source, scores, negative, beyond FROM scale WHERE namespace = :namespace
    UNION ALL
    SELECT key, source, 1, score < 0, abs(score) > 1 {_NEW_FEEDBACK}
    AND namespace = :namespace AND score IS NOT NULL AND correction IS NULL)
GROUP BY key, source HAVING sum(scores) > 0
"""

_NEW_JUDGED = f"""
SELECT prompt, run.run_id {_NEW_FEEDBACK} AND namespace = :namespace
UNION
SELECT prompt, run.run_id {_NEW_COMPARISONS.format(runs="run_a, run_b")}
AND namespace = :namespace
"""

JUDGED = f"""
SELECT run_id FROM judged WHERE namespace = :namespace
UNION SELECT run_id FROM ({_NEW_JUDGED})
"""
"""The ids of the runs of ``:namespace`` that something was said of."""

_SPOKEN_OF = """
SELECT prompt FROM feedback CROSS JOIN run USING (run_id)
WHERE feedback.created_at >= :since AND namespace = :namespace
UNION
SELECT prompt FROM comparison CROSS JOIN run ON run_id = run_a
WHERE comparison.created_at >= :since AND namespace = :namespace
"""

JUDGED_SINCE = f"""
SELECT judged.run_id FROM ({_SPOKEN_OF}) AS spoken CROSS JOIN judged
ON judged.namespace = :namespace AND judged.prompt = spoken.prompt
UNION SELECT run_id FROM ({_NEW_JUDGED}) WHERE prompt IN ({_SPOKEN_OF})
"""
"""Those among them whose prompts something was said of at ``:since`` or later."""


def _statement(*, whole: bool) -> str:
    """One statement, since two would see two states of a home that others write to."""
    this = "true" if whole else "namespace = :namespace"
    known = "true" if whole else "known.namespace = :namespace"

    def total(count: str) -> str:
        return f"(SELECT coalesce(sum({count}), 0) FROM tally WHERE {this})"

    def members(table: str, key: str, count: str) -> str:
        return f"""{total(count)} + (SELECT count(DISTINCT {key}) FROM new WHERE NOT EXISTS (
            SELECT 1 FROM {table} AS known WHERE known.{key} = new.{key} AND {known}))"""

    def extreme(function: str) -> str:
        return f"""(SELECT {function}((
            SELECT {function}(created_at) FROM run WHERE run.namespace = name.namespace))
            FROM name)"""

    return f"""
    WITH new AS (SELECT namespace, thread_id, user_id {_NEW_RUNS} AND {this}),
    said AS (SELECT count(*) AS feedback, count(correction) AS corrections
        {_NEW_FEEDBACK} AND {this}),
    name AS (
        SELECT namespace FROM tally WHERE runs > 0 AND {this} UNION SELECT namespace FROM new)
    SELECT {total("runs")} + (SELECT count(*) FROM new) AS runs,
        {members("thread", "thread_id", "threads")} AS threads,
        {members("asker", "user_id", "users")} AS users,
        {total("feedback")} + (SELECT feedback FROM said) AS feedback,
        {total("corrections")} + (SELECT corrections FROM said) AS corrections,
        {total("comparisons")}
            + (SELECT count(*) {_NEW_COMPARISONS.format(runs="run_a")} AND {this}) AS comparisons,
        {extreme("min")} AS first_at,
        {extreme("max")} AS last_at
    """


_STATS_OF_HOME, _STATS_OF_NAMESPACE = _statement(whole=True), _statement(whole=False)
