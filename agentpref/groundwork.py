"""What every candidate starts from: a locked home, what serves, the examples, and the models.

An update (``pipeline.py``) trains a candidate, and an adoption (``adoption.py``) is given one. What
both do before lies here, so that they see the same examples and start from the same live revision.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.accounting import take_stock, there
from agentpref.aside import still_aside
from agentpref.budget import Budget
from agentpref.config import UpdateConfig
from agentpref.errors import UpdateInterrupted, WrongBase
from agentpref.home import Home
from agentpref.learn import checkpoint as checkpoints
from agentpref.learn import resume
from agentpref.learn.data import Available, UpdateRows
from agentpref.learn.process import LOADING, Interrupts
from agentpref.learn.team import Team
from agentpref.outcome import Wishes
from agentpref.prefer import ordinary, remarks
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.strata import Listed
from agentpref.record import asides
from agentpref.record.asides import Refusal
from agentpref.record.database import connect, exclusive, translated
from agentpref.record.journal import Trace
from agentpref.record.messages import as_json
from agentpref.record.spill import drain
from agentpref.record.store import Store
from agentpref.record.updates import Updates
from agentpref.repeats import digests
from agentpref.serve import decisions, regression
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.status import ServingState
from agentpref.types import BASE, Example, Progress, UpdateReport

if TYPE_CHECKING:
    from agentpref.learn.adapter import Policy
    from agentpref.learn.cache import LogpCache
    from agentpref.learn.learner import Learner
    from agentpref.models.adapter_files import AdapterFiles
    from agentpref.models.base import BaseModel
    from agentpref.prove.checks import Scorer, UserCheck


@contextmanager
def locked(
    home: Home, namespace: str, interrupts: Interrupts, outlook: str | None = None
) -> Iterator[sqlite3.Connection]:
    """Lock a home for one candidate, and clean up what killed updates left.

    ``outlook`` says what comes after an interruption; without it, what the next update resumes.
    """
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
        path = checkpoints.path_of(home.training, namespace)
        outlook = resume.outlook(path) if outlook is None else outlook
        signum = interrupts.signum or signal.SIGINT
        raise UpdateInterrupted(f"interrupted; {outlook}", signum) from error


class Stock(NamedTuple):
    """What serves, and what there is to learn or to prove; the report as far as it is known."""

    serving: ServingState
    live: Revision | None
    catalog: Catalog
    refusals: Sequence[Refusal]
    available: Available
    report: UpdateReport


@dataclass
class Groundwork:
    """A home that is locked, the settings, and who asked for what."""

    home: Home
    connection: sqlite3.Connection
    model: str
    config: UpdateConfig
    namespace: str
    checks: Mapping[str, UserCheck] | None
    scorers: Mapping[str, Scorer] | None
    progress: Progress
    interrupts: Interrupts
    trace: Trace
    wishes: Wishes

    def __post_init__(self) -> None:
        self.registry = Registry(self.home, namespace=self.namespace)
        self.updates = Updates(self.connection)
        self.update_id, self.created_at = self.trace.report.update_id, self.trace.report.created_at
        minutes = self.config.max_minutes
        self.budget = Budget(None if minutes is None else 60 * minutes)

    def take_stock(self, *, again: bool) -> Stock:
        """Find out what serves and what examples there are, without loading a model.

        Args:
            again: take in what earlier updates set aside.

        Raises:
            UnknownNamespace: other namespaces are in the home, and this one is not.
            RevisionError: the live revision learned from text that was forgotten since.
        """
        Store(self.connection).require_namespace(self.namespace)
        killed = self.trace.begin(self.connection)
        killed = [*killed, *regression.tell(self.registry, act=self.wishes.promote)]
        serving = self.registry.state()
        live = None if serving.live is None else self.registry.get(serving.live)
        if live is not None:
            self.registry.require_fit(live)
        catalog = Catalog(self.connection, self.namespace, held_out=self.config.held_out)
        catalog.refresh()
        refusals = still_aside(
            self.connection,
            self.trace.report,
            catalog.find,
            lambda: digests(self.trace.report),
            again=again,
        )
        available, left_out = take_stock(
            catalog,
            self.updates.learned_by(serving.live),
            self.config,
            aside={name for one in refusals for name in one.examples},
            aged=asides.aged_out(self.connection, serving.live),
        )
        available = replace(available, ordinary=self._unlabelled)
        held = self.registry.held()
        report = replace(
            self.trace.report,
            parent=live.revision_id if live is not None else None,
            counts=there(available),
            left_out=dict(left_out),
            notes=[
                *killed,
                *([] if held is None else [decisions.explain_hold(held, self.namespace)]),
                *self._held_out_tags(available),
            ],
        )
        return Stock(serving, live, catalog, refusals, available, report)

    def _held_out_tags(self, available: Available) -> Iterator[str]:
        """Says of each tag that is held out what there is, so that a wrong name is seen."""
        learned = Counter(one.tag for one in (*available.old, *available.old_held_out))
        there = Counter(one.tag for one in available.exam)
        for tag in self.config.held_out_tags:
            if there[tag] or not learned[tag]:
                yield f"held-out tag {tag!r}: {there[tag]} examples, which train and prove nothing"
            if learned[tag]:
                yield (
                    f"held-out tag {tag!r}: live learned {learned[tag]} examples of it before, "
                    "which count as ever"
                )

    def _unlabelled(self, judged: Sequence[Example]) -> list[Example]:
        """The answers without a label that train beside the judged ones."""
        log = (self.connection, self.namespace, self.config)
        return [*ordinary.draw(*log, judged), *remarks.draw(*log)]

    def load_parts(self) -> Mapping[str, UserCheck]:
        """Load the losses, scorers and checks that will be needed; return the checks."""
        from agentpref.learn.losses import load_loss
        from agentpref.prove.checks import installed_checks, installed_scorers

        self.scorers = installed_scorers() if self.scorers is None else self.scorers
        for kind in (self.config.loss.kind, self.config.thumbs.kind):
            load_loss(kind)
        return installed_checks() if self.checks is None else self.checks

    def load_base(self, live: Revision | None) -> BaseModel:
        """Load the base model, on which the live revision must have been trained."""
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

    def learner(
        self,
        base: BaseModel,
        live: Revision | None,
        adapter: AdapterFiles | None,
        *,
        candidate: AdapterFiles | None = None,
        team: Team | None = None,
    ) -> Learner:
        """Put the live adapter and a candidate on the base, with the scores that are stored."""
        from agentpref.learn.learner import Learner

        caches: dict[Policy, LogpCache] = {
            "base": self.cache(base, BASE),
            "live": self.cache(base, live.revision_id if live is not None else BASE),
            "candidate": self.cache(base, self.update_id),
        }
        return Learner(
            base,
            adapter,
            self.config,
            candidate=candidate,
            told={} if live is None else dict.fromkeys(("live", "candidate"), live.instructions),
            caches=caches,
            progress=self.progress,
            team=team,
        )

    def cache(self, base: BaseModel, policy: str) -> LogpCache:
        """The stored scores of a policy."""
        from agentpref.learn.cache import LogpCache

        return LogpCache(self.connection, base.numbers, policy)

    def exam(
        self, learner: Learner, available: Available
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """How live and candidate fare on the tags that never train: numbers, and words.

        These decide nothing: what people want there is what nobody has taught.
        """
        from agentpref.prove import evaluate, exam

        query = """SELECT example_id FROM example AS apart
            WHERE namespace = :namespace AND example_id IN (SELECT value FROM json_each(:exam))
            AND point >= :share AND EXISTS (SELECT * FROM example AS other
                WHERE other.namespace = apart.namespace AND other.prompt = apart.prompt
                AND other.example_id NOT IN (SELECT value FROM json_each(:exam)))"""
        values = {"namespace": self.namespace, "share": self.config.held_out}
        values["exam"] = as_json([one.example_id for one in available.exam])
        shared = {name for (name,) in self.connection.execute(query, values)}
        asked: dict[str, list[Listed]] = {}
        for one in sorted(available.exam, key=lambda one: (one.created_at, one.example_id)):
            if one.example_id not in shared:
                asked.setdefault(one.tag, []).append(one)
        newest = [one for own in asked.values() for one in own[-exam.MOST :]]
        rows = learner.encode(available.read(newest))
        found = exam.by_tag(evaluate.score(learner, rows))
        notes = [one.note for one in found]
        notes += [
            f"held-out tag {tag!r}: {len(asked[tag])} examples tell nothing: they cannot be read, "
            "or are thumbs of one kind only"
            for tag in sorted(asked.keys() - {one.tag for one in found})
        ]
        if shared:
            notes.append(
                f"held-out tags: {len(shared)} of {len(available.exam)} examples are not asked, "
                "since their prompts train under other tags"
            )
        return [asdict(one) for one in found], notes

    def shift(self, learner: Learner, rows: UpdateRows) -> tuple[list[dict[str, Any]], list[str]]:
        """How far new prompts are from those that live has learned: numbers, and alarms in words.

        A report holds no text, so prompts go by the name of a run that was asked so. Held-out
        prompts are a fair sample of what was learned; of replayed ones some are the hardest.
        """
        from agentpref.prove import shift

        new, old = [*rows.new, *rows.new_held_out], rows.old_held_out
        if len(old) < shift.FEWEST:
            old = [*old, *rows.old]
        if min(len(new), len(old)) < shift.FEWEST:
            return [], []
        said = {row.example.prompt.id: row.example.provenance[:1] for row in new}
        query = """SELECT value, coalesce(
                (SELECT run_id FROM run WHERE run_id = value),
                (SELECT run_id FROM feedback WHERE feedback_id = value),
                (SELECT run_a FROM comparison WHERE comparison_id = value))
            FROM json_each(?)"""
        named = as_json([name for own in said.values() for name in own])
        runs = dict(self.connection.execute(query, (named,)))
        names = {prompt: runs.get(own[0]) or own[0] for prompt, own in said.items() if own}
        found = shift.shifts(
            shift.points(learner, new, names), shift.points(learner, old, {}), seed=self.config.seed
        )
        return [one.to_mapping() for one in found], [one.note for one in found if one.alarm]
