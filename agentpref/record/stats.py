"""Counts of what a home holds, as plain queries that run when asked.

On a home of 700,000 runs and 50,000 judgements a count of everything takes half a second, and the
scales .05 s. The log counts nothing while it writes.
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple


class Scale(NamedTuple):
    """The scores of one key that one kind of source gave, without corrections.

    ``scores`` is how many there are, ``negative`` how many are below 0, and ``beyond`` how many are
    below -1 or above 1.
    """

    key: str
    source: str
    scores: int
    negative: int
    beyond: int


def namespaces(connection: sqlite3.Connection) -> list[str]:
    """Name the namespaces that have runs, in alphabetical order."""
    query = "SELECT DISTINCT namespace FROM run ORDER BY namespace"
    return [name for (name,) in connection.execute(query)]


def stats(connection: sqlite3.Connection, namespace: str | None) -> dict[str, Any]:
    """Count what a namespace holds, or the whole home; see ``Store.stats``."""
    this = "true" if namespace is None else "namespace = :namespace"
    cursor = connection.execute(_STATS.format(this=this), {"namespace": namespace})
    return dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))


def scales(connection: sqlite3.Connection, namespace: str) -> list[Scale]:
    """Describe the scores that the runs of a namespace were given, in any order."""
    return [Scale(*row) for row in connection.execute(_SCALES, {"namespace": namespace})]


_STATS = """
SELECT runs, threads, users, feedback, corrections, comparisons, first_at, last_at FROM
    (SELECT count(*) AS runs, count(DISTINCT thread_id) AS threads,
        count(DISTINCT user_id) AS users, min(created_at) AS first_at, max(created_at) AS last_at
    FROM run WHERE {this}),
    (SELECT count(*) AS feedback, count(correction) AS corrections
    FROM feedback CROSS JOIN run USING (run_id) WHERE {this}),
    (SELECT count(*) AS comparisons FROM comparison CROSS JOIN run ON run_id = run_a WHERE {this})
"""
# One statement, because two would see two states of a home that others write to. CROSS JOIN makes
# SQLite go through the judgements and look up their runs: there are far fewer of them.

_SCALES = """
SELECT key, source, count(*), sum(score < 0), sum(abs(score) > 1)
FROM feedback CROSS JOIN run USING (run_id)
WHERE namespace = :namespace AND score IS NOT NULL AND correction IS NULL
GROUP BY key, source
"""
