"""Runs, feedback and comparisons, written to one open database.

Writes are plain SQL, idempotent by id, and join the caller's transaction where there is one.
Knows nothing of threads, queues or who is live; one store has one user at a time, as its connection
has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from agentpref.errors import ForgottenUser, InvalidFeedback
from agentpref.record.database import transaction
from agentpref.record.messages import Node, answer, chain, plain
from agentpref.record.reader import COMPARISON, FEEDBACK, RUN, Reader, unknown
from agentpref.types import Comparison, Feedback, Run


def _insert(table: str, columns: Iterable[str]) -> str:
    names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
    return f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"


_INSERT_MESSAGE = "INSERT OR IGNORE INTO message (id, parent, body) VALUES (?, ?, ?)"
_INSERT_RUN = _insert("run", RUN)
_INSERT_FEEDBACK = _insert("feedback", FEEDBACK)
_INSERT_COMPARISON = _insert("comparison", COMPARISON)


class Store(Reader):
    """The record of one home, to write to and to read."""

    def add_run(self, run: Run) -> None:
        """Write a run and its messages; a run whose id is known already is left as it was.

        The prompt's id is computed from its messages, never taken on trust.

        Raises:
            InvalidMessage: a message cannot be stored.
            ForgottenUser: it is of somebody who was forgotten since.
        """
        nodes, prompt = chain(run.prompt.messages, run.prompt.tools)
        output = answer(prompt, run.output)
        with transaction(self._connection):
            self._require_remembered(run)
            self._add_nodes([*nodes, output])
            self._connection.execute(_INSERT_RUN, _run_row(run, prompt, output.id))

    def add_feedback(self, feedback: Feedback) -> None:
        """Write a signal on a run, with the correction that it may carry.

        Raises:
            UnknownRun: the run is not in this home.
            InvalidMessage: the correction cannot be stored.
            ForgottenUser: it was said by somebody who was forgotten since.
        """
        with transaction(self._connection):
            self._require_remembered(feedback)
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
            ForgottenUser: it was said by somebody who was forgotten since.
        """
        with transaction(self._connection):
            self._require_remembered(comparison)
            space_a, prompt_a = self._place(comparison.run_a)
            space_b, prompt_b = self._place(comparison.run_b)
            if (space_a, prompt_a) != (space_b, prompt_b):
                what = "prompts" if space_a == space_b else "namespaces"
                raise InvalidFeedback(
                    f"runs {comparison.run_a} and {comparison.run_b} are of different {what}; "
                    "compare two answers to the same messages and tools"
                )
            self._connection.execute(_INSERT_COMPARISON, _row(comparison, COMPARISON))

    def _require_remembered(self, record: Run | Feedback | Comparison) -> None:
        """Let nothing back in that was said before its user was forgotten."""
        if record.user_id is None:
            return
        query = "SELECT at FROM forgotten WHERE user_id = ?"
        row = self._connection.execute(query, (record.user_id,)).fetchone()
        if row is not None and record.created_at <= row[0]:
            raise ForgottenUser(
                f"user {record.user_id} was forgotten after this {type(record).__name__.lower()} "
                "was made; it is not kept"
            )

    def _add_nodes(self, nodes: list[Node]) -> None:
        rows = ((node.id, node.parent, node.body.decode()) for node in nodes)
        self._connection.executemany(_INSERT_MESSAGE, rows)

    def _place(self, run_id: str) -> tuple[str, str]:
        query = "SELECT namespace, prompt FROM run WHERE run_id = ?"
        row = self._connection.execute(query, (run_id,)).fetchone()
        if row is None:
            raise unknown(run_id)
        return row[0], row[1]


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, default=plain).decode()


def _row(record: Run | Feedback | Comparison, columns: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in columns}


def _run_row(run: Run, prompt: str, output: str) -> dict[str, Any]:
    row = _row(run, RUN) | {"prompt": prompt, "output": output}
    for name in ("params", "token_ids", "logprobs", "tags", "metadata"):
        row[name] = _json(row[name])
    return row


def _feedback_row(feedback: Feedback, correction: str | None) -> dict[str, Any]:
    value = _json(feedback.value)
    return _row(feedback, FEEDBACK) | {"value": value, "correction": correction}
