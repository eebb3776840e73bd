"""What the ledger says of examples that do not count now: set aside, or aged out.

An example is *set aside* while the last update that used it as new was refused with it, or passed
without a gain in it. It is *aged out* for a revision whose line learned that people think otherwise
since; it comes back where a later update of the line restored or replayed it.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import orjson

from agentpref.record.messages import as_json


class Refusal(NamedTuple):
    """An update that set examples aside: what it tried, with which settings, and from where."""

    update_id: str
    finished_at: float
    parent: str | None
    report: dict[str, Any]
    examples: frozenset[str]


def is_odd(report: Mapping[str, Any], tag: str) -> bool:
    """Whether an attempt of an update found that nobody can mean what was chosen in a tag.

    Reports of older versions say no more than that the check of the wishes failed.
    """
    return any(
        tag in attempt["odd"]
        if "odd" in attempt
        else any(failed.startswith("wishes:") for failed in attempt.get("failed", ()))
        for attempt in report.get("attempts", ())
    )


def set_aside(connection: sqlite3.Connection, namespace: str) -> list[Refusal]:
    """What is set aside in a namespace, by the update that did it, the oldest first."""
    rows = connection.execute(_SET_ASIDE, {"namespace": namespace})
    found: dict[str, list[str]] = defaultdict(list)
    for pair, update in rows:
        found[update].append(pair)
    query = """SELECT update_id, coalesce(finished_at, created_at), parent, report FROM updates
        WHERE update_id IN (SELECT value FROM json_each(?)) ORDER BY created_at, update_id"""
    updates = connection.execute(query, (as_json([*found]),)).fetchall()
    return [
        Refusal(name, at, parent, orjson.loads(report or "{}"), frozenset(found[name]))
        for name, at, parent, report in updates
    ]


def number_aside(connection: sqlite3.Connection, namespace: str) -> int:
    """How many examples are set aside, of those that there still are."""
    query = f"SELECT count(*) FROM ({_SET_ASIDE}) WHERE pair_id IN (SELECT example_id FROM example)"
    (number,) = connection.execute(query, {"namespace": namespace}).fetchone()
    return int(number)


def aged_out(connection: sqlite3.Connection, revision: str | None) -> set[str]:
    """Ids of the examples that no longer count for a revision."""
    return {pair for (pair,) in connection.execute(_AGED_OUT, {"revision": revision})}


def tried(connection: sqlite3.Connection, namespace: str) -> set[str]:
    """Ids of all examples that some update of a namespace used as new, whatever came of it."""
    query = """SELECT DISTINCT pair_id FROM update_pair JOIN updates USING (update_id)
        WHERE namespace = ? AND role IN ('new', 'held_out', 'set_aside', 'trained_aside')"""
    return {pair for (pair,) in connection.execute(query, (namespace,))}


def sources(connection: sqlite3.Connection, pairs: Collection[str]) -> dict[str, set[str]]:
    """The judgements that examples were made of when updates used them, by the examples' ids."""
    query = """SELECT pair_id, source FROM pair_source
        WHERE pair_id IN (SELECT value FROM json_each(?))"""
    found: dict[str, set[str]] = defaultdict(set)
    for pair, source in connection.execute(query, (as_json([*pairs]),)):
        found[pair].add(source)
    return dict(found)


def judged_since(connection: sqlite3.Connection, pairs: Collection[str], since: float) -> list[str]:
    """Those of some listed examples whose prompt was judged after a time (POSIX seconds)."""
    values = {"pairs": as_json([*pairs]), "since": since}
    return [pair for (pair,) in connection.execute(_JUDGED_SINCE, values)]


def voters(connection: sqlite3.Connection, judgements: Collection[str]) -> dict[str, str | None]:
    """Who said each judgement, by its id: its user, or else that of its run; ``None`` if unknown.

    The names are the home's own, which it keeps in place of the users' ids.
    """
    return dict(connection.execute(_VOTERS, (as_json([*judgements]),)).fetchall())


_SET_ASIDE = """
SELECT pair_id, update_id FROM (
    SELECT pair_id, update_id, role, row_number() OVER (
        PARTITION BY pair_id ORDER BY created_at DESC, update_id DESC) AS place
    FROM update_pair JOIN updates USING (update_id)
    WHERE namespace = :namespace
        AND role IN ('new', 'held_out', 'known', 'set_aside', 'trained_aside')
        AND pair_id IN (
            SELECT pair_id FROM update_pair WHERE role IN ('set_aside', 'trained_aside'))
) WHERE place = 1 AND role IN ('set_aside', 'trained_aside')
"""

_AGED_OUT = """
WITH RECURSIVE line(name) AS (
    SELECT :revision UNION SELECT parent FROM revision JOIN line ON revision_id = name
)
SELECT pair_id FROM (
    SELECT pair_id, role, row_number() OVER (
        PARTITION BY pair_id ORDER BY created_at DESC, update_id DESC) AS place
    FROM update_pair JOIN updates USING (update_id) JOIN line ON candidate = name
    WHERE role IN ('aged_out', 'restored', 'replay')
        AND pair_id IN (SELECT pair_id FROM update_pair WHERE role = 'aged_out')
) WHERE place = 1 AND role = 'aged_out'
"""

_VOTERS = """
WITH wanted AS (SELECT value AS id FROM json_each(?))
SELECT feedback_id, coalesce(feedback.user_id, run.user_id)
FROM wanted JOIN feedback ON feedback_id = id JOIN run USING (run_id)
UNION ALL
SELECT comparison_id, coalesce(comparison.user_id, run.user_id)
FROM wanted JOIN comparison ON comparison_id = id JOIN run ON run_id = run_a
"""

_JUDGED_SINCE = """
SELECT DISTINCT example_id FROM example JOIN judged_run USING (namespace, prompt)
WHERE example_id IN (SELECT value FROM json_each(:pairs)) AND (
    EXISTS (SELECT 1 FROM feedback
        WHERE feedback.run_id = judged_run.run_id AND created_at > :since)
    OR EXISTS (SELECT 1 FROM comparison
        WHERE judged_run.run_id IN (run_a, run_b) AND created_at > :since))
"""
