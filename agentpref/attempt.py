"""The attempts of an update: each chooses what to learn, trains a candidate on it, and proves it.

An attempt knows nothing of the home: it works with a learner, and returns what it did and what the
gate says. What failed decides whether another one follows (``retry.py``); the last one counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agentpref.budget import Budget, choose
from agentpref.changes import find_changes
from agentpref.config import UpdateConfig
from agentpref.errors import TrainingDiverged
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn.checkpoint import Checkpoint
from agentpref.learn.data import Available, UpdateRows, prepare
from agentpref.learn.losses import load_loss
from agentpref.learn.process import Interrupts
from agentpref.learn.resume import StartedUpdate
from agentpref.models.threads import Share
from agentpref.prefer.strata import Listed
from agentpref.record.asides import Refusal
from agentpref.retry import AtFault, Plan, follow_up, idle, narrowed, only_undecided

if TYPE_CHECKING:
    import sqlite3

    from agentpref.learn.learner import Learner
    from agentpref.learn.trainer import TrainingReport
    from agentpref.prove.checks import Scorer, UserCheck
    from agentpref.prove.evaluate import Scores
    from agentpref.prove.evidence import EarnedEvidence
    from agentpref.prove.known import Known
    from agentpref.prove.results import GateResult

_logger = logging.getLogger("agentpref")


@dataclass(frozen=True, slots=True)
class Proof:
    """What the gate says of a candidate, and what a report tells beside its checks.

    ``new`` are the scores of the new held-out examples, and ``odd`` the tags in which most chosen
    answers are such as nobody can have meant.
    """

    result: GateResult
    new: Scores
    accuracy: dict[str, dict[str, float]]
    retained: dict[str, dict[str, float]]
    evaluated_thumbs: int
    behaviour: dict[str, Any] = field(default_factory=dict)
    shown: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    odd: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Tried:
    """What an attempt did: its rows, and its training and proof if there was anything to train.

    ``available`` are the examples as they were sorted for it. ``idle`` are those that a candidate
    which passed shows no gain in.
    """

    plan: Plan
    available: Available
    rows: UpdateRows
    training: TrainingReport | None = None
    proof: Proof | None = None
    idle: AtFault | None = None

    def idle_of(self, groups: Mapping[str, Sequence[Listed]]) -> tuple[Listed, ...]:
        """Of the examples that trained and proved it, those that it shows no gain in."""
        ids = frozenset() if self.idle is None else self.idle.examples
        used = (*groups["trained"], *groups["new_evaluated"])
        return tuple(one for one in used if one.example_id in ids)


@dataclass(frozen=True, slots=True)
class Bench:
    """What the attempts of one update work with.

    ``was_tried`` names the examples that earlier updates tried, and ``looks`` counts how often they
    looked whether something better than live is proven. ``conditions`` are the facts that
    must be the same when an interrupted update resumes. ``earned`` asks logged answers about the
    candidate.
    """

    update_id: str
    created_at: float
    live: str | None
    learner: Learner
    config: UpdateConfig
    checks: Mapping[str, UserCheck]
    scorers: Mapping[str, Scorer]
    budget: Budget
    checkpoint: Checkpoint
    interrupts: Interrupts
    share: Share
    was_tried: Callable[[], Collection[str]] = frozenset
    looks: int = 0
    conditions: Mapping[str, Any] = field(default_factory=dict)
    earned: Callable[[], EarnedEvidence | None] = lambda: None

    def plan(
        self,
        available: Available,
        connection: sqlite3.Connection,
        refusals: Sequence[Refusal],
    ) -> Plan:
        """The first attempt: without what was set aside, and with all that live has learned.

        Args:
            available: all the examples there are.
            connection: to the home, which knows who judged them.
            refusals: what is set aside, by the update that did it.
        """
        aside = frozenset(one.example_id for one in available.aside)
        aged = frozenset(one.example_id for one in available.aged)
        if self.live is None:
            return Plan(aside=aside, aged=aged)
        changes = find_changes(
            self.learner, available, connection, refusals, self.live, self.config
        )
        return Plan(
            aside=aside - changes.back,
            aged=aged,
            turn=changes.turn,
            undecided=changes.undecided,
            changed=changes.told,
            notes=changes.notes,
        )

    def run(self, available: Available, plan: Plan, started: StartedUpdate | None) -> Tried:
        """Make one attempt after the other, until one passes or none would help.

        Args:
            available: all the examples there are.
            plan: the first attempt, or the one that an interrupted update was at.
            started: that update.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            KeyboardInterrupt: a signal came; the state of the training is saved.
        """
        while True:
            begun = self.budget.spent()
            if plan.number > 1:
                self.learner.restart(plan.start)
            tried = self._attempt(available, plan, started)
            following = self._following(tried, self.budget.spent() - begun)
            if isinstance(following, Tried):
                return following
            plan, started = following, None
            available = available.sorted_anew(aside=plan.aside, aged=plan.aged)
            self.checkpoint.supersede()
            self.learner.shortened.clear()  # which each attempt counts anew
            self.learner.retokenized.clear()

    def _following(self, tried: Tried, seconds: float) -> Plan | Tried:
        """The plan of the next attempt; or what was tried, as the update's last."""
        plan, proof = tried.plan, tried.proof
        if proof is None or tried.training is None:
            return tried
        told, found, verdict = _told(tried), None, proof.result.verdict
        of_new, confidence = (proof.new, tried.available, self.was_tried), self._confidence
        if verdict == "refused" or (verdict == "insufficient" and plan.turn):
            found = follow_up(
                plan,
                proof.result.checks,
                *of_new,
                can_refit=self.live is not None and bool(self.config.replay.minimum),
                can_imitate=self._can_imitate(tried.rows),
                confidence=confidence,
                odd=proof.odd,
            )
        elif verdict == "insufficient":
            found = narrowed(plan, *of_new, confidence=confidence)
        elif verdict == "passed" and (left := idle(*of_new, confidence=confidence)) is not None:
            tried, told["no_gain"] = replace(tried, idle=left), [*left.words]
        if found is not None:
            following, why = found
            if self._has_time(tried, following, seconds):
                return replace(following, told=(*plan.told, {**told, "next": why}))
            told["next"] = f"none: max_minutes leaves no time for another attempt ({why})"
        if verdict == "refused" and only_undecided(plan, proof.result):
            proof = replace(proof, result=replace(proof.result, verdict="insufficient"))
            told["verdict"] = "insufficient"
        plan = replace(plan, told=(*plan.told, told))
        if proof.result.verdict == "refused" and plan.waits:
            plan = replace(plan, aside=plan.aside - plan.waits)
            sorted_anew = tried.available.sorted_anew(aside=plan.aside, aged=plan.aged)
            tried = replace(tried, available=sorted_anew)
        return replace(tried, proof=proof, plan=plan)

    @property
    def _confidence(self) -> float:
        return self.config.gate.confidence

    def _can_imitate(self, rows: UpdateRows) -> bool:
        reads = getattr(load_loss(self.config.loss.kind), "reads", frozenset[str]())
        return "nll" in reads and any(not row.example.lone for row in rows.new)

    def _has_time(self, tried: Tried, following: Plan, seconds: float) -> bool:
        """Whether the time that is left lets another attempt end, if it costs as much by row."""
        rows = len(tried.rows.trained)
        if following.start == "base":
            old = min(len(tried.available.old), self.config.replay.refit)
            rows = max(rows, len(tried.rows.new) + old)
        rows = rows * following.longer // tried.plan.longer
        return self.budget.left() >= seconds * rows / max(1, len(tried.rows.trained))

    def _attempt(self, available: Available, plan: Plan, started: StartedUpdate | None) -> Tried:
        """Learn what is available, or what an interrupted update had started with, and prove it."""
        from agentpref.prove import probes
        from agentpref.prove.asked import asked

        refits = plan.start == "base"
        replay = self.config.replay.refit if refits else None
        if started is None:
            rows = choose(self.learner, available, self.config, self.budget, replay=replay)
        else:
            rows = prepare(self.learner, available, started.data, self.config)
        if not rows.new:
            return Tried(plan, available, rows)
        known = self._knows(rows, plan)
        if plan.number == 1 and started is None:
            judged = probes.judged(
                self.learner, [*rows.new_held_out, *rows.new], seed=self.config.seed
            )
            means_it = not any(odd.rules for odd in judged.odd)
            if known.all and means_it and not asked(judged.answers):
                data = replace(rows.data, ordinary=())  # nothing is anchored
                rows = UpdateRows(data, known=[*rows.new, *rows.new_held_out])
                note = (
                    f"{self.live} is right about {known.right} of {known.prompts} new prompts "
                    "already, so there is nothing to gain; they count as learned"
                )
                return Tried(replace(plan, notes=(*plan.notes, note)), available, rows)
            for odd in judged.odd:  # said before the work; the report says it again
                _logger.warning("%s", odd.warning)
        training = self._train(rows, plan)
        rows = rows.only(self.learner.reached)
        proof = self._prove(rows, training, plan, known)
        return Tried(plan, available, rows, training, proof)

    def _knows(self, rows: UpdateRows, plan: Plan) -> Known:
        """What live is right about of what is new; nothing, where minds may have changed."""
        from agentpref.prove.known import Known, known

        if self.live is None or plan.turn or plan.undecided:
            return Known()
        return known(self.learner, rows.new_held_out, rows.new, risk=1 - self._confidence)

    def _train(self, rows: UpdateRows, plan: Plan) -> TrainingReport:
        from agentpref.learn.trainer import Limits

        learner = self.learner
        started = StartedUpdate(
            self.update_id, self.created_at, rows.data, self.share.threads, plan.freeze()
        )
        self.checkpoint.about = started.freeze(self.conditions)
        if self.config.max_minutes is not None:
            learner.score("base", [*rows.new, *rows.old])  # before the time for training
        proving = [*(rows.held_out or rows.trained), *rows.ordinary_held_out]
        seconds = self.budget.for_training(learner, proving)
        limits = Limits(seconds, self.interrupts, self.budget.clock)
        try:
            return learner.fit(
                rows.trained,
                new=len(rows.new),
                longer=plan.longer,
                imitation=plan.imitation,
                checkpoint=self.checkpoint,
                limits=limits,
            )
        except TrainingDiverged:
            checkpoints.remove(self.checkpoint.path)  # it would only diverge again
            raise

    def _prove(self, rows: UpdateRows, training: TrainingReport, plan: Plan, known: Known) -> Proof:
        """Evaluate the candidate, and decide on it; other attempts count as looks."""
        from agentpref.learn.trainer import Limits
        from agentpref.prove import behaviour, crossfit, evaluate
        from agentpref.prove.gain import without_gain

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
            scorers=self.scorers,
            config=config,
            ordinary=rows.ordinary_held_out,
            cut_short=training.stopped == "time",
        )
        left = None if self.budget.limit is None else self.budget.left()
        evidence, result = crossfit.decide(
            learner,
            rows,
            replace(
                evidence,
                looks=self.looks + plan.looks,
                choices=plan.choices,
                known=known.nothing_to_gain,
                untold=known.untold,
                earned=self.earned(),
            ),
            training=training,
            config=config,
            limits=Limits(left, self.interrupts, self.budget.clock),
        )
        return Proof(
            result,
            new,
            new.joined(old).by_tag(),
            old.by_tag(),
            new.counted_thumbs(),
            behaviour.told(evidence),
            evidence.shown,
            (
                *new.notes(),
                *(without_gain(new.by_tag()) if result.verdict == "passed" else ()),
                *evidence.notes,
            ),
            frozenset().union(*(odd.tags for odd in evidence.odd if odd.rules)),
        )

    def told(self, tried: Tried) -> dict[str, Any]:
        """The fields of a report that the last attempt fills."""
        plan = tried.plan
        found = {"attempts": [*plan.told], "changed": [*plan.changed]}
        if tried.training is None or tried.proof is None:
            return {**found, "verdict": "nothing_to_gain" if tried.rows.known else "nothing_usable"}
        result = tried.proof.result
        return {
            **found,
            "verdict": result.verdict,
            "accuracy": tried.proof.accuracy,
            "retained": tried.proof.retained,
            "behaviour": tried.proof.behaviour,
            "training": {
                **asdict(tried.training),
                "start": plan.start if self.live is not None else "base",
                **self.share.to_mapping(),
            },
            "checks": result.to_mapping()["checks"],
            "gain": dict(result.gain),
        }


def _told(tried: Tried) -> dict[str, Any]:
    """What a report says of one attempt, without the words of a user's check.

    Those may quote what was logged, and states of training hold no text.
    """
    plan, training, proof = tried.plan, tried.training, tried.proof
    assert training is not None
    assert proof is not None
    failed = [one for one in proof.result.checks if not one.passed]
    return {
        "attempt": plan.number,
        "start": plan.start,
        "longer": plan.longer,
        "imitation": plan.imitation,
        "without": [*plan.without],
        "odd": sorted(proof.odd),
        "verdict": proof.result.verdict,
        "trained": len(tried.rows.new),
        "replayed": len(tried.rows.old),
        "steps": training.steps,
        "seconds": training.seconds,
        "accuracy": proof.accuracy,
        "failed": [
            one.name if one.name.startswith("check ") else f"{one.name}: {one.message}"
            for one in failed
        ],
    }
