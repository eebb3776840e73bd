"""The list of a namespace's examples, which the home keeps so that no update reads everything.

What is said of one prompt decides about the examples of that prompt alone. So the list is brought
up to date prompt by prompt: those that were judged since, and those that lost a judgement. It has
what an update chooses by, and no text; the examples that are chosen are read whole.

Judgements are only ever appended, so those that are new are the last ones: a count says which. A
trigger lowers it where one is deleted, and marks the prompt as stale. A list that another program
changed, by its sums, is made anew.
"""

from __future__ import annotations

import sqlite3
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import orjson

from agentpref.prefer.examples import as_asked, sort_out, split_point
from agentpref.record.database import transaction
from agentpref.record.messages import as_json
from agentpref.record.standards import Standards
from agentpref.record.store import Store
from agentpref.record.sums import LISTED, counted, difference, resum
from agentpref.types import Example, Origin

T = TypeVar("T")

_RULES = 4
"""Counts changes of the rules that make examples of judgements; each makes all lists anew."""

_PROMPTS_AT_ONCE = 500
_JUDGEMENTS_AT_ONCE = 20_000


class Entry(NamedTuple):
    """An example in the list; ``number`` finds it in the home."""

    example_id: str
    namespace: str
    created_at: float
    origin: Origin
    tag: str
    lone: bool
    held_out: bool
    number: int


