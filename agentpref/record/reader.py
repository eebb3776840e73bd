"""Runs, feedback and comparisons, read from one open database.

Reads give back whole values, each message parsed once per reading. Writes nothing; one reader has
one user at a time, as its connection has.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import orjson

from agentpref.errors import CorruptHome, UnknownRun
from agentpref.record import tallies
from agentpref.record.integrity import Problem, examine
from agentpref.types import Comparison, Feedback, Message, Prompt, Run


def columns(kind: type[Run | Feedback | Comparison]) -> tuple[str, ...]:
    """Name a table's columns: they are the record's fields, in any order."""
    return tuple(field.name for field in fields(kind))


RUN = columns(Run)
FEEDBACK = columns(Feedback)
COMPARISON = columns(Comparison)


def _select(table: str, columns: Iterable[str]) -> str:
    return f"SELECT {', '.join(f'{table}.{name}' for name in columns)} FROM {table}"


def _select_said(table: str, columns: Iterable[str], run: str, since: float | None) -> str:
    """Select the rows that hang on judged runs, from these: a namespace has far more others."""
    names = ", ".join(f"{table}.{name}" for name in columns)
    judged = tallies.JUDGED if since is None else tallies.JUDGED_SINCE
    return f"SELECT {names} FROM ({judged}) AS judged CROSS JOIN {table} ON {run} = judged.run_id"


class Reader:
    """What a home holds, over a connection of ``database.connect``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Take a connection; whoever opened it closes it."""
        self._connection = connection

    def run(self, run_id: str) -> Run:
        """Read one run.

        Raises:
            UnknownRun: it is not in this home.
        """
        query = f"{_select('run', RUN)} WHERE run_id = ?"
        row = self._connection.execute(query, (run_id,)).fetchone()
        if row is None:
            raise unknown(run_id)
        return _read_run(row, _Messages(self._connection))

    def runs(self, namespace: str) -> Iterator[Run]:
        """Read a namespace's runs, oldest first."""
        query = f"{_select('run', RUN)} WHERE namespace = ? ORDER BY created_at, run_id"
        messages = _Messages(self._connection)
        for row in self._connection.execute(query, (namespace,)):
            yield _read_run(row, messages)

    def judged_runs(self, namespace: str, *, since: float | None = None) -> Iterator[Run]:
        """Read the runs of a namespace that something was said of, prompt by prompt.

        ``since`` (POSIX seconds) leaves only those of prompts that something was said of then or
        later, the older answers to them among them.
        """
        query = _select_said("run", RUN, "run.run_id", since)
        messages = _Messages(self._connection)
        for row in self._connection.execute(query, {"namespace": namespace, "since": since}):
            yield _read_run(row, messages)

    def feedback(self, namespace: str, *, since: float | None = None) -> Iterator[Feedback]:
        """Read the feedback on a namespace's runs, oldest first; ``since`` as in ``judged_runs``.

        What is older than ``since`` is left out only with its whole prompt.
        """
        query = _select_said("feedback", FEEDBACK, "feedback.run_id", since)
        query += " ORDER BY feedback.created_at, feedback_id"
        messages = _Messages(self._connection)
        for row in self._connection.execute(query, {"namespace": namespace, "since": since}):
            yield _read_feedback(row, messages)

    def comparisons(self, namespace: str, *, since: float | None = None) -> Iterator[Comparison]:
        """Read the comparisons between a namespace's runs, oldest first; ``since`` as above."""
        query = _select_said("comparison", COMPARISON, "run_a", since)
        query += " ORDER BY comparison.created_at, comparison_id"
        for row in self._connection.execute(query, {"namespace": namespace, "since": since}):
            yield Comparison(*row)

    def scales(self, namespace: str) -> list[tallies.Scale]:
        """Say what the scores look like that a namespace's runs were given, key by key."""
        return tallies.scales(self._connection, namespace)

    @contextmanager
    def one_state(self) -> Iterator[None]:
        """Let all that is read in a block be of one moment, whatever others write meanwhile."""
        if self._connection.in_transaction:
            yield
            return
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def namespaces(self) -> list[str]:
        """Name the namespaces that have runs, in alphabetical order."""
        return tallies.namespaces(self._connection)

    def stats(self, namespace: str | None = None) -> dict[str, Any]:
        """Count what a namespace holds, or the whole home.

        Returns:
            ``runs``, ``threads``, ``users``, ``feedback`` (corrections among it), ``corrections``,
            ``comparisons``, and ``first_at`` and ``last_at`` of its runs (None without runs).
        """
        return tallies.stats(self._connection, namespace)

    def verify(self, *, sample: int | None = None) -> list[Problem]:
        """Hash every message again and follow every reference; return what does not hold.

        ``sample`` looks at so many rows of each large table instead, drawn at random.
        """
        return examine(self._connection, sample=sample).problems


