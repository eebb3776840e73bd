"""Estimators of one-step logs: a context, one answer, one reward.

``weights`` are w = π(a|x) / π_b(a|x) of the logged answers, ``rewards`` what they earned, ``q`` a
model's reward of each logged answer, and ``values`` the same model's mean reward under π in each
context, Σ_a π(a|x)·q(x, a). All are ``[n]``. Logarithms are natural.

>>> import numpy as np
>>> target = np.log([.2, .3, .5, .2, .3, .5])
>>> behaviour = np.log([.5, .25, .25, .5, .25, .25])
>>> weights = importance_weights(behaviour, target)
>>> rewards = np.array([1., 0., 1., 0., 1., 1.])
>>> round(float(ips(rewards, weights)), 6), round(float(snips(rewards, weights)), 6)
(0.933333, 0.777778)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Numbers: TypeAlias = "NDArray[np.float64]"


def importance_weights(
    behaviour: Numbers, target: Numbers, *, clip: float | None = None, power: float = 1.0
) -> Numbers:
    """w = π(a|x) / π_b(a|x), from log-probabilities, ``[n]`` each.

    Answers are long, and ratios of sums over tokens explode. ``clip`` bounds each weight, which
    makes an estimate too low where rewards are positive; ``power`` τ gives w^τ (a
    power mean), between the log's own mean (0) and the unbiased estimate (1).
    """
    behaviour, target = alike(behaviour, target)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is {clip}, but must be above 0")
    weights: Numbers = np.exp(power * (target - behaviour))
    return weights if clip is None else np.minimum(weights, clip)


def alike(*arrays: Any) -> list[Numbers]:
    """Arrays of numbers, which must be lists of the same length.

    Raises:
        ValueError: they are not.
    """
    found = [np.asarray(one, float) for one in arrays]
    shapes = {one.shape for one in found}
    if len(shapes) > 1 or found[0].ndim != 1:
        raise ValueError(f"arrays have the shapes {sorted(shapes)}, but must be lists of a length")
    return found


def clipped_by_token(
    behaviour: Numbers, target: Numbers, owner: NDArray[np.int64], clip: float
) -> Numbers:
    """The weights of answers whose tokens' ratios are each bounded by ``clip``.

    ``behaviour`` and ``target`` are log-probabilities of tokens, ``[tokens]``, and ``owner`` the
    number of the answer that each is in.
    """
    ratios = np.minimum(np.asarray(target, float) - np.asarray(behaviour, float), np.log(clip))
    return np.exp(np.bincount(owner, ratios))


def by_class(weights: Numbers, classes: Any) -> Numbers:
    """The mean weight of each answer's class, such as its length (marginalised: 2202.06317).

    It is without bias where the reward depends on the class alone, and varies far less.
    """
    _, at = np.unique(np.asarray(classes), return_inverse=True)
    means: Numbers = np.bincount(at, weights) / np.bincount(at)
    return means[at]


def mixture(logps: Numbers, counts: Any) -> Numbers:
    """log Σ_j (n_j/n)·π_j(a|x): the log-probability of answers under all their loggers together.

    ``logps`` are those of each logger, ``[loggers, n]``, and ``counts`` how many answers each one
    gave. As a denominator it gives the balanced weights (Agarwal et al., KDD 2017),
    which no single logger's small probability can make explode.
    """
    shares = np.asarray(counts, float) / np.sum(counts)
    with np.errstate(divide="ignore"):  # a logger without answers counts nothing
        terms = np.asarray(logps, float) + np.log(shares)[:, None]
    top = terms.max(axis=0)
    total: Numbers = top + np.log(np.exp(terms - top).sum(axis=0))
    return total


def ips(rewards: Numbers, weights: Numbers) -> float:
    """Inverse propensity scoring: the mean of w·r. Without bias where π_b covers π."""
    rewards, weights = alike(rewards, weights)
    return float(np.mean(weights * rewards))


def snips(rewards: Numbers, weights: Numbers) -> float:
    """Self-normalised IPS, Σ w·r / Σ w (Swaminathan & Joachims 2015); NaN without any weight.

    A constant added to all rewards is added to it, which IPS does not do.
    """
    rewards, weights = alike(rewards, weights)
    total = float(np.sum(weights))
    return float(np.sum(weights * rewards)) / total if total else float("nan")


def direct_method(values: Numbers) -> float:
    """The mean of a model's rewards under π: no variance of weights, and the model's bias."""
    return float(np.mean(values))


def doubly_robust(rewards: Numbers, weights: Numbers, q: Numbers, values: Numbers) -> float:
    """DR: the direct method, and the weighted mean of what the model misses (1103.4601)."""
    rewards, weights, q, values = alike(rewards, weights, q, values)
    return direct_method(values) + ips(rewards - q, weights)


def self_normalised_dr(rewards: Numbers, weights: Numbers, q: Numbers, values: Numbers) -> float:
    """As :func:`doubly_robust`, with self-normalised weights."""
    rewards, weights, q, values = alike(rewards, weights, q, values)
    return direct_method(values) + snips(rewards - q, weights)


def switch(
    rewards: Numbers, weights: Numbers, q: Numbers, values: Numbers, *, threshold: float
) -> float:
    """Switch-DR (1612.01205): above the threshold of weights, the model alone is believed."""
    rewards, weights, q, values = alike(rewards, weights, q, values)
    kept = np.where(weights <= threshold, weights, 0.0)
    return direct_method(values) + ips(rewards - q, kept)


def dr_with_shrinkage(
    rewards: Numbers, weights: Numbers, q: Numbers, values: Numbers, *, shrinkage: float
) -> float:
    """DR with optimistic shrinkage (1907.09623): w becomes λ·w / (w² + λ).

    λ 0 is the direct method, and λ → ∞ is DR.
    """
    rewards, weights, q, values = alike(rewards, weights, q, values)
    if shrinkage < 0:
        raise ValueError(f"shrinkage is {shrinkage}, but must be 0 or more")
    kept = weights if np.isinf(shrinkage) else shrinkage * weights / (weights**2 + shrinkage)
    return direct_method(values) + ips(rewards - q, kept)
