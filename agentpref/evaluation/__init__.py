"""Scores any revisions of a home on any of its held-out examples, or on a file of preferences.

It looks and changes nothing that serves: it takes no lock, and all that it may write are scores of
the home's own examples, which the next update or evaluation then need not compute. The base is
loaded once, and the revisions' adapters are put on it one after the other.

The module cannot be called ``evaluate``: importing it would hide ``agentpref.evaluate``.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.config import UpdateConfig
from agentpref.errors import EvaluationError, NotKept, WrongBase
from agentpref.evaluation.choices import (
    CANARY,
    LIVE,
    Found,
    Where,
    find_examples,
    named_revisions,
    nothing,
)
from agentpref.home import Home
from agentpref.learn.process import LOADING
from agentpref.models.threads import sharing
from agentpref.prefer.examples import split_point
from agentpref.prefer.strata import sample
from agentpref.prefer.trained import trained_points
from agentpref.record.database import connect, translated
from agentpref.record.pages import Since, selection
from agentpref.record.store import Store
from agentpref.serve import decisions
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from agentpref.types import BASE, Example, Progress

if TYPE_CHECKING:
    from agentpref.learn.adapter import Policy
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.models.base import BaseModel
    from agentpref.prove.comparing import Group

CONFIDENCE = 0.95
SHARED_SETTINGS = ("precision", "chat_template_kwargs", "max_length")
"""What decides about the numbers of a score: an evaluation takes them from the revision."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One revision of an evaluation.

    ``serves`` is ``"live"``, ``"canary"`` or ``None``; ``kl`` is KL(π_0‖π_θ) in nats per token on
    the examples, as the gate measures it; ``trained_on`` counts the examples whose prompts trained
    it or an ancestor.
    """

    revision: str
    serves: str | None
    kl: float
    trained_on: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How right revisions are about the same examples.

    ``revisions`` are in the order in which they were named; later ones are compared with earlier
    ones. ``groups`` are all examples, the lone thumbs among them, and the strata. ``left_out``
    counts examples that were not scored, by reason: ``trained`` are those whose prompts trained one
    of the revisions. ``since`` is the time from which on examples were judged, in seconds since
    1970; ``None`` if all times count. ``notes`` say anything else.
    """

    namespace: str
    on: str
    model: str
    confidence: float
    revisions: tuple[Scored, ...]
    groups: tuple[Group, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    since: float | None = None

    def to_mapping(self) -> dict[str, Any]:
        """The evaluation as plain values: what ``--json`` prints."""
        return asdict(self)


def evaluate(
    home: str | Path | None = None,
    revisions: Sequence[str] = (),
    *,
    on: Where | None = None,
    format: str | None = None,
    namespace: str = "default",
    model: str | None = None,
    since: Since = None,
    limit: int | None = None,
    with_trained: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Score revisions on held-out examples or on a file, and compare them.

    >>> found = agentpref.evaluate("./.agentpref", ["base", "live"], on="march.jsonl")
    >>> found.groups[0].accuracy["base"].accuracy
    0.5

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        revisions: ids, numbers, beginnings of ids, ``"live"``, ``"canary"`` or ``"base"``; by
            default the base and what serves.
        on: a tag, a stratum as reports name it, or a file or stream that an import could read,
            which is not imported; by default all held-out examples. A text is a tag if there is
            one; ``./name`` is always a file.
        format: the registered format of a file's rows; by default the keys of each row tell.
        namespace: whose revisions and whose examples.
        model: the base model; by default the one that the revisions were trained on, by its name.
        since: only examples that were judged from this time on, as in :meth:`agentpref.Home.pairs`.
        limit: so many examples at most, as equally of each stratum as possible.
        with_trained: also score examples whose prompts trained one of the revisions, in groups of
            their own. By default they are left out, and counted.
        progress: called with ``(stage, done, total)``.

    Raises:
        ConfigError: an argument has no meaning.
        NotAHome: there is no home in the folder.
        UnknownNamespace: other namespaces are in the home, and this one is not.
        UnknownRevision: a name is that of no revision, or of several.
        RevisionError: a revision was pruned.
        EvaluationError: there is nothing to score, or only the base was named.
        ExchangeError: the file is not one of preferences.
        ModelNotFound: the model resolves to nothing.
        WrongBase: a revision was trained on another base.
        InvalidAdapter: a revision's files are not those that were published.
    """
    which = selection(namespace, since, limit)
    place = Home.open(home)
    with translated(place), closing(connect(place, readonly=True)) as database:
        Store(database).require_namespace(namespace)
        registry = Registry(place, namespace=namespace)
        named = named_revisions(registry, revisions)
        found = find_examples(database, which, on, format)
        job = Evaluating(database, registry, named, progress or (lambda stage, done, total: None))
        clean, left_out, trained_on = job.split(found.examples, with_trained=with_trained)
        if limit is not None and limit < len(clean):
            note = f"{limit} of {len(clean)} examples, as equally of each stratum as possible"
            found.notes.append(note)
            clean = sample(clean, limit)
        if not clean:
            raise EvaluationError(nothing(found, left_out))
        with sharing(None):
            done = job.run(found, clean, left_out, trained_on, model)
        return replace(done, since=which.since)


@dataclass
class Evaluating:
    """One evaluation while it runs."""

    database: sqlite3.Connection
    registry: Registry
    revisions: Sequence[Revision | None]
    progress: Progress
    stage: str = ""

    def split(
        self, examples: Sequence[Example], *, with_trained: bool
    ) -> tuple[list[Example], Counter[str], Mapping[str, set[str]]]:
        """Leave out examples whose prompts trained a revision, and say which each one trained on.

        Returns the examples to score, how many were left out, and the ids of the examples that
        each revision trained on, by its name.
        """
        points = {e.example_id: split_point(e.prompt.messages) for e in examples}
        trained_on: dict[str, set[str]] = {}
        for revision in self.revisions:
            name = None if revision is None else revision.revision_id
            seen = trained_points(self.database, self.registry.namespace, name)
            trained_on[name or BASE] = {e for e, point in points.items() if point in seen}
        trained = set[str]().union(*trained_on.values())
        kept = [e for e in examples if with_trained or e.example_id not in trained]
        return kept, Counter(trained=len(examples) - len(kept)), trained_on

    def run(
        self,
        found: Found,
        examples: Sequence[Example],
        left_out: Counter[str],
        trained_on: Mapping[str, set[str]],
        model: str | None,
    ) -> Evaluation:
        """Load the base, score each revision, and compare them."""
        from agentpref.prove.comparing import compare

        newest = max(filter(None, self.revisions), key=lambda revision: revision.revision_id)
        settings = newest.manifest.get("training", {}).get("config", {})
        config = UpdateConfig.from_mapping(
            {name: settings[name] for name in SHARED_SETTINGS if name in settings}
        )
        base = self.load(model or newest.manifest["base"]["name"], config)
        rows: list[EncodedExample] = []
        scores: dict[str, Sequence[float]] = {}
        kls = {BASE: 0.0}
        for revision in self.revisions:
            if revision is None:
                scores[BASE] = ()
                continue
            with self.learner(base, revision, config, keeps=not found.from_file) as learner:
                if not rows:
                    told = {one.instructions for one in self.revisions if one is not None}
                    rows = learner.encode(examples, told=told)
                    left_out.update(o.reason for o in learner.objections.values())
                    if not rows:
                        raise EvaluationError(_not_encoded(found, left_out))
                name = revision.revision_id
                kls[name], scores[name] = self._score(learner, name, rows, config.seed)
        if BASE in scores:
            scores[BASE] = (0.5,) * len(rows)  # against itself it changes nothing
        trained = set[str]().union(*trained_on.values())
        groups = compare(
            rows,
            scores,
            trained=[row.example.example_id in trained for row in rows],
            by_age=not found.from_file,
            minimum=config.gate.min_stratum,
            confidence=CONFIDENCE,
            seed=config.seed,
        )
        if not groups:
            raise EvaluationError(
                f"{found.on} has thumbs of one kind only, which tell revisions apart from nothing: "
                "a model that likes every answer is right about all likes; add the other kind"
            )
        return Evaluation(
            self.registry.namespace,
            found.on,
            base.name,
            CONFIDENCE,
            tuple(self._scored(name, kls, trained_on) for name in scores),
            tuple(groups),
            {reason: count for reason, count in left_out.items() if count},
            (*found.notes, *_notes(rows, groups)),
        )

    def load(self, name: str, config: UpdateConfig) -> BaseModel:
        """Load the base, on which all of the revisions must have been trained."""
        from agentpref.models.base import load_base

        self.progress(LOADING, 0, 1)
        base = load_base(
            name, precision=config.precision, chat_template_kwargs=config.chat_template_kwargs
        )
        self.progress(LOADING, 1, 1)
        for revision in filter(None, self.revisions):
            trained_on = revision.manifest["base"]
            if decisions.digests_of(trained_on) != decisions.digests_of(base.identity):
                given = "chat_template_kwargs"
                raise WrongBase(
                    f"{revision.revision_id} was trained on {trained_on['name']!r} with {given} "
                    f"{trained_on.get(given, {})}, whose weights or chat template are not those of "
                    f"{base.name!r} with {base.chat_template_kwargs}; name its base with --model, "
                    "and evaluate revisions of other bases one by one"
                )
        return base

    @contextmanager
    def learner(
        self, base: BaseModel, revision: Revision | None, config: UpdateConfig, *, keeps: bool
    ) -> Iterator[Learner]:
        """The base with one revision on it, as the candidate that starts there."""
        from agentpref.learn.cache import LogpCache
        from agentpref.learn.learner import Learner

        with ExitStack() as stack:
            database = self.database
            if keeps:
                try:
                    database = stack.enter_context(closing(connect(self.registry.home)))
                except NotKept:  # a home that this user only reads: what is known helps, too
                    keeps = False
            base_cache, own_cache = (
                LogpCache(database, base.numbers, name, keeps=keeps)
                for name in (BASE, BASE if revision is None else revision.revision_id)
            )
            caches: dict[Policy, LogpCache] = {"base": base_cache, "candidate": own_cache}
            files = None if revision is None else check_revision(revision)
            told: dict[Policy, str] = {}
            if revision is not None:
                told = {"candidate": revision.instructions}
            learner = Learner(base, files, config, told=told, caches=caches, progress=self._told)
            try:
                yield learner
            finally:
                learner.detach()

    def _score(
        self, learner: Learner, name: str, rows: Sequence[EncodedExample], seed: int
    ) -> tuple[float, Sequence[float]]:
        """KL from the base, and how right the revision is about each row."""
        from agentpref.prove.evaluate import kl_from_base, policy_scores

        self.stage = f"KL of {name}"
        kl = kl_from_base(learner, rows, seed=seed)
        self.stage = f"score {name}"
        return kl, policy_scores(learner, "candidate", rows)

    def _told(self, stage: str, done: int, total: int) -> None:
        """Progress under the revision's name instead of the candidate's."""
        self.progress(self.stage if stage == "score candidate" else stage, done, total)

    def _scored(
        self, name: str, kls: Mapping[str, float], trained_on: Mapping[str, set[str]]
    ) -> Scored:
        state = self.registry.state()
        serves = {state.canary: CANARY, state.live or BASE: LIVE}.get(name)
        return Scored(name, serves, kls[name], len(trained_on[name]))


def _notes(rows: Sequence[EncodedExample], groups: Sequence[Group]) -> Iterator[str]:
    thumbs = sum(row.example.lone for row in rows)
    counted = sum(group.thumbs for group in groups if group.name == "all")
    if counted < thumbs:
        yield (
            f"{counted} of {thumbs} lone thumbs count: as many likes as dislikes in every tag, "
            "since a revision that moves all answers alike is right about one kind"
        )


def _not_encoded(found: Found, left_out: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{r.replace('_', ' ')}: {n}" for r, n in left_out.items() if n)
    return f"no example of {found.on} can be scored under this model: {reasons}"
