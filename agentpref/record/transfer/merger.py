"""Brings the rows of one database into another, each exactly once by its id.

Goes through a table in batches; each is checked, written and counted in one transaction of the
database that takes it. What is there stays: a row whose id is known changes nothing. A row must be
what a log could have written, hang on messages and runs that are there, and be of nobody who was
forgotten since. Knows nothing of homes' files, keys and tombstones.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import orjson

from agentpref.home import Home
from agentpref.record.database import insert_or_ignore, require_known_schema, transaction
from agentpref.record.ingest.checks import row_fault
from agentpref.record.messages import (
    COMPARISON_COLUMNS,
    FEEDBACK_COLUMNS,
    RUN_COLUMNS,
    TOOLS,
)
from agentpref.record.transfer.carrier import Carrier
from agentpref.record.transfer.foreign import Foreign
from agentpref.types import Progress

BATCH = 2_000
"""Rows of one table that are written in one transaction at most."""

NAMED = 100
"""Rows that were not let in and are named, at most; all are counted."""

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row]
Fault: TypeAlias = Callable[[Row], str | None]


class Refusal(NamedTuple):
    """A row that was not let in, and why."""

    table: str
    key: str
    why: str


@dataclass(slots=True)
class Counts:
    """What became of the rows of one table.

    ``conflicts`` have the id of another row, which was here first and stays. ``forgotten`` are of
    somebody who was forgotten since, or were said of what is.
    """

    added: int = 0
    known: int = 0
    conflicts: int = 0
    forgotten: int = 0
    refused: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of all rows. ``named`` are the first that were refused or in conflict."""

    messages: Counts = field(default_factory=Counts)
    runs: Counts = field(default_factory=Counts)
    feedback: Counts = field(default_factory=Counts)
    comparisons: Counts = field(default_factory=Counts)
    named: list[Refusal] = field(default_factory=list)


class _Kind(NamedTuple):
    """A table: how a row is known, and what is wrong with one by itself."""

    table: str
    key: str
    columns: tuple[str, ...]
    fault: Fault


_RUN = _Kind("run", "run_id", RUN_COLUMNS, row_fault)
_FEEDBACK = _Kind("feedback", "feedback_id", FEEDBACK_COLUMNS, row_fault)
_COMPARISON = _Kind("comparison", "comparison_id", COMPARISON_COLUMNS, row_fault)