class Catalog:
    """The examples of one namespace, listed. Only the holder of the update's lock may refresh it.

    Args:
        connection: the home's database.
        namespace: whose examples to list.
        held_out: the share of prompts, from 0 to 1, that prove adapters and never train them.
    """

    def __init__(self, connection: sqlite3.Connection, namespace: str, *, held_out: float) -> None:
        self._connection, self._store = connection, Store(connection)
        self._namespace, self._share = namespace, held_out

    def refresh(self) -> None:
        """Bring the list up to date.

        It holds no lock for long. If it is ended, the next call goes on.
        """
        standards = self._store.standards(self._namespace)
        self._begin(as_json(standards.to_mapping()))
        while self._mark():
            pass
        query = "SELECT prompt FROM stale_prompt WHERE namespace = ? LIMIT ?"
        while stale := self._column(query, self._namespace, _PROMPTS_AT_ONCE):
            self._list(stale, standards)

    def entries(self) -> list[Entry]:
        """List all examples: pairs, then lone thumbs, each sorted by time."""
        query = """SELECT example_id, created_at, origin, tag, lone, point, number FROM example
            WHERE namespace = ? ORDER BY lone, created_at, example_id"""
        found = self._connection.execute(query, (self._namespace,))
        return [
            Entry(
                example_id,
                self._namespace,
                created_at,
                sys.intern(origin),  # type: ignore[arg-type]
                sys.intern(tag),
                bool(lone),
                point < self._share,
                number,
            )
            for example_id, created_at, origin, tag, lone, point, number in found
        ]

    def left_out(self) -> dict[str, int]:
        """Count the rows of feedback and comparisons that made no example, by reason."""
        query = """SELECT reason, sum(judgements) FROM left_out WHERE namespace = ?
            GROUP BY reason ORDER BY reason"""
        return dict(self._connection.execute(query, (self._namespace,)).fetchall())

    def read(self, entries: Sequence[Entry]) -> list[Example]:
        """Read listed examples whole, in order, without those that are gone since."""
        found = self._read("number", [entry.number for entry in entries])
        return [found[entry.example_id] for entry in entries if entry.example_id in found]

    def find(self, example_ids: Collection[str]) -> list[Example]:
        """Read the examples of some ids that are in the list."""
        found = self._read("example_id", example_ids)
        return [found[example_id] for example_id in example_ids if example_id in found]

    def _read(self, column: str, values: Collection[Any]) -> dict[str, Example]:
        query = f"""SELECT DISTINCT prompt FROM example
            WHERE +namespace = ? AND {column} IN (SELECT value FROM json_each(?))"""
        prompts = self._column(query, self._namespace, as_json([*values]))
        standards = self._store.standards(self._namespace)
        return {
            example.example_id: example
            for some in _parts(prompts, _PROMPTS_AT_ONCE)
            for example in self._build(some, standards).examples
        }

    def _begin(self, standards: str) -> None:
        """Start the list, or start it anew where other rules made it or its counts are wrong."""
        self._require_unchanged()
        query = "SELECT rules, scales FROM listing WHERE namespace = ?"
        made_by = self._connection.execute(query, (self._namespace,)).fetchone()
        if made_by is not None and made_by[0] == _RULES and self._is_possible():
            if made_by[1] != standards:
                self._mark_read_anew(made_by[1], standards)
            return
        with self._changing(*LISTED):
            for table in ("example", "left_out", "judged_run", "stale_prompt"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE namespace = ?", (self._namespace,)
                )
            self._connection.execute(
                "INSERT OR REPLACE INTO listing (namespace, feedback, comparisons, scales, rules)"
                " VALUES (?, 0, 0, ?, ?)",
                (self._namespace, standards, _RULES),
            )

    def _require_unchanged(self) -> None:
        """Empty the lists of all namespaces if any was changed: nobody can say which."""
        with self._store.one_state():
            if not any(difference(self._connection, table) for table in LISTED):
                return
        with transaction(self._connection):
            for table in LISTED:
                self._connection.execute(f"DELETE FROM {table}")
            resum(self._connection, LISTED)

    @contextmanager
    def _changing(self, *tables: str) -> Iterator[None]:
        """Change rows of this namespace in a block, in a transaction, and keep their sums."""
        own = (self._namespace,)
        with (
            transaction(self._connection),
            counted(self._connection, *tables, where="namespace = ?", values=own),
        ):
            yield

    def _is_possible(self) -> bool:
        """Whether the counts can be true: the home has not fewer judgements than were listed."""
        query = """SELECT (SELECT count(*) FROM feedback) >= feedback
            AND (SELECT count(*) FROM comparison) >= comparisons FROM listing WHERE namespace = ?"""
        (is_possible,) = self._connection.execute(query, (self._namespace,)).fetchone()
        return bool(is_possible)

    def _mark_read_anew(self, before: str, after: str) -> None:
        """Mark the prompts whose judgements are read by other standards than they were."""
        was, now = orjson.loads(before), orjson.loads(after)
        scales = {tuple(one) for one in was["scales"]} ^ {tuple(one) for one in now["scales"]}
        sources = {(key, source) for key, source, *_ in scales}
        voters = {*was["judges"], *now["judges"]}
        voters = {one for one in voters if was["judges"].get(one) != now["judges"].get(one)}
        mark = """INSERT OR IGNORE INTO stale_prompt SELECT DISTINCT namespace, prompt FROM run
            WHERE namespace = ? AND run_id IN"""
        with self._changing("stale_prompt", "listing"):
            self._connection.executemany(
                f"{mark} (SELECT run_id FROM feedback WHERE key = ? AND source = ?)",
                [(self._namespace, *source) for source in sorted(sources)],
            )
            if voters:
                by_them = "source = 'model' AND user_id IN (SELECT value FROM json_each(?2))"
                self._connection.execute(
                    f"{mark.replace('?', '?1')} (SELECT run_id FROM feedback WHERE {by_them}"
                    f" UNION SELECT run_a FROM comparison WHERE {by_them})",
                    (self._namespace, as_json(sorted(voters))),
                )
            self._connection.execute(
                "UPDATE listing SET scales = ? WHERE namespace = ?", (after, self._namespace)
            )

    def _mark(self) -> bool:
        """Mark the prompts of some judgements that came in since; return whether there were any."""
        with transaction(self._connection):
            query = """SELECT (SELECT count(*) FROM feedback) - feedback,
                (SELECT count(*) FROM comparison) - comparisons FROM listing WHERE namespace = ?"""
            new = self._connection.execute(query, (self._namespace,)).fetchone()
            some = [max(0, min(count, _JUDGEMENTS_AT_ONCE)) for count in new]
            if not any(some):
                return False
            names = ("namespace", "feedback", "comparisons", "some_feedback", "some_comparisons")
            values = dict(zip(names, (self._namespace, *new, *some), strict=True))
            for statement in _JUDGED_NOW.split(";"):
                self._connection.execute(statement, values)
            some_prompts = "prompt IN (SELECT prompt FROM judged_now) AND namespace = ?"
            of_them = counted(
                self._connection, "judged_run", "stale_prompt",
                where=some_prompts, values=(self._namespace,),
            )  # fmt: skip
            with of_them, self._changing("listing"):
                for statement in _MARK.split(";"):
                    self._connection.execute(statement, values)
            self._connection.execute("DROP TABLE judged_now")
        return True

    def _list(self, prompts: Sequence[str], standards: Standards) -> None:
        """List the examples of some prompts anew."""
        built = self._build(prompts, standards)
        these = (self._namespace, as_json([*prompts]))
        changed = ("example", "left_out", "stale_prompt")
        of_them = "namespace = ? AND prompt IN (SELECT value FROM json_each(?))"
        with (
            transaction(self._connection),
            counted(self._connection, *changed, where=of_them, values=these),
        ):
            for table in changed:
                self._connection.execute(f"DELETE FROM {table} WHERE {of_them}", these)
            self._connection.executemany(
                "INSERT INTO example (namespace, prompt, example_id, created_at, origin, tag,"
                " lone, point) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (self._namespace, built.prompts[one.prompt.id], *_listed(one))
                    for one in built.examples
                ],
            )
            self._connection.executemany(
                "INSERT INTO left_out (namespace, prompt, reason, judgements) VALUES (?, ?, ?, ?)",
                [(self._namespace, *which, count) for which, count in built.left_out.items()],
            )

    def _build(self, prompts: Sequence[str], standards: Standards) -> Built:
        """Build the examples of some prompts from all that was said of them."""
        query = """SELECT run_id FROM judged_run
            WHERE namespace = ? AND prompt IN (SELECT value FROM json_each(?))"""
        with self._store.one_state():
            run_ids = self._column(query, self._namespace, as_json([*prompts]))
            return build(self._store, self._namespace, run_ids, standards, self._share)

    def _column(self, query: str, *values: Any) -> list[Any]:
        return [value for (value,) in self._connection.execute(query, values)]


