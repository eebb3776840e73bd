"""Runs, feedback and comparisons, written to and read from one open database.

Writes are plain SQL, idempotent by id, and join the caller's transaction where there is one. Reads
give back whole values, each message parsed once per reading. Knows nothing of threads, queues or
who is live; one store has one user at a time, as its connection has.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import orjson

from agentpref.errors import CorruptHome, InvalidFeedback, UnknownRun
from agentpref.record.database import transaction
from agentpref.record.messages import Node, answer, chain, plain
from agentpref.record.verify import Problem, problems
from agentpref.types import Comparison, Feedback, Message, Prompt, Run


def _columns(kind: type[Run | Feedback | Comparison]) -> tuple[str, ...]:
    """The tables' columns are the records' fields, in any order."""
    return tuple(field.name for field in fields(kind))


_RUN = _columns(Run)
_FEEDBACK = _columns(Feedback)
_COMPARISON = _columns(Comparison)


def _select(table: str, columns: Iterable[str]) -> str:
    return f"SELECT {', '.join(f'{table}.{name}' for name in columns)} FROM {table}"


def _insert(table: str, columns: Iterable[str]) -> str:
    names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
    return f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"


_INSERT_MESSAGE = "INSERT OR IGNORE INTO message (id, parent, body) VALUES (?, ?, ?)"
_INSERT_RUN = _insert("run", _RUN)
_INSERT_FEEDBACK = _insert("feedback", _FEEDBACK)
_INSERT_COMPARISON = _insert("comparison", _COMPARISON)


class Store:
    """The record of one home, over a connection of ``database.connect``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Take a connection; whoever opened it closes it."""
        self._connection = connection

    def add_run(self, run: Run) -> None:
        """Write a run and its messages; a run whose id is known already is left as it was.

        The prompt's id is computed from its messages, never taken on trust.

        Raises:
            InvalidMessage: a message cannot be stored.
        """
        nodes, prompt = chain(run.prompt.messages, run.prompt.tools)
        output = answer(prompt, run.output)
        with transaction(self._connection):
            self._add_nodes([*nodes, output])
            self._connection.execute(_INSERT_RUN, _run_row(run, prompt, output.id))

    def add_feedback(self, feedback: Feedback) -> None:
        """Write a signal on a run, with the correction that it may carry.

        Raises:
            UnknownRun: the run is not in this home.
            InvalidMessage: the correction cannot be stored.
        """
        with transaction(self._connection):
            _, prompt = self._place(feedback.run_id)
            correction = None
            if feedback.correction is not None:
                node = answer(prompt, feedback.correction)
                self._add_nodes([node])
                correction = node.id
            self._connection.execute(_INSERT_FEEDBACK, _feedback_row(feedback, correction))

    def add_comparison(self, comparison: Comparison) -> None:
        """Write a judgement between two runs of one prompt in one namespace.

        Raises:
            UnknownRun: one of the runs is not in this home.
            InvalidFeedback: the runs differ in prompt or namespace.
        """
        with transaction(self._connection):
            space_a, prompt_a = self._place(comparison.run_a)
            space_b, prompt_b = self._place(comparison.run_b)
            if (space_a, prompt_a) != (space_b, prompt_b):
                what = "prompts" if space_a == space_b else "namespaces"
                raise InvalidFeedback(
                    f"runs {comparison.run_a} and {comparison.run_b} are of different {what}; "
                    "compare two answers to the same messages and tools"
                )
            self._connection.execute(_INSERT_COMPARISON, _row(comparison, _COMPARISON))

    def run(self, run_id: str) -> Run:
        """Read one run.

        Raises:
            UnknownRun: it is not in this home.
        """
        query = f"{_select('run', _RUN)} WHERE run_id = ?"
        row = self._connection.execute(query, (run_id,)).fetchone()
        if row is None:
            raise _unknown(run_id)
        return _read_run(row, _Messages(self._connection))

    def runs(self, namespace: str) -> Iterator[Run]:
        """Read a namespace's runs, oldest first."""
        query = f"{_select('run', _RUN)} WHERE namespace = ? ORDER BY created_at, run_id"
        messages = _Messages(self._connection)
        for row in self._connection.execute(query, (namespace,)):
            yield _read_run(row, messages)

    def feedback(self, namespace: str) -> Iterator[Feedback]:
        """Read the feedback on a namespace's runs, oldest first."""
        query = (
            f"{_select('feedback', _FEEDBACK)} JOIN run USING (run_id) WHERE run.namespace = ? "
            "ORDER BY feedback.created_at, feedback_id"
        )
        messages = _Messages(self._connection)
        for row in self._connection.execute(query, (namespace,)):
            yield _read_feedback(row, messages)

    def comparisons(self, namespace: str) -> Iterator[Comparison]:
        """Read the comparisons between a namespace's runs, oldest first."""
        query = (
            f"{_select('comparison', _COMPARISON)} JOIN run ON run.run_id = run_a "
            "WHERE run.namespace = ? ORDER BY comparison.created_at, comparison_id"
        )
        for row in self._connection.execute(query, (namespace,)):
            yield Comparison(*row)

    def namespaces(self) -> list[str]:
        """Name the namespaces that have runs, in alphabetical order."""
        rows = self._connection.execute("SELECT DISTINCT namespace FROM run ORDER BY namespace")
        return [name for (name,) in rows]

    def stats(self, namespace: str | None = None) -> dict[str, Any]:
        """Count what a namespace holds, or the whole home.

        Returns:
            ``runs``, ``threads``, ``users``, ``feedback`` (corrections among it), ``corrections``,
            ``comparisons``, and ``first_at`` and ``last_at`` of its runs (None without runs).
        """
        among = "" if namespace is None else "WHERE run.namespace = :namespace"
        cursor = self._connection.execute(_STATS.format(among=among), {"namespace": namespace})
        names = [column[0] for column in cursor.description]
        return dict(zip(names, cursor.fetchone(), strict=True))

    def verify(self) -> list[Problem]:
        """Hash every message again and follow every reference; return what does not hold."""
        return list(problems(self._connection))

    def _add_nodes(self, nodes: list[Node]) -> None:
        rows = ((node.id, node.parent, node.body.decode()) for node in nodes)
        self._connection.executemany(_INSERT_MESSAGE, rows)

    def _place(self, run_id: str) -> tuple[str, str]:
        query = "SELECT namespace, prompt FROM run WHERE run_id = ?"
        row = self._connection.execute(query, (run_id,)).fetchone()
        if row is None:
            raise _unknown(run_id)
        return row[0], row[1]


