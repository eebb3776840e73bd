"""What holds in every sound record, as SQL that finds the rows where it does not.

A reference leads to a row that fits, JSON is JSON, words are among those that are allowed, and what
was said by somebody before he was forgotten is gone. Each statement looks at one row of its table
and follows its references by key, so that a few rows can be checked as well as all of them. Knows
nothing of hashes, files and how many rows are looked at.

Nothing is asked of ``pair_source`` but that an update used the pair: feedback that a pair was made
of may have been forgotten since, or be older than what is kept.
"""

from __future__ import annotations

from typing import NamedTuple

from agentpref.record.tally_schema import counted


class Invariant(NamedTuple):
    """What is wrong with a row of a table where ``broken`` is true of it and what it ``joins``."""

    table: str
    what: str
    broken: str
    joins: str = ""


KEYS = {
    "message": "message.id",
    "run": "run.run_id",
    "feedback": "feedback.feedback_id",
    "comparison": "comparison.comparison_id",
    "updates": "updates.update_id",
    "update_pair": "update_pair.update_id",
    "pair_source": "pair_source.source",
    "revision": "revision.revision_id",
    "serving": "serving.namespace",
    "serving_history": "serving_history.id",
    "tally": "tally.namespace",
}
"""What a row is called in a finding, by table."""

SAMPLED = ("message", "run", "feedback", "comparison", "updates", "revision")
"""Tables that grow with what is logged and learned, and of which a few rows can be had."""

WHOLE = ("serving", "serving_history")
"""Tables so small that they are read in whole even where others are sampled."""


def _of_the_forgotten(table: str) -> Invariant:
    return Invariant(
        table,
        "it is of somebody who was forgotten since",
        f"{table}.created_at <= forgotten.at",
        f"CROSS JOIN forgotten ON forgotten.user_id = {table}.user_id",
    )


def _miscounted(**counts: str) -> str:
    """True of a tally some of whose counts are not those of its namespace's rows."""
    return " OR ".join(
        f"tally.{name} <> (SELECT {rows} AND run.namespace = tally.namespace)"
        for name, rows in counts.items()
    )


def _source(table: str) -> Invariant:
    what = "its source is not human, model or code"
    return Invariant(table, what, "source NOT IN ('human', 'model', 'code')")


def _served(table: str, role: str) -> Invariant:
    return Invariant(
        table,
        f"its {role} is no revision of its namespace",
        f"{table}.{role} IS NOT NULL AND revision.namespace IS NOT {table}.namespace",
        f"LEFT JOIN revision ON revision_id = {table}.{role}",
    )


def _is_counted(table: str) -> str:
    return f"{table}.rowid <= {counted(table)}"


_SAID_OF_RUNS = f"FROM run CROSS JOIN feedback USING (run_id) WHERE {_is_counted('feedback')}"

