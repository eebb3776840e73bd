"""One update, end to end: record → prefer → learn → prove → serve.

This is the only module that knows all the parts. It decides their order and what is handed from
one to the next, holds the home while it works, and leaves either everything or nothing behind.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.config import UpdateConfig
from agentpref.errors import TrainingDiverged, UpdateInterrupted, WrongBase
from agentpref.home import Home
from agentpref.learn import resume
from agentpref.learn import state as states
from agentpref.learn.interrupts import Interrupts
from agentpref.learn.process import LOADING
from agentpref.learn.team import Team, assembled
from agentpref.lessons import Lessons, prepare
from agentpref.prefer.night import Agenda, Night, count
from agentpref.prefer.pairs import PairSet, read_pairs
from agentpref.record.database import connect, exclusive, translated
from agentpref.record.messages import new_id
from agentpref.record.spill import drain
from agentpref.record.store import Store
from agentpref.record.updates import Role, UpdateRow, Updates
from agentpref.report import Outcome, UpdateReport
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.types import BASE, Example, Progress

if TYPE_CHECKING:
    import sqlite3

    from agentpref.learn.adapter import Policy
    from agentpref.learn.cache import LogpCache
    from agentpref.learn.learner import Learner
    from agentpref.learn.trainer import Limits, TrainingReport
    from agentpref.models.base import BaseModel
    from agentpref.prove.checks import Check

__all__ = ["Outcome", "UpdateReport", "update"]

_CANDIDATE = ".candidate-"


def update(
    home: str | Path | None = None,
    *,
    model: str,
    config: UpdateConfig | None = None,
    namespace: str = "default",
    checks: Mapping[str, Check] | None = None,
    progress: Progress | None = None,
) -> UpdateReport:
    """Learn from what was logged since the live revision was trained, and serve it if it is better.

    An update that was interrupted or killed while it trained is gone on with, on what it had begun
    with; what came in since waits for the next one. While it runs in the main thread it
    takes SIGINT and SIGTERM where they are at Python's defaults, to end between two steps.

    Where a launcher (``accelerate launch``, ``torchrun``) started this program several times, all
    processes call this and train together. The first one alone works on the home; in the others
    ``checks`` and ``progress`` are not called, and it ends with the same report or error.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        model: ``"tiny"``, a folder of safetensors, or a name on a model hub.
        config: settings; the defaults are meant to be kept.
        namespace: whose feedback, and whose live revision.
        checks: your own checks by name; ``None`` runs those that installed packages offer.
        progress: called with ``(stage, done, total)`` as work goes on.

    Returns:
        The report. ``nothing_new`` means that nothing came in since the last update;
        ``insufficient`` leaves a revision that may be canaried but does not serve.

    Raises:
        NotAHome: there is no home in the folder.
        UpdateRunning: another update holds the home.
        RevisionError: the live revision is tainted by what was forgotten since.
        ModelNotFound: the model resolves to nothing.
        WrongBase: the live revision was trained on another base.
        TrainingDiverged: the loss is no longer finite.
        UpdateInterrupted: a signal came; the next update goes on with this one. In all these cases
            nothing was changed.
        UpdateError: another process that trains along is gone; the next update goes on from the
            state that was saved last.
    """
    with assembled() as team:
        if not team.main:
            from agentpref.learn.follower import follow

            return UpdateReport(**follow(team))
        report = _lead(
            team, Home.open(home), model, config or UpdateConfig(), namespace, checks, progress
        )
        team.dismiss(report.to_mapping())
        return report


def _lead(
    team: Team,
    place: Home,
    model: str,
    settings: UpdateConfig,
    namespace: str,
    checks: Mapping[str, Check] | None,
    progress: Progress | None,
) -> UpdateReport:
    """Hold the home, and go through one update."""
    interrupts = Interrupts()
    try:
        with (
            interrupts.listening(),
            exclusive(place),
            translated(place),
            closing(connect(place)) as connection,
        ):
            drain(place)
            _sweep(place)
            return _Update(
                place, connection, model, settings, namespace, checks, progress, interrupts, team
            ).run()
    except KeyboardInterrupt as error:
        words = f"interrupted; {resume.outlook(states.path_of(place.training, namespace))}"
        raise UpdateInterrupted(words, interrupts.signum or signal.SIGINT) from error


class _Update:
    """One update while it runs: the parts that it brings together."""

    def __init__(
        self,
        home: Home,
        connection: sqlite3.Connection,
        model: str,
        config: UpdateConfig,
        namespace: str,
        checks: Mapping[str, Check] | None,
        progress: Progress | None,
        interrupts: Interrupts,
        team: Team,
    ) -> None:
        self.team = team
        self.home, self.connection, self.model, self.config = home, connection, model, config
        self.namespace, self.checks, self.interrupts = namespace, checks, interrupts
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.registry = Registry(home, namespace=namespace)
        self.updates = Updates(connection)
        self.checkpoint = states.Checkpoint(states.path_of(home.training, namespace))
        self.update_id, self.created_at = new_id(), time.time()
        self.began = time.monotonic()
        self.needed: dict[str, Any] = {}

    def run(self) -> UpdateReport:
        """Go through the night in order."""
        state = self.registry.state()
        live = None if state.live is None else self.registry.get(state.live)
        if live is not None:
            self.registry.require_untainted(live)
            self.registry.require_available(live)
        pairs = read_pairs(Store(self.connection), self.namespace, held_out=self.config.held_out)
        thumbs = pairs.thumbs if self.config.thumbs.weight else ()
        examples: tuple[Example, ...] = (*pairs.pairs, *thumbs)
        night = Night.of(examples, self.updates.learned_by(state.live))
        tried = self.updates.tried_on(self.namespace, state.live)
        is_new = bool(night.new) and night.fresh != tried
        base, begun = None, None
        if is_new or self.checkpoint.path.exists():
            self.checks = self._checks()  # a broken one is said before any work
            base = self._load_base(live)
            begun = self._begun(base, state.live, examples)
        report = self._report(night, begun, live, pairs)
        if base is None or not (is_new or begun):
            return report
        report, roles, agenda = self._learn_and_prove(report, base, live, night, begun)
        self._keep(report, roles, agenda)
        states.remove(self.checkpoint.path)
        if report.verdict == "promoted" and report.revision is not None:
            self.registry.promote(report.revision, expected_generation=state.generation)
        return report

    def _checks(self) -> Mapping[str, Check]:
        from agentpref.prove.checks import installed_checks

        return installed_checks() if self.checks is None else self.checks

    def _report(
        self, night: Night, begun: Agenda | None, live: Revision | None, pairs: PairSet
    ) -> UpdateReport:
        """The report as far as it is known before any work."""
        counts = night.counts()
        if begun is not None:
            counts |= count(new=begun.new, new_held_out=begun.new_held_out)
            known = {example.id for example in begun.all()}
            fresh = (*night.new, *night.new_held_out)
            counts |= count(waiting=[example for example in fresh if example.id not in known])
        left_out = dict(pairs.left_out)
        if pairs.thumbs and not self.config.thumbs.weight:
            left_out["thumbs_turned_off"] = len(pairs.thumbs)
        return UpdateReport(
            update_id=self.update_id,
            namespace=self.namespace,
            model=self.model,
            created_at=self.created_at,
            verdict="nothing_new",
            parent=live.revision_id if live is not None else None,
            counts=counts,
            left_out=left_out,
            notes=list(self.checkpoint.troubles),
        )

    def _learn_and_prove(
        self,
        report: UpdateReport,
        base: BaseModel,
        live: Revision | None,
        night: Night,
        begun: Agenda | None,
    ) -> tuple[UpdateReport, dict[str, Role], Agenda]:
        from agentpref.prove import exam, gate

        learner = self._learner(base, live)
        lessons = prepare(learner, night, begun)
        agenda = lessons.agenda
        if not lessons.new:
            return self._left_out(report, learner), _roles(agenda), agenda
        training = self._train(learner, lessons)
        kl = exam.distance(learner, lessons.held_out or lessons.new)
        marks = [exam.mark(learner, side) for side in (lessons.new_held_out, lessons.old_held_out)]
        evidence = exam.evidence(learner, *marks, kl=kl, trained=lessons.new, checks=self._checks())
        verdict = gate.judge(evidence, self.config.gate, seed=self.config.seed)
        done = replace(
            self._left_out(report, learner),
            verdict=verdict.verdict,
            counts=report.counts | lessons.counts() | {"examined_thumbs": marks[0].thumbs()},
            accuracy=marks[0].joined(marks[1]).by_tag(),
            training=asdict(training),
            checks=verdict.to_mapping()["checks"],
            notes=[*self.checkpoint.troubles, *marks[0].remarks()],
        )
        scores = self._cache(base, self.update_id)
        if verdict.verdict == "refused":
            scores.forget()
        else:
            done = replace(done, revision=self._publish(learner, live, done))
            scores.rename(str(done.revision))
        return done, _roles(agenda), agenda

    def _begun(
        self, base: BaseModel, live: str | None, examples: Sequence[Example]
    ) -> Agenda | None:
        """What an interrupted update had begun with, whose place this one then takes."""
        self.needed = resume.conditions(self.namespace, live, base, self.config)
        found = resume.find(self.checkpoint, self.needed, examples, ended=self.updates.has)
        if found is None:
            return None
        self.update_id, self.created_at = found.update_id, found.created_at
        self._cache(base, found.update_id).forget()  # of a candidate that may have been another
        return found.agenda

    def _train(self, learner: Learner, lessons: Lessons) -> TrainingReport:
        begun = resume.Begun(self.update_id, self.created_at, lessons.agenda)
        self.checkpoint.about = begun.freeze(self.needed)
        limits, new = self._limits(learner, lessons), len(lessons.new)
        try:
            return learner.fit(lessons.rows, new=new, checkpoint=self.checkpoint, limits=limits)
        except TrainingDiverged:
            states.remove(self.checkpoint.path)  # it would only diverge again
            raise

    def _limits(self, learner: Learner, lessons: Lessons) -> Limits:
        """Training's share of the budget: what is left of it now, less what the exam will take."""
        from agentpref.learn.trainer import Limits
        from agentpref.prove import exam

        if self.config.max_minutes is None:
            return Limits(interrupts=self.interrupts)
        rows = lessons.rows
        learner.score("base", rows)
        needed = exam.tokens_needed(lessons.held_out or rows) / learner.scoring_speed(rows)
        left = 60 * self.config.max_minutes - (time.monotonic() - self.began) - needed
        return Limits(seconds=max(0.0, left), interrupts=self.interrupts)

    def _left_out(self, report: UpdateReport, learner: Learner) -> UpdateReport:
        """The report with what could not be encoded as it was, and the time it took to see so."""
        return replace(
            report,
            left_out={**report.left_out, **learner.left_out},
            shortened=dict(learner.shortened),
            retokenised=dict(learner.retokenised),
            seconds=time.monotonic() - self.began,
        )

    def _load_base(self, live: Revision | None) -> BaseModel:
        from agentpref.models.base import load_base

        self.progress(LOADING, 0, 1)
        base = load_base(self.model, held_in=self.config.precision)
        self.progress(LOADING, 1, 1)
        _check_base(base, live)
        return base

    def _learner(self, base: BaseModel, live: Revision | None) -> Learner:
        from agentpref.learn.learner import Learner

        caches: dict[Policy, LogpCache] = {
            "base": self._cache(base, BASE),
            "live": self._cache(base, live.revision_id if live is not None else BASE),
            "candidate": self._cache(base, self.update_id),
        }
        folder = live.path if live is not None else None
        return Learner(
            base, folder, self.config, caches=caches, progress=self.progress, team=self.team
        )

    def _cache(self, base: BaseModel, policy: str) -> LogpCache:
        from agentpref.learn.cache import LogpCache

        return LogpCache(self.connection, base.numbers, policy)

    def _publish(self, learner: Learner, live: Revision | None, report: UpdateReport) -> str:
        with tempfile.TemporaryDirectory(dir=self.home.path, prefix=_CANDIDATE) as folder:
            learner.save(Path(folder))
            revision = self.registry.publish(
                folder,
                parent=live.revision_id if live is not None else None,
                model=learner.base.identity,
                training={"config": self.config.to_mapping(), **report.training},
                watermark={
                    "update_id": self.update_id,
                    "pairs": report.counts["new"],
                    "thumbs": report.counts["new_thumbs"],
                },
            )
        return revision.revision_id

    def _keep(self, report: UpdateReport, roles: dict[str, Role], agenda: Agenda) -> None:
        """Write the report into the ledger, and what each example was used for and made of."""
        self.updates.add(
            UpdateRow(
                update_id=report.update_id,
                namespace=report.namespace,
                created_at=report.created_at,
                finished_at=time.time(),
                parent=report.parent,
                candidate=report.revision,
                verdict=report.verdict,
                report=report.to_mapping(),
                pairs=roles,
                sources={
                    example.id: example.provenance
                    for example in agenda.all()
                    if example.id in roles
                },
            )
        )


def _roles(agenda: Agenda) -> dict[str, Role]:
    roles: dict[str, Role] = {example.id: "replay" for example in agenda.replayed}
    roles.update({example.id: "new" for example in agenda.new})
    roles.update({example.id: "held_out" for example in agenda.new_held_out})
    return roles


def _check_base(base: BaseModel, live: Revision | None) -> None:
    if live is None:
        return
    trained_on = live.manifest["base"]
    if any(trained_on[part] != base.identity[part] for part in ("digest", "template_digest")):
        raise WrongBase(
            f"{live.revision_id} was trained on {trained_on['name']!r}, whose weights or chat "
            f"template are not those of {base.name!r}; pass that model, or use a new namespace"
        )


def _sweep(home: Home) -> None:
    """Remove the halves that killed updates left. Call it with the home held."""
    states.sweep(home.training)
    for folder in home.path.glob(f"{_CANDIDATE}*"):
        shutil.rmtree(folder, ignore_errors=True)
