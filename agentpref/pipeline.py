"""One update, from start to end: record → prefer → learn → prove → serve.

It reads what was logged, builds examples, trains a candidate, evaluates it, asks the gate, and
publishes and promotes what passes. It locks the home while it works, and leaves either everything
or nothing behind.

The module cannot be called ``update``: importing it would hide the function ``agentpref.update``.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.accounting import account, take_stock, there, with_account
from agentpref.aside import still_aside, with_aside
from agentpref.attempt import Bench
from agentpref.budget import Budget
from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError, UpdateInterrupted, WrongBase
from agentpref.home import Home
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn import resume
from agentpref.learn.checkpoint import Checkpoint
from agentpref.learn.data import Available
from agentpref.learn.process import LOADING, Interrupts
from agentpref.learn.resume import StartedUpdate
from agentpref.learn.team import Team, assembled
from agentpref.models.threads import sharing
from agentpref.outcome import Outcome, Wishes
from agentpref.prefer import ordinary
from agentpref.prefer.catalog import Catalog
from agentpref.record import asides
from agentpref.record.database import connect, exclusive, translated
from agentpref.record.journal import Trace
from agentpref.record.messages import new_id
from agentpref.record.spill import drain
from agentpref.record.store import Store
from agentpref.record.updates import Updates
from agentpref.repeats import digests, stalled, without_examples
from agentpref.retry import Plan, following
from agentpref.serve import decisions, regression
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from agentpref.types import BASE, Progress, UpdateReport

if TYPE_CHECKING:
    import sqlite3

    from agentpref.learn.adapter import Policy
    from agentpref.learn.cache import LogpCache
    from agentpref.learn.learner import Learner
    from agentpref.models.adapter_files import AdapterFiles
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
        ConfigError: ``canary`` is out of range, or given beside ``promote=False``.
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
    if canary is not None and not (0 < canary <= 1 and promote):
        raise ConfigError(
            f"canary is {canary!r}, but must be a share above 0 and at most 1, and takes the place "
            "of a promotion: leave out promote=False (--no-promote)"
        )
    with assembled() as team:
        if not team.main:
            from agentpref.learn.follower import follow

            return UpdateReport(**follow(team))
        place, config = Home.open(home), config or UpdateConfig()
        interrupts = interrupts or Interrupts()
        blank = UpdateReport(
            new_id(), namespace, model, time.time(), "nothing_new", None, config=config.to_mapping()
        )
        with (
            Trace(place, blank) as trace,
            _locked(place, namespace, interrupts) as connection,
            ExitStack() as stack,
        ):
            report = _Update(
                place,
                connection,
                model,
                config,
                namespace,
                checks,
                scorers,
                interrupts.reporting(progress),
                interrupts,
                team,
                trace,
                Wishes(promote, canary, again),
                stack,
            ).run()
        team.finish(report.to_mapping())
        return report


@contextmanager
def _locked(home: Home, namespace: str, interrupts: Interrupts) -> Iterator[sqlite3.Connection]:
    """Lock a home for one update, and clean up what killed updates left."""
    try:
        with (
            interrupts.listening(),
            exclusive(home),
            translated(home),
            closing(connect(home)) as connection,
        ):
            drain(home)
            checkpoints.sweep(home.training)
            for folder in home.candidates:
                shutil.rmtree(folder, ignore_errors=True)
            yield connection
    except KeyboardInterrupt as error:
        outlook = resume.outlook(checkpoints.path_of(home.training, namespace))
        signum = interrupts.signum or signal.SIGINT
        raise UpdateInterrupted(f"interrupted; {outlook}", signum) from error


@dataclass
class _Update:
    """One update while it runs."""

    home: Home
    connection: sqlite3.Connection
    model: str
    config: UpdateConfig
    namespace: str
    checks: Mapping[str, UserCheck] | None
    scorers: Mapping[str, Scorer] | None
    progress: Progress
    interrupts: Interrupts
    team: Team
    trace: Trace
    wishes: Wishes
    stack: ExitStack

    def __post_init__(self) -> None:
        self.registry = Registry(self.home, namespace=self.namespace)
        self.updates = Updates(self.connection)
        self.checkpoint = Checkpoint(checkpoints.path_of(self.home.training, self.namespace))
        self.update_id, self.created_at = self.trace.report.update_id, self.trace.report.created_at
        minutes = self.config.max_minutes
        self.budget = Budget(None if minutes is None else 60 * minutes)

    def run(self) -> UpdateReport:
        """Go through the update in order."""
        Store(self.connection).require_namespace(self.namespace)
        # 1. What serves, and what there is to learn.
        killed = self.trace.begin(self.connection)
        killed = [*killed, *regression.tell(self.registry, act=self.wishes.promote)]
        serving = self.registry.state()
        live = None if serving.live is None else self.registry.get(serving.live)
        if live is not None:
            self.registry.require_fit(live)
        catalog = Catalog(self.connection, self.namespace, held_out=self.config.held_out)
        catalog.refresh()
        learned = self.updates.learned_by(serving.live)
        refusals = still_aside(
            self.connection,
            self.trace.report,
            catalog.find,
            lambda: digests(self.trace.report),
            again=self.wishes.again,
        )
        available, left_out = take_stock(
            catalog,
            learned,
            self.config,
            aside={name for one in refusals for name in one.examples},
            aged=asides.aged_out(self.connection, serving.live),
        )
        of_log = partial(ordinary.draw, self.connection, self.namespace, self.config)
        available = replace(available, ordinary=of_log)
        report = self._report(available, live, left_out, killed)
        known = stalled(self.connection, report, available, again=self.wishes.again)
        is_new = bool(available.new) and known is None

        # 2. The base model, and the update that was interrupted, if one was.
        base, started, needed, adapter = None, None, dict[str, Any](), None
        checks: Mapping[str, UserCheck] = {}
        if is_new or self.checkpoint.path.exists():
            checks = self._load_parts()  # a broken check or loss is reported before any work
            adapter = None if live is None else check_revision(live)
            base = self._load_base(live)
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
        learner = self._learner(base, live, adapter)
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

    def _load_parts(self) -> Mapping[str, UserCheck]:
        from agentpref.learn.losses import load_loss
        from agentpref.prove.checks import installed_checks, installed_scorers

        self.scorers = installed_scorers() if self.scorers is None else self.scorers
        for kind in (self.config.loss.kind, self.config.thumbs.kind):
            load_loss(kind)
        return installed_checks() if self.checks is None else self.checks

    def _load_base(self, live: Revision | None) -> BaseModel:
        from agentpref.models.base import load_base

        self.progress(LOADING, 0, 1)
        base = load_base(
            self.model,
            precision=self.config.precision,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )
        self.progress(LOADING, 1, 1)
        if live is not None:
            trained_on = live.manifest["base"]
            if decisions.digests_of(trained_on) != decisions.digests_of(base.identity):
                raise WrongBase(
                    f"{live.revision_id} was trained on {trained_on['name']!r} with "
                    f"chat_template_kwargs {trained_on.get('chat_template_kwargs', {})}, whose "
                    f"weights or chat template are not those of {base.name!r} with "
                    f"{base.chat_template_kwargs}; pass that model, or use a new namespace"
                )
        return base

    def _started(
        self, base: BaseModel, needed: Mapping[str, Any], catalog: Catalog
    ) -> StartedUpdate | None:
        """The interrupted update, whose id and time this one then takes over."""
        started = resume.find(
            self.checkpoint,
            needed,
            catalog.find,
            ended=self.updates.has,
            find_ordinary=partial(ordinary.find, self.connection, self.namespace, self.config),
        )
        if started is not None:
            self.update_id, self.created_at = started.update_id, started.created_at
            self.trace.resume(self.connection, started.update_id)
            self._cache(base, started.update_id).forget()  # its candidate may have been another
        return started

    def _report(
        self,
        available: Available,
        live: Revision | None,
        left_out: Mapping[str, int],
        killed: Sequence[str],
    ) -> UpdateReport:
        """The report as far as it is known before any work."""
        held = self.registry.held()
        return replace(
            self.trace.report,
            parent=live.revision_id if live is not None else None,
            counts=there(available),
            left_out=dict(left_out),
            notes=[
                *killed,
                *([] if held is None else [decisions.explain_hold(held, self.namespace)]),
            ],
        )

    def _learner(
        self, base: BaseModel, live: Revision | None, adapter: AdapterFiles | None
    ) -> Learner:
        from agentpref.learn.learner import Learner

        caches: dict[Policy, LogpCache] = {
            "base": self._cache(base, BASE),
            "live": self._cache(base, live.revision_id if live is not None else BASE),
            "candidate": self._cache(base, self.update_id),
        }
        return Learner(
            base, adapter, self.config, caches=caches, progress=self.progress, team=self.team
        )

    def _cache(self, base: BaseModel, policy: str) -> LogpCache:
        from agentpref.learn.cache import LogpCache

        return LogpCache(self.connection, base.numbers, policy)