_STATS = """
SELECT count(*) AS runs, count(DISTINCT thread_id) AS threads, count(DISTINCT user_id) AS users,
    (SELECT count(*) FROM feedback JOIN run USING (run_id) {among}) AS feedback,
    (SELECT count(correction) FROM feedback JOIN run USING (run_id) {among}) AS corrections,
    (SELECT count(*) FROM comparison JOIN run ON run.run_id = run_a {among}) AS comparisons,
    min(created_at) AS first_at, max(created_at) AS last_at
FROM run {among}
"""


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


def _unknown(run_id: str) -> UnknownRun:
    return UnknownRun(
        f"no run {run_id!r} is in this home; pass an id that Log.record returned for the same home "
        "(a run that could not be kept is counted in Log.dropped)"
    )


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, default=plain).decode()


def _row(record: Run | Feedback | Comparison, columns: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in columns}


def _run_row(run: Run, prompt: str, output: str) -> dict[str, Any]:
    row = _row(run, _RUN) | {"prompt": prompt, "output": output}
    for name in ("params", "token_ids", "logprobs", "tags", "metadata"):
        row[name] = _json(row[name])
    return row


def _feedback_row(feedback: Feedback, correction: str | None) -> dict[str, Any]:
    value = _json(feedback.value)
    return _row(feedback, _FEEDBACK) | {"value": value, "correction": correction}


def _read_run(row: tuple[Any, ...], messages: _Messages) -> Run:
    run = dict(zip(_RUN, row, strict=True))
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
    feedback = dict(zip(_FEEDBACK, row, strict=True))
    if feedback["value"] is not None:
        feedback["value"] = orjson.loads(feedback["value"])
    if feedback["correction"] is not None:
        feedback["correction"] = messages.message(feedback["correction"])
    return Feedback(**feedback)


def _floats(numbers: list[float | None]) -> tuple[float, ...]:
    """JSON has no infinity and no NaN: what was one of them was stored as null."""
    return tuple(math.nan if number is None else number for number in numbers)
