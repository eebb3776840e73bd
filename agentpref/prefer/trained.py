"""Which questions a revision was trained on, whatever became of their examples since.

A prompt is known by its point of :func:`~agentpref.prefer.examples.split_point`, which system
messages do not change: the same question must not be both trained and scored.
"""

from __future__ import annotations

import sqlite3

from agentpref.prefer.examples import split_point
from agentpref.record.messages import as_json
from agentpref.record.store import Store
from agentpref.record.updates import Updates

_RUNS_AT_ONCE = 500


def trained_points(
    connection: sqlite3.Connection, namespace: str, revision: str | None
) -> set[float]:
    """The points of the prompts that trained a revision or one of its ancestors.

    Most are in the list of examples. A question that was judged anew since has another example
    there, and is found by the judgements that the ledger names. What was removed from the home is
    gone, and so are examples of 0.1.0 that were judged anew.
    """
    trained = Updates(connection).trained_by(revision)
    query = "SELECT example_id, point FROM example WHERE namespace = ?"
    listed = {
        example_id: point
        for example_id, point in connection.execute(query, (namespace,))
        if example_id in trained
    }
    points, others = {*listed.values()}, trained - listed.keys()
    if others:
        found = connection.execute(_RUNS_OF, (as_json(sorted(others)),))
        run_ids = [run_id for (run_id,) in found]
        for start in range(0, len(run_ids), _RUNS_AT_ONCE):
            runs, _, _ = Store(connection).judged(namespace, run_ids[start : start + _RUNS_AT_ONCE])
            points.update(split_point(run.prompt.messages) for run in runs)
    return points


_RUNS_OF = """
WITH said(source) AS (
    SELECT source FROM pair_source WHERE pair_id IN (SELECT value FROM json_each(?))
)
SELECT run_id FROM feedback WHERE feedback_id IN said
UNION SELECT run_a FROM comparison WHERE comparison_id IN said
"""
