"""One update, from start to end: record → prefer → learn → prove → serve.

It reads what was logged, builds examples, trains a candidate, evaluates it, asks the gate, and
publishes and promotes what passes. It locks the home while it works, and leaves either everything
or nothing behind.

The module cannot be called ``update``: importing it would hide the function ``agentpref.update``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.accounting import account, there, with_account
from agentpref.aside import with_aside
from agentpref.attempt import Bench
from agentpref.config import PREFERENCES, UpdateConfig
from agentpref.earned import compared
from agentpref.groundwork import Groundwork, locked
from agentpref.home import Home
from agentpref.instructing import Instructing, beside
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn import resume
from agentpref.learn.checkpoint import Checkpoint
from agentpref.learn.process import Interrupts
from agentpref.learn.resume import StartedUpdate
from agentpref.learn.team import Team, assembled
from agentpref.models.threads import sharing
from agentpref.offline import Offline
from agentpref.outcome import Outcome, Wishes
from agentpref.prefer import ordinary, remarks
from agentpref.prefer.catalog import Catalog
from agentpref.prove import kl_budget
from agentpref.record import asides
from agentpref.record.journal import Trace
from agentpref.record.messages import new_id
from agentpref.repeats import stalled, without_examples
from agentpref.retry import Plan, following
from agentpref.serve.validate import check_revision
from agentpref.types import Example, Progress, UpdateReport

if TYPE_CHECKING:
    from agentpref.models.base import BaseModel
    from agentpref.prove.checks import Scorer, UserCheck


def update(
    home: str | Path | None = None,
    *,
    model: str,
    config: UpdateConfig | None = None,
    namespace: str = "default",
    checks: Mapping[str, UserCheck] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    progress: Progress | None = None,
    promote: bool = True,
    canary: float | None = None,
    again: bool = False,
    interrupts: Interrupts | None = None,
) -> UpdateReport:
    """Learn from what was logged since the live revision was trained, and serve it if it is better.

    An update that was interrupted or killed while it trained resumes with the data it started with;
    what came in since waits for the next one. In the main thread it handles SIGINT and SIGTERM,
    where they are at Python's defaults, and stops between two steps.

    Where a launcher (``accelerate launch``, ``torchrun``) started this program several times, all
    processes call this and train together. Only the first one works on the home and calls
    ``checks`` and ``progress``; all of them return the same report, or raise the same error.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        model: ``"tiny"``, a folder of safetensors, or a name on a model hub.
        config: settings; most users need no others than the defaults.
        namespace: whose feedback to learn from, and whose live revision to replace.
        checks: your own checks by name; ``None`` runs those of installed packages.
        scorers: your own scorers of answers by name, in the same way. A scorer takes the messages
            of a prompt and an answer, and returns a number, where larger is better.
        progress: called with ``(stage, done, total)`` as work goes on.
        promote: ``False`` publishes what passes the gate, and leaves what serves as it is.
        canary: let what passes serve this share of the threads (above 0 and at most 1), as a
            canary, instead of promoting it.
        again: repeat the last update although nothing is new since, after one that was refused, cut
            short, insufficient or rolled back. An update with other settings needs no such word.
        interrupts: ends the update from another thread, as a signal would: ``interrupts.ask(2)``.

    Returns:
        The report. Its ``verdict`` is ``promoted`` if the candidate was made live, and ``passed``
        if it passed the gate and was not: it was not to be, the namespace is held, people took the
        like of it back, or somebody changed what serves meanwhile. ``notes`` then say which, and
        name the command that makes it live. ``insufficient`` publishes a revision too.
        ``nothing_new`` means that nothing to learn from came in since the last update,
        ``nothing_usable`` that none of what came in can be trained, and ``nothing_to_gain`` that
        what serves is right about it, which then counts as learned. The home keeps the report, and
        an entry for an update that raises: ``agentpref updates`` lists all.

    Raises:
        ConfigError: ``canary`` is out of range, or given beside ``promote=False``; or the KL budget
            is to be what was measured, and nothing was.
        NotAHome: there is no home in the folder.
        UnknownNamespace: other namespaces are in the home, and this one is not.
        UpdateRunning: another update has locked the home.
        RevisionError: the live revision learned from text that was forgotten since.
        InvalidAdapter: the live revision's files are not those that were published.
        ModelNotFound: the model resolves to nothing, which is also said when nothing is new.
        WrongBase: the live revision was trained on another base.
        TrainingDiverged: the loss is no longer finite.
        UpdateInterrupted: a signal came; the next update resumes this one. In all these cases
            nothing was changed.
        UpdateError: another process of the team ended; the next update resumes from the state
            that was saved last.
    """
    wishes = Wishes.checked(promote, canary, again=again)
    with assembled() as team:
        if not team.main:
            from agentpref.learn.follower import follow

            return UpdateReport(**follow(team))
        place = Home.open(home)
        config = kl_budget.settled(config or UpdateConfig(), place, namespace)
        interrupts = interrupts or Interrupts()
        blank = UpdateReport(
            new_id(), namespace, model, time.time(), "nothing_new", None, config=config.to_mapping()
        )
        with (
            Trace(place, blank) as trace,
            locked(place, namespace, interrupts) as connection,
            ExitStack() as stack,
        ):
            ground = (place, connection, model, config, namespace, checks, scorers)
            told = interrupts.reporting(progress)
            if config.method != PREFERENCES:
                report = Offline(*ground, told, interrupts, trace, wishes).run()
            elif config.arm == "prompt":
                report = Instructing(*ground, told, interrupts, trace, wishes).run()
            else:
                report = _Update(*ground, told, interrupts, trace, wishes, team, stack).run()
        team.finish(report.to_mapping())
        return report


@dataclass
class _Update(Groundwork):
    """One update while it runs."""

    team: Team
    stack: ExitStack

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checkpoint = Checkpoint(checkpoints.path_of(self.home.training, self.namespace))

    def run(self) -> UpdateReport:
        """Go through the update in order."""
        # 1. What serves, and what there is to learn.
        stock = self.take_stock(again=self.wishes.again)
        serving, live, catalog, refusals, available, report = stock
        known = stalled(self.connection, report, available, again=self.wishes.again)
        is_new = bool(available.new) and known is None

        # 2. The base model, and the update that was interrupted, if one was.
        base, started, needed, adapter = None, None, dict[str, Any](), None
        checks: Mapping[str, UserCheck] = {}
        if is_new or self.checkpoint.path.exists():
            checks = self.load_parts()  # a broken check or loss is reported before any work
            adapter = None if live is None else check_revision(live)
            base = self.load_base(live)
            needed = resume.conditions(self.namespace, serving.live, base, self.config)
            started = self._started(base, needed, catalog)
        report = replace(
            report if known is None or started is not None else known,
            update_id=self.update_id,
            created_at=self.created_at,
        )
        report.notes[:0] = self.checkpoint.troubles
        if base is None or not (is_new or started):
            from agentpref.models.base import find_base

            find_base(self.model)  # a wrong name is said when nothing is new, too
            report = without_examples(self.connection, report, available)
            report = with_aside(report, refusals, available)
            return self.trace.end(self.connection, report)

        # 3. Learn, and prove.
        self.share = self.stack.enter_context(sharing(started.threads if started else None))
        learner = self.learner(base, live, adapter, team=self.team)
        bench = Bench(
            self.update_id,
            self.created_at,
            serving.live,
            learner,
            self.config,
            checks,
            self.scorers or {},
            self.budget,
            self.checkpoint,
            self.interrupts,
            self.share,
            lambda: asides.tried(self.connection, self.namespace),
            self.updates.looks(self.namespace, serving.live),
            needed,
            partial(compared, self.connection, self.namespace, learner, live),
        )
        before, was_aside = available, {one.example_id for one in available.aside}
        if started is None:
            plan = bench.plan(available, self.connection, refusals)
        else:
            plan = Plan.thaw(started.plan)
        available = before.sorted_anew(aside=plan.aside, aged=plan.aged)
        tried = bench.run(available, plan, started)
        plan = tried.plan
        available = before.sorted_anew(aside=plan.aside & was_aside, aged=plan.aged)
        report = replace(report, counts=there(available), notes=[*report.notes, *plan.notes])
        groups = account(tried.available, tried.rows, learner.objections, before=before)
        report = replace(with_account(report, learner, groups), **bench.told(tried))
        not_now = ""
        if self.team.size > 1:
            not_now = "several processes train, and one alone can try it"
        elif self.budget.left() <= 0:
            not_now = "max_minutes left no time"
        if self.config.arm == "both" and tried.proof is not None and not_now:
            report.notes.append(f"text alone was not tried: {not_now}")
        elif self.config.arm == "both" and tried.proof is not None:
            text = beside(
                self.home,
                learner,
                tried.rows,
                tried.proof.new,
                checks=checks,
                scorers=self.scorers or {},
                config=self.config,
                looks=bench.looks + plan.looks,
            )
            training = {**report.training, "text": asdict(text)}
            report = replace(report, training=training, notes=[*report.notes, text.note])
        if tried.training is not None:
            moved, alarms = self.shift(learner, tried.rows)
            fares, words = self.exam(learner, available)
            training = {**report.training, "shift": moved, "exam": fares}
            report = replace(report, training=training, notes=[*report.notes, *alarms, *words])
        if tried.proof is not None:
            counts = report.counts | {"evaluated_thumbs": tried.proof.evaluated_thumbs}
            notes = [*report.notes, *following(tried.plan.told), *tried.proof.notes]
            report = replace(report, counts=counts, notes=notes)
        groups["idle"] = tried.idle_of(groups)
        report = with_aside(report, refusals, tried.available, groups)
        late = tuple(e for e in groups["waiting"] if e.example_id not in plan.waits)
        notes = self.budget.notes({**groups, "waiting": late}, report.verdict)
        report = replace(report, seconds=self.budget.spent(), notes=[*report.notes, *notes])

        # 4. Record what it used, publish it, and serve it: all of it or nothing.
        again = (one for one in tried.available.all() if one.example_id in tried.plan.restored)
        shown = () if tried.proof is None else tried.proof.shown
        outcome = Outcome(report, {**groups, "restored": tuple(again)}, self.wishes, shown)
        report = outcome.settle(self.registry, self.connection, learner, serving)
        checkpoints.remove(self.checkpoint.path)
        return report

    def _find_unlabelled(self, run_ids: Collection[str]) -> list[Example]:
        log = (self.connection, self.namespace, self.config)
        return [*ordinary.find(*log, run_ids), *remarks.find(*log, run_ids)]

    def _started(
        self, base: BaseModel, needed: Mapping[str, Any], catalog: Catalog
    ) -> StartedUpdate | None:
        """The interrupted update, whose id and time this one then takes over."""
        started = resume.find(
            self.checkpoint,
            needed,
            catalog.find,
            ended=self.updates.has,
            find_ordinary=self._find_unlabelled,
        )
        if started is not None:
            self.update_id, self.created_at = started.update_id, started.created_at
            self.trace.resume(self.connection, started.update_id)
            self.cache(base, started.update_id).forget()  # its candidate may have been another
        return started