INVARIANTS = (
    Invariant(
        "message",
        "its parent is missing",
        "message.parent IS NOT NULL AND above.id IS NULL",
        "LEFT JOIN message AS above ON above.id = message.parent",
    ),
    Invariant(
        "run",
        "its prompt is missing",
        "message.id IS NULL",
        "LEFT JOIN message ON message.id = prompt",
    ),
    Invariant(
        "run",
        "its output is missing or answers another prompt",
        "message.parent IS NOT prompt",
        "LEFT JOIN message ON message.id = output",
    ),
    Invariant(
        "run",
        "one of its columns is not JSON",
        "NOT (json_valid(params) AND json_valid(tags) AND json_valid(metadata)"
        " AND json_valid(coalesce(token_ids, '[]')) AND json_valid(coalesce(logprobs, '[]')))",
    ),
    _of_the_forgotten("run"),
    Invariant(
        "feedback",
        "its run is missing",
        "run.run_id IS NULL",
        "LEFT JOIN run ON run.run_id = feedback.run_id",
    ),
    Invariant(
        "feedback",
        "its correction is missing or answers another prompt",
        "correction IS NOT NULL AND message.parent IS NOT prompt",
        "JOIN run ON run.run_id = feedback.run_id LEFT JOIN message ON message.id = correction",
    ),
    _source("feedback"),
    Invariant("feedback", "its value is not JSON", "NOT json_valid(coalesce(value, 'null'))"),
    _of_the_forgotten("feedback"),
    Invariant(
        "comparison",
        "one of its runs is missing, or they are of different prompts or namespaces",
        "a.prompt IS NULL OR b.prompt IS NULL OR a.prompt <> b.prompt"
        " OR a.namespace <> b.namespace",
        "LEFT JOIN run AS a ON a.run_id = run_a LEFT JOIN run AS b ON b.run_id = run_b",
    ),
    _source("comparison"),
    Invariant("comparison", "its winner is not a, b or tie", "winner NOT IN ('a', 'b', 'tie')"),
    _of_the_forgotten("comparison"),
    Invariant(
        "updates",
        "its candidate is missing, or has another parent or namespace",
        "candidate IS NOT NULL AND (revision.namespace IS NOT updates.namespace"
        " OR revision.parent IS NOT updates.parent)",
        "LEFT JOIN revision ON revision_id = candidate",
    ),
    Invariant(
        "updates",
        "its parent is no revision of its namespace",
        "updates.parent IS NOT NULL AND revision.namespace IS NOT updates.namespace",
        "LEFT JOIN revision ON revision_id = updates.parent",
    ),
    Invariant(
        "updates",
        "it promoted no candidate",
        "verdict = 'promoted' AND candidate IS NULL",
    ),
    Invariant("updates", "its report is not JSON", "NOT json_valid(coalesce(report, 'null'))"),
    Invariant(
        "update_pair",
        "its update is missing",
        "updates.update_id IS NULL",
        "LEFT JOIN updates ON updates.update_id = update_pair.update_id",
    ),
    Invariant(
        "update_pair",
        "its role is not new, replay or held_out",
        "role NOT IN ('new', 'replay', 'held_out')",
    ),
    Invariant(
        "pair_source",
        "no update used its pair",
        "pair_id NOT IN (SELECT pair_id FROM update_pair)",
    ),
    Invariant(
        "revision",
        "its parent is missing, younger, or of another namespace",
        "revision.parent IS NOT NULL"
        " AND (above.namespace IS NOT revision.namespace OR above.seq >= revision.seq)",
        "LEFT JOIN revision AS above ON above.revision_id = revision.parent",
    ),
    Invariant(
        "revision",
        "its parent is tainted and it is not",
        "revision.tainted_at IS NULL AND above.tainted_at IS NOT NULL",
        "JOIN revision AS above ON above.revision_id = revision.parent",
    ),
    Invariant(
        "revision",
        "its manifest is not JSON, or names another parent",
        "NOT json_valid(manifest) OR (json_type(manifest, '$.parent') IS NOT NULL"
        " AND json_extract(manifest, '$.parent') IS NOT parent)",
    ),
    _served("serving", "live"),
    _served("serving", "canary"),
    Invariant(
        "serving",
        "it names a revision that was pruned",
        "revision.pruned_at IS NOT NULL",
        "JOIN revision ON revision_id IN (serving.live, serving.canary)",
    ),
    Invariant(
        "serving",
        "it is not what its history ends with",
        "last.live IS NOT serving.live OR last.canary IS NOT serving.canary"
        " OR last.weight IS NOT serving.weight OR last.generation IS NOT serving.generation",
        "LEFT JOIN (SELECT namespace, max(id) AS id FROM serving_history GROUP BY namespace)"
        " AS newest ON newest.namespace = serving.namespace"
        " LEFT JOIN serving_history AS last ON last.id = newest.id",
    ),
    Invariant(
        "serving_history",
        "its generation is not above the one before it",
        "serving_history.generation <= before.generation",
        "JOIN (SELECT id, lag(generation) OVER (PARTITION BY namespace ORDER BY id) AS generation"
        " FROM serving_history) AS before ON before.id = serving_history.id",
    ),
    _served("serving_history", "live"),
    _served("serving_history", "canary"),
    Invariant(
        "tally",
        "its counts are not those of the rows",
        "tally.namespace <> '' AND ("
        + _miscounted(
            runs=f"count(*) FROM run WHERE {_is_counted('run')}",
            threads=f"count(DISTINCT thread_id) FROM run WHERE {_is_counted('run')}",
            users=f"count(DISTINCT user_id) FROM run WHERE {_is_counted('run')}",
            feedback=f"count(*) {_SAID_OF_RUNS}",
            corrections=f"count(correction) {_SAID_OF_RUNS}",
            comparisons="count(*) FROM run CROSS JOIN comparison ON run_a = run.run_id"
            f" WHERE {_is_counted('comparison')}",
        )
        + ")",
    ),
)
