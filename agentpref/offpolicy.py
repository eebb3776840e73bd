"""Off-policy evaluation on a home's log: what would revisions have earned on the logged traffic?

Each logged answer was drawn from the revision that served, at a temperature, and earned a reward:
people's thumbs, or any score. Another revision is worth the mean of these rewards, weighed by how
much likelier it gives each answer (``agentpref.prove.ope``). Several revisions have served, and all
of them together are the logger: their mixture, by how many answers each one gave, is the
denominator. Log-probabilities are computed here, as the answers were asked and sampled, so loggers
without any in the log count, too.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from agentpref.config import UpdateConfig
from agentpref.earned import (
    CONFIDENCE,
    Earned,
    at_their_temperatures,
    difference,
    example_of,
    sampled,
)
from agentpref.earned import earned as answers_earned
from agentpref.errors import ConfigError, EvaluationError
from agentpref.evaluation import SHARED_SETTINGS, Evaluating
from agentpref.evaluation.choices import named_revisions
from agentpref.home import Home
from agentpref.models.threads import sharing
from agentpref.record.database import connect, translated
from agentpref.record.pages import Since, selection
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.types import BASE, THUMBS, Progress

if TYPE_CHECKING:
    from agentpref.learn.encode import EncodedExample
    from agentpref.prove.ope.estimators import Numbers
    from agentpref.serve.backend import Revision

By: TypeAlias = Literal["answer", "length", "conversation"]
BY: tuple[By, ...] = ("answer", "length")

CLASSES = 8
"""Into so many classes of equal size answers are sorted by their length."""


@dataclass(frozen=True, slots=True)
class Valued:
    """What a revision would have earned.

    ``value`` is the self-normalised estimate, and ``low`` and ``high`` its interval; all three are
    ``None`` where the log does not tell, and ``refused`` says why. ``better`` is the interval of
    its value less live's. ``ips`` and ``doubly_robust`` (with the mean reward as its model) are
    other estimates of the same, and ``effective`` is how many answers of equal weight tell as much.
    """

    revision: str
    serves: str | None
    value: float | None
    low: float | None
    high: float | None
    effective: float
    largest: float
    refused: tuple[str, ...] = ()
    better: tuple[float, float] | None = None
    ips: float | None = None
    doubly_robust: float | None = None
    own: int = 0


@dataclass(frozen=True, slots=True)
class OffPolicy:
    """What revisions would have earned on the same logged answers, or conversations (``by``).

    ``answers`` have a reward and can be weighed; ``earned`` is their mean reward as logged.
    ``left_out`` counts the others that have a reward, by reason. ``own`` of a revision is how many
    of the answers it gave itself.
    """

    namespace: str
    reward: str
    by: By
    model: str
    answers: int
    earned: float | None
    confidence: float
    revisions: tuple[Valued, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """The evaluation as plain values: what ``--json`` prints."""
        return asdict(self)


def off_policy(
    home: str | Path | None = None,
    revisions: Sequence[str] = (),
    *,
    reward: str = THUMBS,
    by: By = "answer",
    namespace: str = "default",
    model: str | None = None,
    since: Since = None,
    limit: int | None = 1000,
    progress: Progress | None = None,
) -> OffPolicy:
    """Estimate what revisions would have earned, from answers that others gave.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        revisions: as of :func:`agentpref.evaluate`; by default the base and what serves.
        reward: the key of the feedback whose scores are the rewards; of several on one answer, the
            mean counts.
        by: weigh each ``answer``, or each class of answers of about the same ``length``: that has
            far less variance, and no bias where the reward depends on the length alone.
        namespace: whose log.
        model: the base model; by default the one that the revisions were trained on, by its name.
        since: only answers from this time on, as in :meth:`agentpref.Home.runs`.
        limit: so many answers at most, the newest; ``None``: all.
        progress: called with ``(stage, done, total)``.

    Raises:
        ConfigError: an argument has no meaning.
        EvaluationError: no answer has such a reward, or the rewards have several scales.
        NotAHome: there is no home in the folder.
        UnknownNamespace: other namespaces are in the home, and this one is not.
        UnknownRevision: a name is that of no revision, or of several.
        RevisionError: a revision was pruned.
        ModelNotFound: the model resolves to nothing.
        WrongBase: a revision was trained on another base.
        InvalidAdapter: a revision's files are not those that were published.
    """
    if by not in BY:
        raise ConfigError(f"by is {by!r}, but must be {' or '.join(BY)}")
    which, place = selection(namespace, since, limit), Home.open(home)
    with translated(place), closing(connect(place, readonly=True)) as database:
        Store(database).require_namespace(namespace)
        registry = Registry(place, namespace=namespace)
        targets = named_revisions(registry, revisions, base_alone=True)
        published = {one.revision_id: one for one in registry.list()}
        left_out = Counter[str]()
        every = answers_earned(database, namespace, reward, which.since, published, left_out)
        earned = [*islice(every, limit)]
        if not earned and not left_out:
            raise EvaluationError(_without(database, namespace, reward, which.since))
        notes = []
        if len(earned) == limit:
            notes.append(f"the newest {limit:,} answers that can be weighed; --limit reads more")
        config, name = settings_of(targets, model)
        logps: dict[str, Numbers] = {}
        live = registry.state().live or BASE
        if earned:
            loggers = {one.run.revision or BASE for one in earned}
            names = [BASE if one is None else one.revision_id for one in targets]
            needed = [published.get(one) for one in dict.fromkeys([*names, live, *sorted(loggers)])]
            job = Evaluating(database, registry, needed, progress or (lambda stage, done, n: None))
            with sharing(None):
                earned, logps = scored(job, earned, config, name, left_out)
        found = _summed(earned, logps, targets, live, registry, reward, by, left_out, name)
        return replace(found, notes=tuple(notes))


def _without(database: sqlite3.Connection, namespace: str, key: str, since: float | None) -> str:
    """Says that no answer has a score, and what there is instead."""
    query = """SELECT DISTINCT key FROM feedback CROSS JOIN run USING (run_id)
        WHERE namespace = ? AND score IS NOT NULL ORDER BY key LIMIT 10"""
    keys = [name for (name,) in database.execute(query, (namespace,))]
    if key in keys and since is not None:
        return f"no answer of {namespace!r} since then has a score under {key!r}"
    there = f"there are scores under {', '.join(map(repr, keys))}" if keys else "there are none"
    return (
        f"no answer of {namespace!r} has a score under {key!r} ({there}): log some by "
        "log.feedback(run_id, key=…, score=…), or name another key"
    )


def settings_of(targets: Sequence[Revision | None], model: str | None) -> tuple[UpdateConfig, str]:
    """The settings that decide about log-probs, and the base model's name: the newest one's."""
    known = [one for one in targets if one is not None]
    if not known:
        if model is None:
            raise ConfigError("no revision names the base model; name it: model=… (--model)")
        return UpdateConfig(), model
    newest = max(known, key=lambda one: one.revision_id)
    settings = newest.manifest.get("training", {}).get("config", {})
    own = {name: settings[name] for name in SHARED_SETTINGS if name in settings}
    return UpdateConfig.from_mapping(own), model or str(newest.manifest["base"]["name"])


def scored(
    job: Evaluating,
    earned: Sequence[Earned],
    config: UpdateConfig,
    model: str,
    left_out: Counter[str],
) -> tuple[list[Earned], dict[str, Numbers]]:
    """The answers that can be encoded as they were sampled, and their log-probs by revision."""
    base, told = job.load(model, config), {one.instructions for one in job.revisions if one}
    kept: list[Earned] = []
    rows: list[EncodedExample] = []
    found: dict[str, Numbers] = {}
    by_run = {one.run.run_id: one for one in earned}
    for revision in job.revisions:
        name = BASE if revision is None else revision.revision_id
        with job.learner(base, revision, config, keeps=True) as learner:
            if not found:
                encoded = learner.encode([example_of(one) for one in earned], told=told)
                rows = [row for row in encoded if row.completions[0] == sampled(row)]
                left_out.update(one.reason for one in learner.objections.values())
                left_out["tokens_disagree"] += len(encoded) - len(rows)
                kept = [by_run[row.example.example_id] for row in rows]
            job.stage = f"score {name}"
            found[name] = at_their_temperatures(learner, "candidate", rows, kept)
    return kept, found


def _summed(
    earned: Sequence[Earned],
    logps: Mapping[str, Numbers],
    targets: Sequence[Revision | None],
    live: str,
    registry: Registry,
    reward: str,
    by: By,
    left_out: Counter[str],
    model: str,
) -> OffPolicy:
    """The estimates of each revision, or why there is none."""
    import numpy as np

    from agentpref.prove.ope import estimators as ope
    from agentpref.prove.ope import intervals
    from agentpref.prove.ope.support import Support, refusals

    state, loggers = registry.state(), Counter(one.run.revision or BASE for one in earned)
    serves = {state.canary: "canary", live: "live"}
    rewards = np.array([one.reward for one in earned])
    groups = [one.run.thread_id or one.run.run_id for one in earned]
    names = [*loggers]
    behaviour = np.zeros(0)
    if earned:
        behaviour = ope.mixture(np.array([logps[n] for n in names]), [loggers[n] for n in names])

    def weights_of(name: str) -> Numbers:
        weights = ope.importance_weights(behaviour, logps[name]) if earned else np.zeros(0)
        return ope.by_class(weights, _lengths(earned)) if by == "length" and earned else weights

    of_live = weights_of(live)
    size: dict[str, Any] = {"groups": len(set(groups)), "distinct": len(set(rewards.tolist()))}
    bounds = (0.0, 1.0) if reward == THUMBS else (-math.inf, math.inf)
    live_tells = not [*refusals(Support.of(of_live), **size)]
    others: dict[str, Any] = {"missing": left_out["no_tokens"], "greedy": left_out["greedy"]}
    found = []
    for name in (BASE if one is None else one.revision_id for one in targets):
        weights = weights_of(name)
        support = Support.of(weights)
        why = tuple(refusals(support, **others, **size))
        about = {
            "revision": name, "serves": serves.get(name), "effective": support.effective,
            "largest": support.largest, "own": loggers.get(name, 0), "refused": why,
        }  # fmt: skip
        if why:
            found.append(Valued(**about, value=None, low=None, high=None))  # type: ignore[arg-type]
            continue
        interval = intervals.of_ratio(rewards, weights, groups, confidence=CONFIDENCE)
        mean = float(rewards.mean())
        flat = np.full(len(rewards), mean)
        better = None
        if name != live and live_tells:
            better = tuple(difference(rewards, weights, of_live, groups))
        found.append(
            Valued(
                **about,  # type: ignore[arg-type]
                value=ope.snips(rewards, weights),
                low=max(interval.low, bounds[0]),
                high=min(interval.high, bounds[1]),
                better=better,  # type: ignore[arg-type]
                ips=ope.ips(rewards, weights),
                doubly_robust=ope.doubly_robust(rewards, weights, flat, flat),
            )
        )
    return OffPolicy(
        registry.namespace,
        reward,
        by,
        model,
        len(earned),
        float(rewards.mean()) if earned else None,
        CONFIDENCE,
        tuple(found),
        {reason: count for reason, count in left_out.items() if count},
    )


def _lengths(earned: Sequence[Earned]) -> list[int]:
    """The class of each answer by its number of tokens, in classes of about the same size."""
    import numpy as np

    lengths = np.array([len(one.run.token_ids or ()) for one in earned])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, CLASSES + 1)[1:-1]))
    return [int(number) for number in np.searchsorted(edges, lengths, side="right")]
