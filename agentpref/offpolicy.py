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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError, EvaluationError
from agentpref.evaluation import CONFIDENCE, SHARED_SETTINGS, Evaluating
from agentpref.evaluation.choices import named_revisions
from agentpref.home import Home
from agentpref.models.threads import sharing
from agentpref.prefer.examples import as_asked, unlabelled
from agentpref.prefer.ordinary import is_whole
from agentpref.prefer.retractions import withdraw
from agentpref.reading import Since, selection
from agentpref.record.database import connect, translated
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.types import BASE, THUMBS, Example, Progress, Run

if TYPE_CHECKING:
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.prove.ope.estimators import Numbers
    from agentpref.serve.backend import Revision

By: TypeAlias = Literal["answer", "length"]
BY: tuple[By, ...] = ("answer", "length")

_AT_ONCE = 1_000

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
    """What revisions would have earned on the same logged answers.

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


class _Earned(NamedTuple):
    """A run that was sampled, its reward and the temperature."""

    run: Run
    reward: float
    temperature: float


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
        every = _earned(database, namespace, reward, which.since, published, left_out)
        earned = [*islice(every, limit)]
        if not earned and not left_out:
            raise EvaluationError(_without(database, namespace, reward, which.since))
        notes = []
        if len(earned) == limit:
            notes.append(f"the newest {limit:,} answers that can be weighed; --limit reads more")
        config, name = _settings(targets, model)
        logps: dict[str, Numbers] = {}
        live = registry.state().live or BASE
        if earned:
            loggers = {one.run.revision or BASE for one in earned}
            names = [BASE if one is None else one.revision_id for one in targets]
            needed = [published.get(one) for one in dict.fromkeys([*names, live, *sorted(loggers)])]
            job = Evaluating(database, registry, needed, progress or (lambda stage, done, n: None))
            with sharing(None):
                earned, logps = _scored(job, earned, config, name, left_out)
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


def _settings(targets: Sequence[Revision | None], model: str | None) -> tuple[UpdateConfig, str]:
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


def _earned(
    database: sqlite3.Connection,
    namespace: str,
    key: str,
    since: float | None,
    published: Mapping[str, Revision],
    left_out: Counter[str],
) -> Iterator[_Earned]:
    """The answers that have a reward and were sampled, the newest first; others are counted."""
    query = """SELECT run_id FROM feedback CROSS JOIN run USING (run_id)
        WHERE key = ? AND namespace = ? AND run.created_at >= ?
        GROUP BY run_id ORDER BY run.created_at DESC, run_id"""
    store, scales = Store(database), set[Any]()
    ids = [run_id for (run_id,) in database.execute(query, (key, namespace, since or 0.0))]
    for start in range(0, len(ids), _AT_ONCE):
        rows, feedback, comparisons = store.judged(namespace, ids[start : start + _AT_ONCE])
        scores: dict[str, list[float]] = {}
        for row in withdraw(feedback, comparisons).feedback:
            if row.key == key and row.score is not None:
                scores.setdefault(row.run_id, []).append(row.score)
                scales.add(row.scale)
        if len(scales - {None}) > 1:
            raise EvaluationError(
                f"{key!r} has scores on {len(scales - {None})} scales, {sorted(map(str, scales))}: "
                "one number cannot be the mean of both; name another key"
            )
        for run in sorted(map(as_asked, rows), key=lambda run: run.created_at, reverse=True):
            if run.run_id not in scores:
                continue
            reason = _objection(run, published)
            if reason is not None:
                left_out[reason] += 1
                continue
            own = scores[run.run_id]
            yield _Earned(run, sum(own) / len(own), float(run.params["temperature"]))


def _objection(run: Run, published: Mapping[str, Revision]) -> str | None:
    """Why an answer cannot be weighed; ``None`` if it can."""
    temperature, top_p = run.params.get("temperature"), run.params.get("top_p")
    logger = published.get(run.revision or "")
    if run.revision is None:
        return "no_revision"
    if run.revision != BASE and logger is None:
        return "unknown_revision"
    if logger is not None and logger.pruned_at is not None:
        return "pruned_revision"
    if run.token_ids is None:
        return "no_tokens"
    if not isinstance(temperature, int | float):
        return "unknown_temperature"
    if temperature <= 0:
        return "greedy"
    if top_p not in (None, 1, 1.0) or run.params.get("top_k") or run.params.get("best_of"):
        return "truncated_sampling"
    return None if is_whole(run) else "broken_off"


def _scored(
    job: Evaluating,
    earned: Sequence[_Earned],
    config: UpdateConfig,
    model: str,
    left_out: Counter[str],
) -> tuple[list[_Earned], dict[str, Numbers]]:
    """The answers that can be encoded as they were sampled, and their log-probs by revision."""
    base, told = job.load(model, config), {one.instructions for one in job.revisions if one}
    kept: list[_Earned] = []
    rows: list[EncodedExample] = []
    found: dict[str, Numbers] = {}
    by_run = {one.run.run_id: one for one in earned}
    for revision in job.revisions:
        name = BASE if revision is None else revision.revision_id
        with job.learner(base, revision, config, keeps=True) as learner:
            if not found:
                encoded = learner.encode([_example(one) for one in earned], told=told)
                rows = [row for row in encoded if row.completions[0] == _sampled(row)]
                left_out.update(one.reason for one in learner.objections.values())
                left_out["tokens_disagree"] += len(encoded) - len(rows)
                kept = [by_run[row.example.example_id] for row in rows]
            job.stage = f"score {name}"
            found[name] = _at_their_temperatures(learner, rows, kept)
    return kept, found


def _sampled(row: EncodedExample) -> tuple[int, ...] | None:
    return row.example.completions[0].token_ids


def _at_their_temperatures(
    learner: Learner, rows: Sequence[EncodedExample], earned: Sequence[_Earned]
) -> Numbers:
    """Log-probs of answers under the learner's candidate, each as it was sampled, ``[n]``."""
    import numpy as np

    temperatures = np.array([one.temperature for one in earned])
    values = np.zeros(len(rows))
    for temperature in sorted(set(temperatures.tolist())):
        some = np.flatnonzero(temperatures == temperature)
        own = learner.sampled_logps("candidate", [rows[int(n)] for n in some], temperature)
        values[some] = [logp for logp, *_ in own]
    return values


