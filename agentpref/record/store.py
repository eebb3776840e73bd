"""Runs, feedback and comparisons, written to one open database.

Writes are plain SQL, idempotent by id, and join the caller's transaction where there is one.
Knows nothing of threads, queues or who is live; one store has one user at a time, as its connection
has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from agentpref.errors import ForgottenUser, InvalidFeedback, RecordError
from agentpref.record.bulk import insert_or_ignore, statement
from agentpref.record.database import transaction
from agentpref.record.messages import Node, answer
from agentpref.record.reader import COMPARISON, FEEDBACK, Reader, unknown
from agentpref.record.rows import RUN_COLUMNS, RunRow, as_json, as_json_or_null, run_row
from agentpref.types import Comparison, Feedback, Run

_MESSAGE = ("id", "parent", "body")
_INSERT_FEEDBACK = statement("feedback", FEEDBACK)
_INSERT_COMPARISON = statement("comparison", COMPARISON)


class Store(Reader):
    """The record of one home, to write to and to read."""

    def add_run(self, run: Run) -> None:
        """Write a run and its messages; a run whose id is known already is left as it was.

        The prompt's id is computed from its messages, never taken on trust.

        Raises:
            InvalidMessage: a message cannot be stored.
            ForgottenUser: it is of somebody who was forgotten since.
        """
        (refusal,) = self.add_runs([run_row(run)])
        if refusal is not None:
            raise refusal

    def add_runs(self, runs: Sequence[RunRow]) -> list[RecordError | None]:
        """Write many runs at once; say for each whether it was refused, as ``add_run`` raises."""
        with transaction(self._connection):
            refusals = self._refusals(runs)
            kept = [run for run, no in zip(runs, refusals, strict=True) if no is None]
            self._add_nodes(node for run in kept for node in run.nodes)
            insert_or_ignore(self._connection, "run", RUN_COLUMNS, [run[:-1] for run in kept])
        return refusals

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
            value = as_json_or_null(feedback.value)
            row = _row_of(feedback, FEEDBACK, value=value, correction=correction)
            self._connection.execute(_INSERT_FEEDBACK, row)

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
            self._connection.execute(_INSERT_COMPARISON, _row_of(comparison, COMPARISON))

    def _require_remembered(self, said: Feedback | Comparison) -> None:
        if said.user_id is None:
            return
        (refusal,) = self._refusals([said])
        if refusal is not None:
            raise refusal

    def _refusals(self, said: Sequence[RunRow | Feedback | Comparison]) -> list[RecordError | None]:
        """Let nothing back in that was said before its user was forgotten."""
        forgotten = self._forgotten({record.user_id for record in said} - {None})
        if not forgotten:
            return [None] * len(said)
        return [
            ForgottenUser(
                f"user {record.user_id} was forgotten after this was said; it is not kept"
            )
            if record.created_at <= forgotten.get(record.user_id, -math.inf)
            else None
            for record in said
        ]

    def _forgotten(self, users: Collection[str | None]) -> dict[str | None, float]:
        if not users:
            return {}
        query = (
            "SELECT user_id, at FROM forgotten WHERE user_id IN (SELECT value FROM json_each(?))"
        )
        return dict(self._connection.execute(query, (as_json([*users]),)))

    def _add_nodes(self, nodes: Iterable[Node]) -> None:
        rows = {node.id: (node.id, node.parent, node.body.decode()) for node in nodes}
        insert_or_ignore(self._connection, "message", _MESSAGE, [*rows.values()])

    def _place(self, run_id: str) -> tuple[str, str]:
        query = "SELECT namespace, prompt FROM run WHERE run_id = ?"
        row = self._connection.execute(query, (run_id,)).fetchone()
        if row is None:
            raise unknown(run_id)
        return row[0], row[1]


def _row_of(record: Feedback | Comparison, columns: Iterable[str], **given: Any) -> list[Any]:
    """A record's values in the order of its columns, but for those that are ``given``."""
    return [given[name] if name in given else getattr(record, name) for name in columns]