class Merger:
    """Brings what ``source`` holds into ``target``, the open database of ``home``."""

    def __init__(
        self, source: Foreign, target: sqlite3.Connection, home: Home, tell: Progress
    ) -> None:
        self.outcome = Outcome()
        self._source, self._target, self._home, self._tell = source, target, home, tell
        self._carrier = Carrier(source, target)

    def add_all(self) -> None:
        """Bring the runs, then what was said of them."""
        outcome = self.outcome
        self._add(_RUN, outcome.runs, self._add_runs)
        self._add(_FEEDBACK, outcome.feedback, self._add_feedback)
        self._add(_COMPARISON, outcome.comparisons, self._add_comparisons)

    def _add(self, kind: _Kind, counts: Counts, add: Callable[[Rows], None]) -> None:
        for rows in self._batches(kind):
            with transaction(self._target):
                require_known_schema(self._target, self._home)
                add(self._fresh(kind, counts, rows))

    def _batches(self, kind: _Kind) -> Iterator[Rows]:
        """Read a table in the order in which it was written."""
        ((last,),) = self._source.read(f"SELECT max(rowid) FROM {kind.table}")
        names = ", ".join(kind.columns)
        query = f"SELECT rowid, {names} FROM {kind.table} WHERE rowid > ? ORDER BY rowid LIMIT ?"
        done = -(2**63)
        while batch := self._source.read(query, (done, BATCH)):
            done = batch[-1][0]
            yield [dict(zip(kind.columns, values, strict=True)) for _, *values in batch]
            self._tell(kind.table, done, last)

    def _fresh(self, kind: _Kind, counts: Counts, rows: Rows) -> Rows:
        """Keep the rows that are new, what a log could have written, and of nobody forgotten."""
        there = self._there(kind, rows)
        fresh = []
        for row in rows:
            known = there.get(row[kind.key])
            if known is None:
                fresh.append(row)
            elif known == tuple(row.values()):
                counts.known += 1
            else:
                counts.conflicts += 1
                self._name(
                    kind.table, row[kind.key], "a row with this id was here first, and stays"
                )
        sound = self._without_faults(kind, counts, fresh, kind.fault)
        forgotten = self._forgotten(sound)
        return self._without(counts, sound, lambda row: _is_of(forgotten, row))

    def _add_runs(self, rows: Rows) -> None:
        self._carrier.look_at(id for row in rows for id in _messages_of(row))
        self._take(_RUN, self.outcome.runs, rows, self._run_fault)

    def _add_feedback(self, rows: Rows) -> None:
        runs = self._runs(row["run_id"] for row in rows)
        gone = self._gone({row["run_id"] for row in rows} - runs.keys())
        rows = self._without(self.outcome.feedback, rows, lambda row: row["run_id"] in gone)
        self._carrier.look_at(id for row in rows for id in _messages_of(row))

        def fault(row: Row) -> str | None:
            if row["run_id"] not in runs:
                return f"its run {row['run_id']} is not there"
            (correction, (_, prompt)) = (row["correction"], runs[row["run_id"]])
            return correction and self._answer_fault(prompt, correction, "correction")

        self._take(_FEEDBACK, self.outcome.feedback, rows, fault)

    def _add_comparisons(self, rows: Rows) -> None:
        both = {id for row in rows for id in (row["run_a"], row["run_b"])}
        runs = self._runs(both)
        gone = self._gone(both - runs.keys())
        counts = self.outcome.comparisons
        rows = self._without(counts, rows, lambda row: bool(gone & {row["run_a"], row["run_b"]}))

        def fault(row: Row) -> str | None:
            for id in (row["run_a"], row["run_b"]):
                if id not in runs:
                    return f"its run {id} is not there"
            alike = runs[row["run_a"]] == runs[row["run_b"]]
            return None if alike else "its runs are of different prompts or namespaces"

        self._take(_COMPARISON, counts, rows, fault)

    def _take(self, kind: _Kind, counts: Counts, rows: Rows, fault: Fault) -> None:
        """Write the rows that have no fault, with the messages that they hang on."""
        kept = self._without_faults(kind, counts, rows, fault)
        self._carrier.bring(id for row in kept for id in _messages_of(row))
        values = [tuple(row.values()) for row in kept]
        insert_or_ignore(self._target, kind.table, kind.columns, values)
        counts.added += len(kept)
        self._count_messages()

    def _run_fault(self, row: Row) -> str | None:
        if why := self._carrier.fault(row["prompt"]):
            return why
        if self._carrier.place(row["prompt"]).role == TOOLS:
            return "its prompt has no message"
        return self._answer_fault(row["prompt"], row["output"], "output")

    def _answer_fault(self, prompt: str, answer: str, what: str) -> str | None:
        if why := self._carrier.fault(answer):
            return why
        place = self._carrier.place(answer)
        if place.parent == prompt and place.role == "assistant":
            return None
        return f"its {what} {answer} is no answer to its prompt"

    def _without_faults(self, kind: _Kind, counts: Counts, rows: Rows, fault: Fault) -> Rows:
        kept = []
        for row in rows:
            why = fault(row)
            if why is None:
                kept.append(row)
            else:
                counts.refused += 1
                self._name(kind.table, row[kind.key], why)
        return kept

    def _without(self, counts: Counts, rows: Rows, is_forgotten: Callable[[Row], bool]) -> Rows:
        kept = [row for row in rows if not is_forgotten(row)]
        counts.forgotten += len(rows) - len(kept)
        return kept

    def _there(self, kind: _Kind, rows: Rows) -> dict[Any, tuple[Any, ...]]:
        keys = [row[kind.key] for row in rows if isinstance(row[kind.key], str)]
        query = (
            f"SELECT {', '.join(kind.columns)} FROM {kind.table}"
            f" WHERE {kind.key} IN (SELECT value FROM json_each(?))"
        )
        at = kind.columns.index(kind.key)
        return {row[at]: row for row in self._target.execute(query, (_json(keys),))}

    def _runs(self, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Look up the namespace and the prompt of runs that the target has."""
        query = (
            "SELECT run_id, namespace, prompt FROM run"
            " WHERE run_id IN (SELECT value FROM json_each(?))"
        )
        rows = self._target.execute(query, (_json({*ids}),))
        return {id: (namespace, prompt) for id, namespace, prompt in rows}

    def _gone(self, ids: Collection[str]) -> set[str]:
        """Say which runs of the source were not let in since their user was forgotten."""
        query = (
            "SELECT run_id, user_id, created_at FROM run"
            " WHERE run_id IN (SELECT value FROM json_each(?))"
        )
        names = ("run_id", "user_id", "created_at")
        found = self._source.read(query, (_json(ids),))
        rows = [dict(zip(names, row, strict=True)) for row in found]
        sound = [row for row in rows if _has_user_and_time(row)]
        forgotten = self._forgotten(sound)
        return {row["run_id"] for row in sound if _is_of(forgotten, row)}

    def _forgotten(self, rows: Rows) -> dict[str, float]:
        users = {row["user_id"] for row in rows} - {None}
        query = (
            "SELECT user_id, at FROM forgotten WHERE user_id IN (SELECT value FROM json_each(?))"
        )
        return dict(self._target.execute(query, (_json(users),)))

    def _count_messages(self) -> None:
        counts, refused = self.outcome.messages, self._carrier.refused
        for id in [*refused][counts.refused :]:
            self._name("message", id, refused[id])
        counts.added, counts.refused = self._carrier.added, len(refused)

    def _name(self, table: str, key: object, why: str) -> None:
        if len(self.outcome.named) < NAMED:
            self.outcome.named.append(Refusal(table, str(key), why))


def _messages_of(row: Row) -> Iterator[str]:
    """Name the messages that a run or feedback hangs on itself."""
    for name in ("prompt", "output", "correction"):
        if row.get(name) is not None:
            yield row[name]


def _has_user_and_time(row: Row) -> bool:
    return isinstance(row["user_id"], str) and isinstance(row["created_at"], float)


def _is_of(forgotten: Mapping[str, float], row: Row) -> bool:
    return bool(row["created_at"] <= forgotten.get(row["user_id"], -math.inf))


def _json(ids: Collection[str]) -> str:
    return orjson.dumps([*ids]).decode()