def _example(one: _Earned) -> Example:
    """A logged answer without a label, under its run's id."""
    return replace(unlabelled(one.run, "ordinary"), example_id=one.run.run_id)


def _summed(
    earned: Sequence[_Earned],
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
    size = {"groups": len(set(groups)), "distinct": len(set(rewards.tolist()))}
    bounds = (0.0, 1.0) if reward == THUMBS else (-math.inf, math.inf)
    live_tells = not [*refusals(Support.of(of_live), **size)]
    others = {"missing": left_out["no_tokens"], "greedy": left_out["greedy"]}
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
            better = tuple(_difference(rewards, weights, of_live, groups))
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


def _difference(
    rewards: Numbers, weights: Numbers, of_live: Numbers, groups: Sequence[str]
) -> tuple[float, float]:
    """The interval of a revision's value less live's, on the same answers."""
    from agentpref.prove.ope import estimators as ope
    from agentpref.prove.ope import intervals

    return tuple(
        intervals.bootstrap(
            lambda at: ope.snips(rewards[at], weights[at]) - ope.snips(rewards[at], of_live[at]),
            groups,
            confidence=CONFIDENCE,
        )
    )  # type: ignore[return-value]


def _lengths(earned: Sequence[_Earned]) -> list[int]:
    """The class of each answer by its number of tokens, in classes of about the same size."""
    import numpy as np

    lengths = np.array([len(one.run.token_ids or ()) for one in earned])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, CLASSES + 1)[1:-1]))
    return [int(number) for number in np.searchsorted(edges, lengths, side="right")]
