"""Answers that were drawn and scored: what they earned, and what a candidate would earn instead.

An answer that a revision drew at a known temperature, and that somebody scored, tells what other
revisions would earn: by how much likelier each of them gives it (``agentpref.prove.ope``).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.errors import EvaluationError
from agentpref.prefer.examples import as_asked, unlabelled
from agentpref.prefer.ordinary import is_whole
from agentpref.prefer.retractions import withdraw
from agentpref.prove.evidence import EarnedEvidence
from agentpref.record.store import Store
from agentpref.traces import reward_of
from agentpref.types import BASE, THUMBS, Example, Run

if TYPE_CHECKING:
    from agentpref.learn.adapter import Policy
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.prove.ope.estimators import Numbers
    from agentpref.serve.backend import Revision

CONFIDENCE = 0.95
"""Of two-sided intervals."""

MOST = 256
"""So many answers, the newest, are asked about a candidate in an update."""

_AT_ONCE = 1_000
_AMONG = 8 * MOST  # of most apps no answer tells, and a large log is not read for that


class Earned(NamedTuple):
    """A run that was sampled, its reward and the temperature."""

    run: Run
    reward: float
    temperature: float


def earned(
    database: sqlite3.Connection,
    namespace: str,
    key: str,
    since: float | None,
    published: Mapping[str, Revision],
    left_out: Counter[str],
    *,
    among: int = -1,
) -> Iterator[Earned]:
    """The answers that have a reward and were sampled, the newest first; others are counted.

    ``among`` is how many runs, the newest, are looked at; −1: all.
    """
    query = """SELECT run_id FROM (SELECT run_id, created_at FROM run
            WHERE namespace = ? AND created_at >= ? ORDER BY created_at DESC LIMIT ?) AS some
        WHERE EXISTS (SELECT 1 FROM feedback WHERE feedback.run_id = some.run_id AND key = ?)
        ORDER BY created_at DESC, run_id"""
    store, scales = Store(database), set[Any]()
    ids = [run_id for (run_id,) in database.execute(query, (namespace, since or 0.0, among, key))]
    for start in range(0, len(ids), _AT_ONCE):
        rows, feedback, comparisons = store.judged(namespace, ids[start : start + _AT_ONCE])
        scores: dict[str, list[float]] = {}
        for row in withdraw(feedback, comparisons).feedback:
            if row.key == key and row.score is not None:
                scores.setdefault(row.run_id, []).append(reward_of(row))
                scales.add(None if key == THUMBS else row.scale)
        if len(scales - {None}) > 1:
            raise EvaluationError(
                f"{key!r} has scores on {len(scales - {None})} scales, {sorted(map(str, scales))}: "
                "one number cannot be the mean of both; name another key"
            )
        for run in sorted(map(as_asked, rows), key=lambda run: run.created_at, reverse=True):
            if run.run_id not in scores:
                continue
            reason = objection(run, published)
            if reason is not None:
                left_out[reason] += 1
                continue
            own = scores[run.run_id]
            yield Earned(run, sum(own) / len(own), float(run.params["temperature"]))


def objection(run: Run, published: Mapping[str, Revision]) -> str | None:
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


def sampled(row: EncodedExample) -> tuple[int, ...] | None:
    """The tokens of an answer as they were drawn."""
    return row.example.completions[0].token_ids


def at_their_temperatures(
    learner: Learner,
    policy: Policy,
    rows: Sequence[EncodedExample],
    earned: Sequence[Earned],
) -> Numbers:
    """Log-probs of answers under a policy of the learner, each as it was sampled, ``[n]``."""
    import numpy as np

    temperatures = np.array([one.temperature for one in earned])
    values = np.zeros(len(rows))
    for temperature in sorted(set(temperatures.tolist())):
        some = np.flatnonzero(temperatures == temperature)
        own = learner.sampled_logps(policy, [rows[int(n)] for n in some], temperature)
        values[some] = [logp for logp, *_ in own]
    return values


def example_of(one: Earned) -> Example:
    """A logged answer without a label, under its run's id."""
    return replace(unlabelled(one.run, "ordinary"), example_id=one.run.run_id)


def difference(
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


def compared(
    connection: sqlite3.Connection,
    namespace: str,
    learner: Learner,
    live: Revision | None,
) -> EarnedEvidence | None:
    """What people's thumbs say of a learner's candidate beside live, if they say anything.

    Only answers that the base or live drew count: these two the learner holds. ``None`` where the
    log does not tell, which is usual: answers were greedy, or of more than a few words.

    Args:
        connection: to the home.
        namespace: whose log.
        learner: holds live and the candidate.
        live: the revision that serves.
    """
    import numpy as np

    from agentpref.prove.ope import estimators as ope
    from agentpref.prove.ope.support import Support, refusals

    published = {} if live is None else {live.revision_id: live}
    every = earned(connection, namespace, THUMBS, None, published, Counter(), among=_AMONG)
    try:
        found = {one.run.run_id: one for one in islice(every, MOST)}
    except EvaluationError:  # thumbs on two scales are no evidence
        return None
    rows = learner.measure([example_of(one) for one in found.values()])
    rows = [row for row in rows if row.completions[0] == sampled(row)]
    if not rows:
        return None
    kept = [found[row.example.example_id] for row in rows]
    policies: tuple[Policy, ...] = ("base", "live", "candidate")
    logps = {name: at_their_temperatures(learner, name, rows, kept) for name in policies}
    own = sum(one.run.revision == BASE for one in kept)
    wrote = [(logps["base"], own), (logps["live"], len(kept) - own)]
    loggers = [(numbers, count) for numbers, count in wrote if count]
    behaviour = ope.mixture(np.array([one for one, _ in loggers]), [count for _, count in loggers])
    weights = [ope.importance_weights(behaviour, logps[name]) for name in policies[1:]]
    rewards = np.array([one.reward for one in kept])
    groups = [one.run.thread_id or one.run.run_id for one in kept]
    size: dict[str, Any] = {"groups": len(set(groups)), "distinct": len(set(rewards.tolist()))}
    if any([*refusals(Support.of(each), **size)] for each in weights):
        return None
    of_live, of_candidate = weights
    low, high = difference(rewards, of_candidate, of_live, groups)
    live_earns, candidate_earns = (ope.snips(rewards, each) for each in weights)
    return EarnedEvidence(live_earns, candidate_earns, low, high, len(kept))
