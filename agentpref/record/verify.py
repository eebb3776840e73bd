"""What the record can convict itself of.

Reads the whole database once, hashes every message again, and follows every reference. Reports
what does not hold and repairs nothing: preferences are evidence, and evidence is not edited.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from agentpref.record.messages import kept, node_id


class Problem(NamedTuple):
    """One thing that does not hold: the table and key of the row, and what is wrong with it."""

    table: str
    key: str
    what: str


_CHECKS: tuple[tuple[str, str, str], ...] = (
    ("message", "its parent is missing", """
        SELECT m.id FROM message AS m LEFT JOIN message AS p ON p.id = m.parent
        WHERE m.parent IS NOT NULL AND p.id IS NULL"""),
    ("run", "its prompt is missing", """
        SELECT run_id FROM run LEFT JOIN message ON id = prompt WHERE id IS NULL"""),
    ("run", "its output is missing or answers another prompt", """
        SELECT run_id FROM run LEFT JOIN message ON id = output WHERE parent IS NOT prompt"""),
    ("run", "one of its columns is not JSON", """
        SELECT run_id FROM run WHERE NOT (json_valid(params) AND json_valid(tags)
            AND json_valid(metadata) AND json_valid(coalesce(token_ids, '[]'))
            AND json_valid(coalesce(logprobs, '[]')))"""),
    ("feedback", "its run is missing", """
        SELECT feedback_id FROM feedback LEFT JOIN run USING (run_id) WHERE prompt IS NULL"""),
    ("feedback", "its correction is missing or answers another prompt", """
        SELECT feedback_id FROM feedback JOIN run USING (run_id)
        LEFT JOIN message ON id = correction
        WHERE correction IS NOT NULL AND parent IS NOT prompt"""),
    ("feedback", "its source is not human, model or code", """
        SELECT feedback_id FROM feedback WHERE source NOT IN ('human', 'model', 'code')"""),
    ("feedback", "its value is not JSON", """
        SELECT feedback_id FROM feedback WHERE NOT json_valid(coalesce(value, 'null'))"""),
    ("comparison", "one of its runs is missing, or they are of different prompts", """
        SELECT comparison_id FROM comparison
        LEFT JOIN run AS a ON a.run_id = run_a LEFT JOIN run AS b ON b.run_id = run_b
        WHERE a.prompt IS NULL OR b.prompt IS NULL OR a.prompt <> b.prompt"""),
    ("comparison", "its source is not human, model or code", """
        SELECT comparison_id FROM comparison WHERE source NOT IN ('human', 'model', 'code')"""),
    ("comparison", "its winner is not a, b or tie", """
        SELECT comparison_id FROM comparison WHERE winner NOT IN ('a', 'b', 'tie')"""),
)  # fmt: skip


def problems(connection: sqlite3.Connection) -> Iterator[Problem]:
    """Yield everything that does not hold, pages first, then hashes, then references."""
    for (finding,) in connection.execute("PRAGMA quick_check"):
        if finding != "ok":
            yield Problem("database", "", finding)
    for key, parent, body in connection.execute("SELECT id, parent, body FROM message"):
        if not _is_as_recorded(key, parent, str(body).encode()):
            yield Problem("message", key, "its text is not what was recorded")
    for table, what, query in _CHECKS:
        for (key,) in connection.execute(query):
            yield Problem(table, str(key), what)


def _is_as_recorded(key: str, parent: str | None, text: bytes) -> bool:
    """Hash a message again, by what it says, and compare how that is written.

    No id knows the order of keys. All else of the text has one form; were it free, a key that
    somebody wrote in beside its namesake would be read by one parser and hashed by another.
    """
    try:
        body = orjson.loads(text)
        return kept(body) == text and node_id(parent, body) == key
    except (orjson.JSONDecodeError, TypeError):  # no JSON, or nested too deep to write again
        return False