class _Messages:
    """Reads chains, parsing each message once; lives as long as one reading does."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._nodes: dict[str, tuple[str | None, dict[str, Any]]] = {}

    def prompt(self, prompt_id: str) -> Prompt:
        bodies: list[dict[str, Any]] = []
        parent: str | None = prompt_id
        while parent is not None:
            parent, body = self._node(parent)
            bodies.append(body)
        bodies.reverse()
        tools = bodies.pop(0)["tools"] if "tools" in bodies[0] else ()
        return Prompt(prompt_id, tuple(bodies), tuple(tools))

    def message(self, message_id: str) -> Message:
        return self._node(message_id)[1]

    def _node(self, message_id: str) -> tuple[str | None, dict[str, Any]]:
        node = self._nodes.get(message_id)
        if node is None:
            if len(self._nodes) >= _KEPT:
                self._nodes.clear()
            node = self._nodes[message_id] = self._read(message_id)
        return node

    def _read(self, message_id: str) -> tuple[str | None, dict[str, Any]]:
        query = "SELECT parent, body FROM message WHERE id = ?"
        row = self._connection.execute(query, (message_id,)).fetchone()
        if row is None:
            raise CorruptHome(
                f"message {message_id} is referred to but missing; see `agentpref verify`, "
                "then restore a backup"
            )
        return row[0], orjson.loads(row[1])


_KEPT = 50_000
"""Messages that a reading keeps parsed at most."""


def unknown(run_id: str) -> UnknownRun:
    """Say that a home has no such run, and what may be the cause."""
    return UnknownRun(
        f"no run {run_id!r} is in this home; pass an id that Log.record returned for the same home "
        "(a run that could not be kept is counted in Log.dropped)"
    )


def _read_run(row: tuple[Any, ...], messages: _Messages) -> Run:
    run = dict(zip(RUN, row, strict=True))
    run["prompt"] = messages.prompt(run["prompt"])
    run["output"] = messages.message(run["output"])
    run["params"] = orjson.loads(run["params"])
    run["metadata"] = orjson.loads(run["metadata"])
    run["tags"] = tuple(orjson.loads(run["tags"]))
    if run["token_ids"] is not None:
        run["token_ids"] = tuple(orjson.loads(run["token_ids"]))
    if run["logprobs"] is not None:
        run["logprobs"] = _floats(orjson.loads(run["logprobs"]))
    return Run(**run)


def _read_feedback(row: tuple[Any, ...], messages: _Messages) -> Feedback:
    feedback = dict(zip(FEEDBACK, row, strict=True))
    if feedback["value"] is not None:
        feedback["value"] = orjson.loads(feedback["value"])
    if feedback["correction"] is not None:
        feedback["correction"] = messages.message(feedback["correction"])
    return Feedback(**feedback)


def _floats(numbers: list[float | None]) -> tuple[float, ...]:
    """JSON has no infinity and no NaN: what was one of them was stored as null."""
    return tuple(math.nan if number is None else number for number in numbers)
