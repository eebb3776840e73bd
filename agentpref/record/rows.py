"""A run as the tables hold it, and the messages that it brings.

What is between a host's run and the database is one such row, so that what is logged at thousands
a second is turned into values once. Knows nothing of SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from agentpref.record.messages import Linker, Node, plain
from agentpref.types import Run


class RunRow(NamedTuple):
    """The columns of ``run``, in any order but with ``nodes`` last: its chain and its answer."""

    run_id: str
    namespace: str
    created_at: float
    prompt: str
    output: str
    model: str | None
    revision: str | None
    thread_id: str | None
    trace_id: str | None
    user_id: str | None
    params: str
    token_ids: str | None
    logprobs: str | None
    tags: str
    metadata: str
    nodes: tuple[Node, ...]


RUN_COLUMNS = RunRow._fields[:-1]


def run_row(run: Run, nodes: Sequence[Node] = ()) -> RunRow:
    """Make the row of a run; the prompt's id is computed, never taken on trust.

    Args:
        run: the run.
        nodes: its chain and its answer, where somebody has linked them already; those of its chain
            may be left out that the store has.

    Raises:
        InvalidMessage: a message cannot be stored.
    """
    nodes = nodes or Linker().conversation(run.prompt.messages, run.prompt.tools, run.output)
    return RunRow(
        run.run_id,
        run.namespace,
        run.created_at,
        str(nodes[-1].parent),
        nodes[-1].id,
        run.model,
        run.revision,
        run.thread_id,
        run.trace_id,
        run.user_id,
        as_json(run.params),
        as_json_or_null(run.token_ids),
        as_json_or_null(run.logprobs),
        as_json(run.tags),
        as_json(run.metadata),
        tuple(nodes),
    )


def relinked(values: Sequence[Any], bodies: Sequence[str]) -> RunRow:
    """Make the row again of its columns and the bodies of its nodes."""
    linker = Linker()
    nodes: list[Node] = []
    for body in bodies:
        nodes.append(linker.child(nodes[-1].id if nodes else None, orjson.loads(body)))
    return RunRow._make((*values, tuple(nodes)))


def as_json(value: Any) -> str:
    """Write a column that holds JSON."""
    return orjson.dumps(value, default=plain).decode()


def as_json_or_null(value: Any) -> str | None:
    """Write a column that holds JSON or nothing."""
    return None if value is None else as_json(value)