class Built(NamedTuple):
    """Examples; the stored prompt of each asked one; judgements left out, by prompt and reason."""

    examples: Sequence[Example]
    prompts: Mapping[str, str]
    left_out: Mapping[tuple[str, str], int]


def build(
    store: Store, namespace: str, run_ids: Sequence[str], standards: Standards, held_out: float
) -> Built:
    """Build the examples of all judged runs of some prompts. Call it in one state of the store."""
    runs, feedback, comparisons = store.judged(namespace, run_ids)
    examples, reasons = sort_out(
        runs, feedback, comparisons, held_out=held_out, standards=standards
    )
    prompt_of = {run.run_id: run.prompt.id for run in runs}
    said_of = {row.feedback_id: prompt_of[row.run_id] for row in feedback}
    said_of |= {row.comparison_id: prompt_of[row.run_a] for row in comparisons}
    return Built(
        examples,
        {as_asked(run).prompt.id: run.prompt.id for run in runs},
        Counter((said_of[row], reason) for row, reason in reasons.items()),
    )


def _listed(one: Example) -> tuple[Any, ...]:
    point = split_point(one.prompt.messages)
    return one.example_id, one.created_at, one.origin, one.tag, one.lone, point


def _parts(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


# A plus keeps SQLite from reading a whole namespace by the index on it, to find a few runs.
# New judgements are the last ones of their tables. Some of them, the oldest first, name runs, whose
# prompts become stale.
_JUDGED_NOW = """
CREATE TEMP TABLE judged_now AS SELECT namespace, prompt, run_id FROM run WHERE run_id IN (
    SELECT run_id FROM (SELECT rowid AS place, run_id FROM feedback
        ORDER BY place DESC LIMIT :feedback) ORDER BY place LIMIT :some_feedback)
    AND +namespace = :namespace;
INSERT INTO judged_now SELECT namespace, prompt, run_id FROM run WHERE run_id IN (
    WITH some AS (SELECT * FROM (SELECT rowid AS place, run_a, run_b FROM comparison
        ORDER BY place DESC LIMIT :comparisons) ORDER BY place LIMIT :some_comparisons)
    SELECT run_a FROM some UNION SELECT run_b FROM some)
    AND +namespace = :namespace
"""
_MARK = """
INSERT OR IGNORE INTO judged_run SELECT namespace, prompt, run_id FROM judged_now ORDER BY 2, 3;
INSERT OR IGNORE INTO stale_prompt SELECT DISTINCT namespace, prompt FROM judged_now ORDER BY 2;
UPDATE listing SET feedback = feedback + :some_feedback,
    comparisons = comparisons + :some_comparisons WHERE namespace = :namespace
"""
