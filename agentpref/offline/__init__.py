"""Offline reinforcement learning: what whole conversations earned, as an adapter.

Thumbs speak of one answer; an agent is judged by how the conversation ends. So an update with a
``method`` reads logged conversations as decisions with rewards, values them by a critic on the
frozen base's features, and trains a candidate to give the answers that lead to what was rewarded:
beside replay of everything that live has learned, within the KL penalty. The gate asks whether
held-out conversations would earn more with it. What users and tools said is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.accounting import account, there, with_account
from agentpref.aside import with_aside
from agentpref.attempt import Proof
from agentpref.earned import compared
from agentpref.groundwork import Groundwork, Stock
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn import resume
from agentpref.learn.checkpoint import Checkpoint
from agentpref.learn.data import Available, UpdateRows, prepare
from agentpref.learn.resume import StartedUpdate
from agentpref.models.threads import Share, sharing
from agentpref.offline import values
from agentpref.offline.answers import own_only
from agentpref.offline.decisions import Conversations, scored
from agentpref.offline.methods import load_method
from agentpref.outcome import Outcome
from agentpref.prefer.strata import Listed
from agentpref.record.messages import as_json
from agentpref.record.updates import Role
from agentpref.repeats import digests
from agentpref.serve.decisions import digests_of
from agentpref.serve.validate import check_revision
from agentpref.traces import RewardSpec, read_traces
from agentpref.types import THUMBS, Example, UpdateReport, Verdict

if TYPE_CHECKING:
    from agentpref.learn.learner import Learner
    from agentpref.learn.trainer import TrainingReport
    from agentpref.offline.valuing import Valued
    from agentpref.prove.checks import UserCheck
    from agentpref.prove.evidence import ValueEvidence
    from agentpref.serve.backend import Revision


LARGEST = 1e9
"""The most that a conversation may earn, or lose: beyond, sums of squares lose what is small."""


@dataclass
class Offline(Groundwork):
    """An update that learns from conversations, while it runs."""

    def run(self) -> UpdateReport:
        """Go through the update in order."""
        # 1. What serves, and which conversations somebody said the worth of.
        stock = self.take_stock(again=self.wishes.again)
        serving, live, _, refusals, available, report = stock
        settings = self.config.offline
        spec = RewardSpec(settings.rewards, settings.cost, settings.tool_error, settings.gamma)
        read = read_traces(self.home, spec, namespace=self.namespace, limit=settings.conversations)
        logged = scored(read.traces, self.config.held_out, settings.gamma)
        odd = {f"conversation_{reason}": n for reason, n in read.odd.items() if n}
        report = replace(
            report,
            update_id=self.update_id,
            created_at=self.created_at,
            left_out={**report.left_out, **logged.left_out, **odd},
        )
        self._take_declared(report, logged)
        why = self._nothing(logged, serving.live)
        if why is not None:
            from agentpref.models.base import find_base

            find_base(self.model)  # a wrong name is said in this case, too
            verdict, note = why
            report = replace(report, verdict=verdict, notes=[*report.notes, note])
            return self.trace.end(self.connection, with_aside(report, refusals, available))

        # 2. The base, and what the method makes of the conversations.
        checks = self.load_parts()
        adapter = None if live is None else check_revision(live)
        base = self.load_base(live)
        with sharing() as share:
            from agentpref.offline.valuing import value

            learner = self.learner(base, live, adapter)
            valued = value(learner, logged, self.config, self._held_out_prompts)
            mine = self._sort(stock, valued, self._learned(serving.live, "new", "held_out"))

            # 3. Train beside replay, and prove.
            rows = prepare(learner, mine, None, self.config)
            report = replace(report, counts=there(mine))
            report.left_out.update(valued.left_out)
            if not rows.new:
                groups = self._account(stock, mine, valued, rows, learner)
                report = replace(report, notes=[*report.notes, *valued.notes])
                report = with_account(replace(report, verdict="nothing_usable"), learner, groups)
                return self.trace.end(self.connection, report)
            training = self._train(learner, rows, share, serving.live)
            rows = rows.only(learner.reached)
            looks = self.updates.looks(self.namespace, serving.live)
            proof, evidence = self._prove(learner, valued, rows, checks, training, looks, live)
            moved, alarms = self.shift(learner, rows)
        groups = self._account(stock, mine, valued, rows, learner)
        report = with_aside(with_account(report, learner, groups), refusals, available)
        report = replace(
            report,
            verdict=proof.result.verdict,
            accuracy=proof.accuracy,
            retained=proof.retained,
            behaviour=proof.behaviour,
            checks=proof.result.to_mapping()["checks"],
            gain=dict(proof.result.gain),
            training={
                **asdict(training),
                "start": "live" if live is not None else "base",
                "method": self.config.method,
                "data": logged.digest,
                "conversations": len(logged.side(held_out=False)),
                "held_out": len(logged.side(held_out=True)),
                "imitated": len(rows.new) + sum(row.example.decision for row in rows.old),
                **valued.told,
                "value": asdict(evidence),
                "shift": moved,
                **share.to_mapping(),
            },
            notes=[*report.notes, *valued.notes, *alarms, *proof.notes],
            seconds=self.budget.spent(),
        )

        # 4. Record, publish and serve it: all of it or nothing.
        outcome = Outcome(report, groups, self.wishes, proof.shown)
        report = outcome.settle(self.registry, self.connection, learner, serving)
        if valued.q is not None and report.revision is not None:
            values.keep(self.home, self.namespace, report.revision, *valued.q, base)
        checkpoints.remove(self._path)
        return report

    def _take_declared(self, report: UpdateReport, logged: Conversations) -> None:
        """Scores that are rewards are used, though no preference is made of them."""
        runs = as_json([*logged.examples])
        keys = as_json([*self.config.offline.rewards])
        query = """SELECT count(*) FROM feedback WHERE key IN (SELECT value FROM json_each(?))
            AND key <> ? AND run_id IN (SELECT value FROM json_each(?))"""
        (used,) = self.connection.execute(query, (keys, THUMBS, runs)).fetchone()
        left = report.left_out.pop("undeclared_key", 0) - used
        if left > 0:
            report.left_out["undeclared_key"] = left

    def _nothing(self, logged: Conversations, live: str | None) -> tuple[Verdict, str] | None:
        """Why there is nothing to learn: the verdict, and what is said of it."""
        keys = ", ".join(map(repr, self.config.offline.rewards))
        if not logged.traces:
            return "nothing_usable", (
                f"no conversation of {self.namespace!r} has a score under {keys}: log some by "
                "log.feedback(run_id, key=…, score=…), or name other keys: offline.rewards "
                "(--reward)"
            )
        worth = [trace.value(self.config.offline.gamma) for trace in logged.traces]
        if (most := max(map(abs, worth))) > LARGEST:
            return "nothing_usable", (
                f"a conversation earned or lost {most:.3g}, and more than {LARGEST:g} cannot be "
                f"told from less: correct that score, or give its key a small weight ({keys})"
            )
        if load_method(self.config.method).follows and max(worth) <= 0:
            return "nothing_usable", (
                f"{self.config.method} learns from demonstrations, which are conversations whose "
                f"rewards come to more than 0, and none of {len(worth)} does: name the key of a "
                f"score that marks them ({keys})"
            )
        is_flat = max(worth) - min(worth) <= 1e-12 * max(map(abs, worth))
        if is_flat and load_method(self.config.method).compares:
            return "nothing_usable", (
                f"all {len(worth)} conversations earned {worth[0]:.3g}, so nothing says which "
                f"answers are better: name rewards that differ ({keys})"
            )
        if not logged.side(held_out=False):
            return "nothing_usable", (
                f"all {len(logged.traces)} conversations are held out, to prove what others train: "
                "collect more"
            )
        fresh = {example.example_id for example in logged.examples.values()}
        fresh -= self._learned(live, "new", "held_out", "anchor")
        if not fresh:
            return "nothing_new", "live has learned from all of these conversations by this method"
        if not self.wishes.again and (tried := self._tried(logged, live)) is not None:
            return "nothing_new", (
                f"update {tried} tried these conversations with the same settings and model; the "
                "same command with --again repeats it"
            )
        return None

    def _learned(self, live: str | None, *roles: Role) -> set[str]:
        """The decisions that live has learned from by the same method and rewards."""
        config = self.trace.report.config
        return self.updates.learned_by_method(live, config["method"], config["offline"], roles)

    def _tried(self, logged: Conversations, live: str | None) -> str | None:
        """The update that tried just these decisions in the same way, if there is one."""
        for name, report in self.updates.tried_on(self.namespace, live, logged.digest):
            is_same = report["config"] == self.trace.report.config
            if is_same and digests_of(report.get("base") or {}) == digests(self.trace.report):
                return name
        return None

    @cached_property
    def _held_out_prompts(self) -> frozenset[str]:
        """The prompts on which people's judgements are held out; no answer to one is trained."""
        query = "SELECT DISTINCT prompt FROM example WHERE namespace = ? AND point < ?"
        found = self.connection.execute(query, (self.namespace, self.config.held_out))
        return frozenset(prompt for (prompt,) in found)

    def _sort(self, stock: Stock, valued: Valued, learned: set[str]) -> Available:
        """The decisions beside what live has learned; new judgements wait for another update."""
        available, catalog = stock.available, stock.catalog

        def read(some: Sequence[Listed]) -> list[Example]:
            listed = [one for one in some if not isinstance(one, Example)]
            whole = {one.example_id: one for one in catalog.read(listed)}  # type: ignore[arg-type]
            found = (one if isinstance(one, Example) else whole.get(one.example_id) for one in some)
            return [one for one in found if one is not None]

        def part(examples: Sequence[Example], *, old: bool) -> tuple[Example, ...]:
            return tuple(one for one in examples if (one.example_id in learned) is old)

        return replace(
            available,
            new=part(valued.trained, old=False),
            new_held_out=part(valued.held_out, old=False),
            old=(*available.old, *part(valued.trained, old=True)),
            old_held_out=(*available.old_held_out, *part(valued.held_out, old=True)),
            read=read,
        )

    @property
    def _path(self) -> Path:
        return checkpoints.path_of(self.home.training, self.namespace)

    def _train(
        self, learner: Learner, rows: UpdateRows, share: Share, live: str | None
    ) -> TrainingReport:
        """Train, and keep the state: the next update by the method on the same data resumes."""
        from agentpref.learn.trainer import Limits

        needed = resume.conditions(self.namespace, live, learner.base, self.config)
        started = StartedUpdate(self.update_id, self.created_at, rows.data, share.threads)
        kept = Checkpoint(self._path, started.freeze(needed))
        proving = [*(rows.held_out or rows.new), *rows.ordinary_held_out]
        limits = Limits(
            self.budget.for_training(learner, proving), self.interrupts, self.budget.clock
        )
        trained = [
            # KTO alone reads the answer to another prompt, and decisions are cloned.
            own_only(row) if row.example.decision else row
            for row in rows.trained
        ]
        return learner.fit(trained, new=len(rows.new), checkpoint=kept, limits=limits)

    def _prove(
        self,
        learner: Learner,
        valued: Valued,
        rows: UpdateRows,
        checks: Mapping[str, UserCheck],
        training: TrainingReport,
        looks: int,
        live: Revision | None,
    ) -> tuple[Proof, ValueEvidence]:
        """Evaluate the candidate, and let the gate decide on it."""
        from agentpref.offline.proof import prove
        from agentpref.prove import behaviour, evaluate, gate

        config = self.config
        kl = evaluate.kl_from_base(learner, rows.held_out or rows.new, seed=config.seed)
        new, old = (
            evaluate.score(learner, some) for some in (rows.new_held_out, rows.old_held_out)
        )
        found = evaluate.gather(
            learner,
            new,
            old,
            kl=kl,
            trained=rows.new,
            checks=checks,
            scorers=self.scorers or {},
            config=config,
            ordinary=rows.ordinary_held_out,
            cut_short=training.stopped == "time",
        )
        evidence = prove(learner, valued.reader, valued.proving, config)
        # Rewards are no wishes: that good answers are much alike is no slip of anybody.
        slips = {odd.warning for odd in found.odd}
        found = replace(
            found,
            looks=looks,
            value=evidence,
            odd=(),
            earned=compared(self.connection, self.namespace, learner, live),
        )
        result = gate.judge(found, config.gate, seed=config.seed)
        return (
            Proof(
                result,
                new,
                new.joined(old).by_tag(),
                old.by_tag(),
                0,
                behaviour.told(found),
                found.shown,
                tuple(note for note in found.notes if note not in slips),
            ),
            evidence,
        )

    def _account(
        self,
        stock: Stock,
        mine: Available,
        valued: Valued,
        rows: UpdateRows,
        learner: Learner,
    ) -> dict[str, Sequence[Listed]]:
        """What became of every example; decisions that weigh nothing decided what others do."""
        groups: dict[str, Sequence[Listed]] = dict(account(mine, rows, learner.objections))
        new = (*stock.available.new, *stock.available.new_held_out)
        groups["waiting"] = [*groups["waiting"], *new]
        groups["valued"] = valued.idle
        return groups
