"""Builds the examples of a namespace prompt by prompt, in bounded memory and without writing.

What is said of one prompt decides about the examples of that prompt alone. So a few hundred prompts
are built at a time. In which order is kept in a temporary database, which is on the disk once it
is large, and which no reader of the home waits for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from operator import attrgetter, itemgetter

from agentpref.prefer.examples import sort_out
from agentpref.record.pages import Selection
from agentpref.record.store import Store
from agentpref.types import Example

PROMPTS_AT_ONCE = 200

# CROSS JOIN makes SQLite go through the judgements: there are far fewer of them than of runs.
_JUDGED = """
WITH said(run_id, at) AS (
    SELECT run_id, created_at FROM feedback
    UNION ALL SELECT run_a, created_at FROM comparison
    UNION ALL SELECT run_b, created_at FROM comparison
), judged(run_id, prompt, at) AS (
    SELECT run.run_id, prompt, max(at) FROM said CROSS JOIN run USING (run_id)
    WHERE namespace = :namespace GROUP BY run.run_id
), ordered(run_id, prompt, newest) AS (
    SELECT run_id, prompt, max(at) OVER (PARTITION BY prompt) FROM judged
)
SELECT run_id, prompt, newest FROM ordered WHERE :since IS NULL OR newest >= :since
ORDER BY newest, prompt
"""
_ORDER = """CREATE TABLE judged (
    number INTEGER NOT NULL, run_id TEXT NOT NULL, newest REAL NOT NULL,
    PRIMARY KEY (number, run_id)
) WITHOUT ROWID"""


def walk_pairs(
    connection: sqlite3.Connection, which: Selection, held_out: float, *, lone: bool = False
) -> Iterator[Example]:
    """Build the pairs of a namespace, in the order in which their prompts were last judged.

    Args:
        connection: the home's database.
        which: ``tag`` is the pair's own, ``limit`` counts the newest pairs, which then come in the
            order of their time.
        held_out: the share of prompts, from 0 to 1, that prove adapters and never train them.
        lone: whether lone thumbs come, too.
    """
    with closing(sqlite3.connect("", check_same_thread=False)) as order:
        order.execute(_ORDER)  # a file of no name is a temporary database
        count = _number_prompts(connection, which, order)
        standards = Store(connection).standards(which.namespace)

        def build(start: int) -> list[Example]:
            query = "SELECT run_id FROM judged WHERE number >= ? AND number < ?"
            run_ids = [name for (name,) in order.execute(query, (start, start + PROMPTS_AT_ONCE))]
            store = Store(connection)
            with store.one_state():
                judged = store.judged(which.namespace, run_ids)
            examples, _ = sort_out(*judged, held_out=held_out, standards=standards)
            return [one for one in examples if _is_wanted(one, which, lone)]

        starts = range(0, count, PROMPTS_AT_ONCE)
        if which.limit is None:
            for start in starts:
                yield from build(start)
            return
        newest: list[Example] = []
        for start in reversed(starts):
            newest += build(start)
            newest = sorted(newest, key=attrgetter("created_at", "example_id"))
            newest = newest[max(0, len(newest) - which.limit) :]
            query = "SELECT max(newest) FROM judged WHERE number < ?"
            (before,) = order.execute(query, (start,)).fetchone()
            # No pair is newer than the last judgement of its prompt.
            is_full = len(newest) == which.limit
            if before is None or (is_full and (not newest or before < newest[0].created_at)):
                break
        yield from newest


def _number_prompts(
    connection: sqlite3.Connection, which: Selection, order: sqlite3.Connection
) -> int:
    """Number the judged prompts in the order of their last judgement, and count them."""
    judged = connection.execute(_JUDGED, {"namespace": which.namespace, "since": which.since})
    number = -1

    def numbered() -> Iterator[tuple[int, str, float]]:
        nonlocal number
        for _, rows in groupby(judged, key=itemgetter(1)):
            number += 1
            yield from ((number, run_id, newest) for run_id, _, newest in rows)

    order.executemany("INSERT INTO judged VALUES (?, ?, ?)", numbered())
    return number + 1


def _is_wanted(one: Example, which: Selection, lone: bool) -> bool:
    if (one.lone and not lone) or which.tag not in (None, one.tag):
        return False
    return which.since is None or one.created_at >= which.since
