"""What is true of every sound record, as conditions in SQL.

Each invariant looks at the rows of one table and follows their references by key, so that a sample
can be checked as well as everything.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from agentpref.record.updates import ORPHANED, Role


class Invariant(NamedTuple):
    """``what`` is wrong with a row of ``table`` if ``broken`` is true of it and its ``joins``."""

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
}
"""What a row is called in a finding, by table."""

SAMPLED = ("message", "run", "feedback", "comparison", "updates", "revision")
"""Tables that grow with what is logged and learned."""

WHOLE = ("serving", "serving_history")
"""Tables so small that they are read as a whole beside a sample, too."""


def _of_the_forgotten(table: str) -> Invariant:
    return Invariant(
        table,
        "its user was forgotten later",
        f"{table}.created_at <= forgotten.at",
        f"CROSS JOIN forgotten ON forgotten.user_id = {table}.user_id",
    )


def _body(function: str, path: str) -> str:
    """SQL that reads the joined message's body; null if the body is not JSON."""
    text = "CAST(message.body AS TEXT)"
    return f"CASE WHEN json_valid({text}) THEN {function}({text}, '{path}') END"


_NO_ANSWER = "is missing, answers another prompt, or is not an assistant's message"
_ROLES = get_args(Role)


def _served(table: str, role: str) -> Invariant:
    return Invariant(
        table,
        f"its {role} is no revision of its namespace",
        f"{table}.{role} IS NOT NULL AND revision.namespace IS NOT {table}.namespace",
        f"LEFT JOIN revision ON revision_id = {table}.{role}",
    )


# fmt: off
INVARIANTS = (
    Invariant("message", "its parent is missing",
        "message.parent IS NOT NULL AND above.id IS NULL",
        "LEFT JOIN message AS above ON above.id = message.parent"),
    Invariant("run", "its prompt is missing or has no message",
        "message.id IS NULL OR message.parent IS NULL AND"
        f" {_body('json_type', '$.tools')} IS NOT NULL AND {_body('json_type', '$.role')} IS NULL",
        "LEFT JOIN message ON message.id = prompt"),
    Invariant("run", f"its output {_NO_ANSWER}",
        f"message.parent IS NOT prompt OR {_body('json_extract', '$.role')} <> 'assistant'",
        "LEFT JOIN message ON message.id = output"),
    _of_the_forgotten("run"),
    Invariant("feedback", "its run is missing",
        "run.run_id IS NULL",
        "LEFT JOIN run ON run.run_id = feedback.run_id"),
    Invariant("feedback", f"its correction {_NO_ANSWER}",
        "correction IS NOT NULL AND (message.parent IS NOT prompt"
        f" OR {_body('json_extract', '$.role')} <> 'assistant')",
        "JOIN run ON run.run_id = feedback.run_id LEFT JOIN message ON message.id = correction"),
    _of_the_forgotten("feedback"),
    Invariant("comparison",
        "one of its runs is missing, or they are of different prompts or namespaces",
        "a.prompt IS NULL OR b.prompt IS NULL OR a.prompt <> b.prompt"
        " OR a.namespace <> b.namespace",
        "LEFT JOIN run AS a ON a.run_id = run_a LEFT JOIN run AS b ON b.run_id = run_b"),
    _of_the_forgotten("comparison"),
    Invariant("updates", "its candidate is missing, or has another parent or namespace",
        "candidate IS NOT NULL AND (revision.namespace IS NOT updates.namespace"
        " OR revision.parent IS NOT updates.parent)",
        "LEFT JOIN revision ON revision_id = candidate"),
    Invariant("updates", "its parent is no revision of its namespace",
        "updates.parent IS NOT NULL AND revision.namespace IS NOT updates.namespace",
        "LEFT JOIN revision ON revision_id = updates.parent"),
    Invariant("updates", "it promoted no candidate", "verdict = 'promoted' AND candidate IS NULL"),
    Invariant("updates", "its report is not JSON", "NOT json_valid(coalesce(report, 'null'))"),
    Invariant("update_pair", "its update is missing",
        "updates.update_id IS NULL",
        "LEFT JOIN updates ON updates.update_id = update_pair.update_id"),
    Invariant("update_pair", f"its role is none of {', '.join(_ROLES)}", f"role NOT IN {_ROLES}"),
    # Nothing more about a pair's source: it may have been forgotten since, or have expired.
    Invariant("pair_source", "no update used its pair",
        "pair_id NOT IN (SELECT pair_id FROM update_pair)"),
    Invariant("revision", "its parent is missing, younger, or of another namespace",
        "revision.parent IS NOT NULL"
        " AND (above.namespace IS NOT revision.namespace OR above.seq >= revision.seq)",
        "LEFT JOIN revision AS above ON above.revision_id = revision.parent"),
    Invariant("revision", "its parent is tainted and it is not",
        "revision.tainted_at IS NULL AND above.tainted_at IS NOT NULL",
        "JOIN revision AS above ON above.revision_id = revision.parent"),
    Invariant("revision", "its update is not in the ledger, so what it learned is unknown",
        ORPHANED),
    Invariant("revision", "its manifest is not JSON, or names another parent",
        "NOT json_valid(manifest) OR (json_type(manifest, '$.parent') IS NOT NULL"
        " AND json_extract(manifest, '$.parent') IS NOT parent)"),
    _served("serving", "live"),
    _served("serving", "canary"),
    Invariant("serving", "it names a revision that was pruned",
        "revision.pruned_at IS NOT NULL",
        "JOIN revision ON revision_id IN (serving.live, serving.canary)"),
    Invariant("serving", "it is not what its history ends with",
        "last.live IS NOT serving.live OR last.canary IS NOT serving.canary"
        " OR last.weight IS NOT serving.weight OR last.generation IS NOT serving.generation",
        "LEFT JOIN (SELECT namespace, max(id) AS id FROM serving_history GROUP BY namespace)"
        " AS newest ON newest.namespace = serving.namespace"
        " LEFT JOIN serving_history AS last ON last.id = newest.id"),
    Invariant("serving_history", "its generation is not above the one before it",
        "serving_history.generation <= before.generation",
        "JOIN (SELECT id, lag(generation) OVER (PARTITION BY namespace ORDER BY id) AS generation"
        " FROM serving_history) AS before ON before.id = serving_history.id"),
    Invariant("serving_history", "it is the last of its namespace, which serves nothing",
        "NOT EXISTS (SELECT 1 FROM serving WHERE serving.namespace = serving_history.namespace)"
        " AND serving_history.id IN (SELECT max(id) FROM serving_history GROUP BY namespace)"),
    _served("serving_history", "live"),
    _served("serving_history", "canary"),
)
# fmt: on
