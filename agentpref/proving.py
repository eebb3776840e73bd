"""Proves a candidate that no update trained: an adapter from elsewhere, or instructions.

What an update's candidate must show, such a one must, by the same held-out examples and the same
gate. Those that live has not learned prove a gain; if there are none, those that it has learned do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from agentpref.budget import affordable
from agentpref.config import UpdateConfig
from agentpref.groundwork import Groundwork
from agentpref.learn.data import Available, UpdateData, UpdateRows
from agentpref.prefer.strata import sample
from agentpref.types import Example

if TYPE_CHECKING:
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.prove.checks import Scorer, UserCheck
    from agentpref.prove.evaluate import Scores
    from agentpref.prove.evidence import Evidence
    from agentpref.prove.results import GateResult

R = TypeVar("R")


class By(NamedTuple, Generic[R]):
    """The examples that prove a gain, and whether live has learned them."""

    rows: list[R]
    learned: bool = False

    @classmethod
    def of(cls, fresh: Sequence[R], old: Sequence[R]) -> By[R]:
        """What live has not learned, or else what it has."""
        return cls([*fresh]) if fresh else cls([*old], learned=True)

    @property
    def notes(self) -> list[str]:
        """Says so, if live has learned them."""
        if not self.learned:
            return []
        return [
            f"no new example is held out, so {len(self.rows)} that live has learned prove a gain, "
            "and that nothing is lost"
        ]


class Proven(NamedTuple):
    """What the gate says: the fields of a report, and what is told beside them."""

    told: dict[str, Any]
    thumbs: int
    notes: tuple[str, ...]
    shown: tuple[tuple[str, str, str], ...]


class Judged(NamedTuple):
    """A candidate's scores on what is new and on what live has learned, and the gate's word."""

    new: Scores
    old: Scores
    evidence: Evidence
    result: GateResult


def judge(
    learner: Learner,
    new: Sequence[EncodedExample],
    old: Sequence[EncodedExample],
    *,
    trained: Sequence[EncodedExample],
    ordinary: Sequence[EncodedExample],
    checks: Mapping[str, UserCheck],
    scorers: Mapping[str, Scorer],
    config: UpdateConfig,
    looks: int,
) -> Judged:
    """Evaluate the learner's candidate beside live, and let the gate decide on it.

    Args:
        learner: holds both.
        new: the rows that prove a gain.
        old: the rows of what live has learned, which must not be forgotten.
        trained: what the candidate was made from, which proves nothing.
        ordinary: held-out answers that nobody judged.
        checks: the user's own checks.
        scorers: the user's own scorers of answers.
        config: the seed and the settings of the gate.
        looks: how often what is new was looked at before.
    """
    from agentpref.prove import evaluate, gate

    everything = {row.example.example_id: row for row in (*new, *old)}
    kl = evaluate.kl_from_base(learner, [*everything.values()], seed=config.seed)
    of_new, of_old = evaluate.score(learner, new), evaluate.score(learner, old)
    evidence = evaluate.gather(
        learner,
        of_new,
        of_old,
        kl=kl,
        trained=trained,
        checks=checks,
        scorers=scorers,
        config=config,
        ordinary=ordinary,
    )
    evidence = replace(evidence, looks=looks)
    return Judged(of_new, of_old, evidence, gate.judge(evidence, config.gate, seed=config.seed))


@dataclass
class Proving(Groundwork):
    """A home in which a candidate is proven that no update trained."""

    def encode(self, learner: Learner, available: Available) -> UpdateRows:
        """Encode what there is time for; lone thumbs together, so that each finds its mismatch."""
        some = affordable(learner, available, self.config, self.budget)
        data = UpdateData(
            tuple(some.read(some.new)),
            (),
            tuple(some.read(some.new_held_out)),
            tuple(some.read(sample(some.old_held_out, self.config.gate.max_old_pairs))),
        )
        ordinary = (one for one in some.ordinary(data.all()) if one.held_out)
        return encode(learner, replace(data, ordinary=tuple(ordinary)))

    def prove(
        self,
        learner: Learner,
        by: By[EncodedExample],
        rows: UpdateRows,
        checks: Mapping[str, UserCheck],
        live: str | None,
        *,
        trained: Sequence[EncodedExample],
    ) -> Proven:
        """Let the gate decide on the candidate, and write down what it says."""
        from agentpref.prove import behaviour
        from agentpref.prove.gain import without_gain

        new, old, evidence, result = judge(
            learner,
            by.rows,
            rows.old_held_out,
            trained=trained,
            ordinary=rows.ordinary_held_out,
            checks=checks,
            scorers=self.scorers or {},
            config=self.config,
            looks=self.updates.looks(self.namespace, live),
        )
        told = {
            "verdict": result.verdict,
            "accuracy": (new if by.learned else new.joined(old)).by_tag(),
            "retained": old.by_tag(),
            "behaviour": behaviour.told(evidence),
            "checks": result.to_mapping()["checks"],
            "gain": dict(result.gain),
        }
        idle = without_gain(new.by_tag()) if result.verdict == "passed" else ()
        notes = (*new.notes(), *idle, *evidence.notes)
        return Proven(told, new.counted_thumbs(), notes, evidence.shown)


def encode(learner: Learner, data: UpdateData) -> UpdateRows:
    """The rows of some data, as the learner's policies are asked them."""
    rows = {row.example.example_id: row for row in learner.encode(data.all())}

    def of(examples: Sequence[Example]) -> list[EncodedExample]:
        return [rows[e.example_id] for e in examples if e.example_id in rows]

    return UpdateRows(
        data,
        new=of(data.new),
        new_held_out=of(data.new_held_out),
        old_held_out=of(data.old_held_out),
        ordinary_held_out=learner.encode(data.ordinary),
    )
