"""Everything that is known of one run.

Lineage runs both ways. Backwards from the run: the revision that answered, and the update that made
it. Forwards: what was said of the answer, the examples that this makes today, the updates that used
examples made of it then, and the revisions that learned from them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import orjson

from agentpref.prefer.examples import sort_out
from agentpref.prefer.votes import Reason
from agentpref.record.messages import as_json, canonical
from agentpref.record.store import Store
from agentpref.record.updates import MADE_BY, Updates
from agentpref.types import Comparison, Example, Feedback, Run

Side = Literal["chosen", "rejected", "liked", "disliked", "-"]
"""What an example says of the run's answer; a correction may have another chosen one."""


class Use(NamedTuple):
    """An update that used examples made of what was said of the run.

    ``roles`` maps the ids of the examples to what they were used for: ``new``, ``replay`` and
    ``anchor`` ones were trained on. ``revision`` is the update's candidate.
    """

    update_id: str
    created_at: float
    verdict: str | None
    revision: str | None
    roles: Mapping[str, str]

    @property
    def trained(self) -> bool:
        """Whether the update trained on any of them."""
        return not {"new", "replay", "anchor"}.isdisjoint(self.roles.values())


@dataclass(frozen=True, slots=True)
class Lineage:
    """One run, where it comes from, and what became of it.

    ``left_out`` says why a judgement, by its id, makes no example. ``made_by`` is the update that
    published the run's revision. ``learned`` names the revisions that trained on what was said of
    the run, or on its answer as an ordinary one, or descend from one that did.
    """

    run: Run
    feedback: list[Feedback]
    comparisons: list[Comparison]
    examples: list[Example]
    left_out: Mapping[str, Reason]
    made_by: str | None
    uses: list[Use]
    learned: list[str]

    def side(self, example: Example) -> Side:
        """What an example says of the run's answer."""
        answer = canonical(self.run.output)
        said = [canonical(one.message) == answer for one in example.completions]
        if example.lone:
            return "liked" if example.completions[0].label else "disliked"
        return "chosen" if said[0] else "rejected" if said[-1] else "-"

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values: what ``show --json`` prints."""
        run = asdict(self.run)
        prompt = run.pop("prompt")
        run |= {"messages": prompt["messages"], "tools": prompt["tools"]}
        made = [
            {
                "example": one.example_id,
                "origin": one.origin,
                "answer": self.side(one),
                "held_out": one.held_out,
                "made_of": [*one.provenance],
                "completions": [completion.message for completion in one.completions],
            }
            for one in self.examples
        ]
        uses = [use._asdict() | {"trained": use.trained} for use in self.uses]
        return {
            "run": run,
            "feedback": [self._said(row, row.feedback_id) for row in self.feedback],
            "comparisons": [self._said(row, row.comparison_id) for row in self.comparisons],
            "examples": made,
            "revision": {"revision": self.run.revision, "update": self.made_by},
            "updates": uses,
            "learned_by": self.learned,
        }

    def _said(self, row: Feedback | Comparison, row_id: str) -> dict[str, Any]:
        return asdict(row) | {"left_out": self.left_out.get(row_id)}


def lineage(connection: sqlite3.Connection, run_id: str, *, held_out: float) -> Lineage:
    """Read everything that is known of a run.

    Args:
        connection: the home's database.
        run_id: the run.
        held_out: the share of prompts, from 0 to 1, that are held out.

    Raises:
        UnknownRun: it is not in this home.
    """
    store = Store(connection)
    with store.one_state():
        run = store.run(run_id)
        feedback, comparisons = store.judgements(run_id)
        said = {row.feedback_id for row in feedback} | {row.comparison_id for row in comparisons}
        examples, left_out = _examples(connection, run, held_out) if said else ([], {})
        return Lineage(
            run,
            feedback,
            comparisons,
            [one for one in examples if not said.isdisjoint(one.provenance)],
            {row: reason for row, reason in left_out.items() if row in said},
            _made_by(connection, run.revision),
            [*_uses(connection, {*said, run_id})],
            Updates(connection).revisions_trained_on({*said, run_id}),
        )


def _examples(
    connection: sqlite3.Connection, run: Run, held_out: float
) -> tuple[list[Example], dict[str, Reason]]:
    """Build the examples of the run's prompt from all that was said of it."""
    store = Store(connection)
    query = """SELECT run_id FROM (SELECT run_id FROM feedback UNION SELECT run_a FROM comparison
            UNION SELECT run_b FROM comparison) CROSS JOIN run USING (run_id)
        WHERE prompt = ? AND namespace = ?"""
    found = connection.execute(query, (run.prompt.id, run.namespace))
    rows = store.judged(run.namespace, [run_id for (run_id,) in found])
    return sort_out(*rows, held_out=held_out, standards=store.standards(run.namespace))


def _made_by(connection: sqlite3.Connection, revision: str | None) -> str | None:
    query = f"SELECT {MADE_BY} FROM revision WHERE revision_id = ?"
    row = connection.execute(query, (revision,)).fetchone()
    return None if row is None or row[0] is None else str(row[0])


def _uses(connection: sqlite3.Connection, said: set[str]) -> Iterator[Use]:
    """Find the updates that used examples made of some judgements or runs, oldest first."""
    found = connection.execute(
        """SELECT update_id, created_at, verdict, candidate, json_group_object(pair_id, role)
        FROM update_pair JOIN updates USING (update_id)
        WHERE pair_id IN (SELECT pair_id FROM pair_source
            WHERE source IN (SELECT value FROM json_each(?)))
        GROUP BY update_id ORDER BY created_at, update_id""",
        (as_json(sorted(said)),),
    )
    for update_id, created_at, verdict, candidate, roles in found:
        yield Use(update_id, created_at, verdict, candidate, orjson.loads(roles))
