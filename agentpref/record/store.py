"""Runs, feedback and comparisons, written to one open database.

Writes are plain SQL, idempotent by id, and join the caller's transaction where there is one.
Knows nothing of threads, queues or who is live; one store has one user at a time, as its connection
has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from agentpref.errors import ForgottenUser, InvalidFeedback, RecordError
from agentpref.record.bulk import insert_or_ignore
from agentpref.record.database import transaction
from agentpref.record.intake import LinkedRun, link
from agentpref.record.messages import Node, answer, plain
from agentpref.record.reader import COMPARISON, FEEDBACK, RUN, Reader, unknown
from agentpref.types import Comparison, Feedback, Run

_MESSAGE = ("id", "parent", "body")


class Store(Reader):
    """The record of one home, to write to and to read."""

    def add_run(self, run: Run) -> None:
        """Write a run and its messages; a run whose id is known already is left as it was.

        The prompt's id is computed from its messages, never taken on trust.

        Raises:
            InvalidMessage: a message cannot be stored.
            ForgottenUser: it is of somebody who was forgotten since.
        """
        (refusal,) = self.add_runs([link(run)])
        if refusal is not None:
            raise refusal

    def add_runs(self, runs: Sequence[LinkedRun]) -> list[RecordError | None]:
        """Write many runs at once; say for each whether it was refused, as ``add_run`` raises."""
        with transaction(self._connection):
            refusals = self._refusals([linked.run for linked in runs])
            kept = [run for run, no in zip(runs, refusals, strict=True) if no is None]
            self._add_nodes(node for run in kept for node in run.nodes)
            insert_or_ignore(self._connection, "run", RUN, [_run_row(run) for run in kept])
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
            row = _row(feedback, FEEDBACK, correction=correction)
            insert_or_ignore(self._connection, "feedback", FEEDBACK, [row])

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
            row = _row(comparison, COMPARISON)
            insert_or_ignore(self._connection, "comparison", COMPARISON, [row])

    def _require_remembered(self, said: Feedback | Comparison) -> None:
        (refusal,) = self._refusals([said])
        if refusal is not None:
            raise refusal

    def _refusals(self, said: Iterable[Run | Feedback | Comparison]) -> list[RecordError | None]:
        """Let nothing back in that was said before its user was forgotten."""
        said = list(said)
        users = {record.user_id for record in said if record.user_id is not None}
        query = (
            "SELECT user_id, at FROM forgotten WHERE user_id IN (SELECT value FROM json_each(?))"
        )
        found = self._connection.execute(query, (orjson.dumps([*users]),)) if users else ()
        forgotten = dict(found)
        return [
            ForgottenUser(
                f"user {record.user_id} was forgotten after this {type(record).__name__.lower()} "
                "was made; it is not kept"
            )
            if record.user_id in forgotten and record.created_at <= forgotten[record.user_id]
            else None
            for record in said
        ]

    def _add_nodes(self, nodes: Iterable[Node]) -> None:
        rows = {node.id: (node.id, node.parent, node.body.decode()) for node in nodes}
        insert_or_ignore(self._connection, "message", _MESSAGE, [*rows.values()])

    def _place(self, run_id: str) -> tuple[str, str]:
        query = "SELECT namespace, prompt FROM run WHERE run_id = ?"
        row = self._connection.execute(query, (run_id,)).fetchone()
        if row is None:
            raise unknown(run_id)
        return row[0], row[1]


def _json(value: Any) -> str:
    return orjson.dumps(value, default=plain).decode()


def _json_or_null(value: Any) -> str | None:
    return None if value is None else _json(value)


_TO_COLUMN: Mapping[str, Callable[[Any], str | None]] = {
    "params": _json,
    "metadata": _json,
    "tags": _json,
    "token_ids": _json_or_null,
    "logprobs": _json_or_null,
    "value": _json_or_null,
}


def _row(record: Run | Feedback | Comparison, columns: Iterable[str], **given: Any) -> list[Any]:
    """A record's values in the order of its columns; messages are ``given`` by their ids."""
    row = []
    for name in columns:
        value = given[name] if name in given else getattr(record, name)
        row.append(_TO_COLUMN[name](value) if name in _TO_COLUMN else value)
    return row


def _run_row(linked: LinkedRun) -> list[Any]:
    return _row(linked.run, RUN, prompt=linked.run.prompt.id, output=linked.nodes[-1].id)
