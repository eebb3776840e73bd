"""One attempt of an update: choose what to learn, train a candidate on it, and prove it.

An attempt knows nothing of the home: it works with a learner, and returns what it did and what the
gate says. The pipeline decides whether another one follows, and what becomes of the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from agentpref.budget import Budget, choose
from agentpref.config import UpdateConfig
from agentpref.errors import TrainingDiverged
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn.checkpoint import Checkpoint
from agentpref.learn.data import Available, UpdateRows, prepare
from agentpref.learn.process import Interrupts
from agentpref.learn.resume import StartedUpdate
from agentpref.models.threads import Share

if TYPE_CHECKING:
    from agentpref.learn.learner import Learner
    from agentpref.learn.trainer import TrainingReport
    from agentpref.prove.checks import UserCheck
    from agentpref.prove.results import GateResult


@dataclass(frozen=True, slots=True)
class Proof:
    """What the gate says of a candidate, and what a report tells beside its checks."""

    result: GateResult
    accuracy: dict[str, dict[str, float]]
    evaluated_thumbs: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tried:
    """What an attempt did: its rows, and its training and proof if anything could be trained."""

    rows: UpdateRows
    training: TrainingReport | None = None
    proof: Proof | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What the attempts of one update work with.

    ``conditions`` are the facts that must be the same when an interrupted one resumes.
    """

    update_id: str
    created_at: float
    learner: Learner
    config: UpdateConfig
    checks: Mapping[str, UserCheck]
    budget: Budget
    checkpoint: Checkpoint
    interrupts: Interrupts
    share: Share
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def attempt(self, available: Available, started: StartedUpdate | None) -> Tried:
        """Learn what is available, or what an interrupted update had started with, and prove it.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            KeyboardInterrupt: a signal came; the state of the training is saved.
        """
        if started is None:
            rows = choose(self.learner, available, self.config, self.budget)
        else:
            rows = prepare(self.learner, available, started.data, self.config)
        if not rows.new:
            return Tried(rows)
        training = self._train(rows)
        rows = rows.only(self.learner.reached)
        return Tried(rows, training, self._prove(rows, training))

    def _train(self, rows: UpdateRows) -> TrainingReport:
        from agentpref.learn.trainer import Limits

        learner = self.learner
        started = StartedUpdate(self.update_id, self.created_at, rows.data, self.share.threads)
        self.checkpoint.about = started.freeze(self.conditions)
        if self.config.max_minutes is not None:
            learner.score("base", rows.trained)  # which is no part of the time for training
        seconds = self.budget.for_training(learner, rows.held_out or rows.trained)
        limits = Limits(seconds, self.interrupts, self.budget.clock)
        try:
            return learner.fit(
                rows.trained, new=len(rows.new), checkpoint=self.checkpoint, limits=limits
            )
        except TrainingDiverged:
            checkpoints.remove(self.checkpoint.path)  # it would only diverge again
            raise

    def _prove(self, rows: UpdateRows, training: TrainingReport) -> Proof:
        """Evaluate the candidate, and decide on it."""
        from agentpref.prove import evaluate, gate

        learner, config = self.learner, self.config
        kl = evaluate.kl_from_base(learner, rows.held_out or rows.new, seed=config.seed)
        new = evaluate.score(learner, rows.new_held_out)
        old = evaluate.score(learner, rows.old_held_out)
        evidence = evaluate.gather(
            learner,
            new,
            old,
            kl=kl,
            trained=rows.new,
            checks=self.checks,
            config=config,
            cut_short=training.stopped == "time",
        )
        result = gate.judge(evidence, config.gate, seed=config.seed)
        notes = (*new.notes(), *evidence.notes)
        return Proof(result, new.joined(old).by_tag(), new.counted_thumbs(), notes)

    def told(self, tried: Tried) -> dict[str, Any]:
        """The fields of a report that an attempt fills."""
        if tried.training is None or tried.proof is None:
            return {"verdict": "nothing_usable"}
        result = tried.proof.result
        return {
            "verdict": result.verdict,
            "accuracy": tried.proof.accuracy,
            "training": asdict(tried.training) | self.share.to_mapping(),
            "checks": result.to_mapping()["checks"],
        }
