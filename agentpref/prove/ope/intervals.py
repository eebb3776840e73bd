"""Confidence intervals of off-policy estimates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agentpref.prove.ope.estimators import Numbers, snips

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 2_000


def _checked(values: Any, confidence: float) -> Numbers:
    """Two values or more as an array, and a confidence between 0 and 1."""
    found = np.asarray(values, float)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"the values have the shape {found.shape}; an interval takes two or more")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must be between 0 and 1")
    return found


class Interval(NamedTuple):
    """A two-sided interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float) and self.low <= value <= self.high


def gaussian(values: Numbers, *, confidence: float = 0.95) -> Interval:
    """Of the mean of some values, such as w·r, by their variance and the normal distribution."""
    from scipy import stats

    values = _checked(values, confidence)
    n, mean = len(values), float(np.mean(values))
    width = float(stats.norm.ppf((1 + confidence) / 2)) * float(np.std(values, ddof=1)) / n**0.5
    return Interval(mean - width, mean + width)


def empirical_bernstein(
    values: Numbers, *, low: float, high: float, confidence: float = 0.95
) -> Interval:
    """Of the mean of values that lie in [low, high]; valid at any size (0907.3740, theorem 4).

    Each side errs with half of what is left of the confidence.
    """
    values = _checked(values, confidence)
    if not low <= values.min() <= values.max() <= high:
        raise ValueError(f"the values are not all from {low} to {high}")
    n, log_term = len(values), math.log(4 / (1 - confidence))
    width = math.sqrt(2 * float(np.var(values, ddof=1)) * log_term / n)
    width += 7 * (high - low) * log_term / (3 * (n - 1))
    mean = float(np.mean(values))
    return Interval(max(low, mean - width), min(high, mean + width))


def bootstrap(
    estimate: Callable[[NDArray[np.int64]], float],
    groups: Any,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentiles of an estimate over resampled groups, such as conversations.

    Args:
        estimate: computes it of some rows, by their numbers; NaN is left out.
        groups: the group of each row; those of one group are drawn together.
        confidence: of the interval.
        resamples: how many times to draw as many groups as there are.
        seed: of the draws.
    """
    if not len(groups):
        raise ValueError("there are no groups to draw from")
    _, at = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(at, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(at))[:-1])
    source = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = source.integers(0, len(members), len(members))
        found.append(estimate(np.concatenate([members[number] for number in drawn])))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.nanquantile(found, tails)
    return Interval(float(low), float(high))


def of_ratio(
    rewards: Numbers, weights: Numbers, groups: Any, *, confidence: float = 0.95
) -> Interval:
    """Of the self-normalised estimate, by the jackknife over groups and Student's t.

    Without group g, which has the share h_g of the weight, the estimate v moves by s_g / (1 − h_g),
    where s_g = Σ w·(r − v) / Σ w over the rows of the group; the variance is about the sum of these
    squares (a ratio estimator's; Cochran 1977, chapter 6). The degrees of freedom are those of as
    many groups as tell as much: few heavy ones are few.
    """
    from scipy import stats

    value, total = snips(rewards, weights), float(np.sum(weights))
    _, at = np.unique(np.asarray(groups), return_inverse=True)
    moved = np.bincount(at, weights * (rewards - value)) / total
    shares = np.bincount(at, weights) / total
    spread = math.sqrt(float(np.sum((moved / np.maximum(1 - shares, 1e-12)) ** 2)))
    freedom = max(1.0, 1 / float(np.sum(shares**2)) - 1)
    width = float(stats.t.ppf((1 + confidence) / 2, freedom)) * spread
    return Interval(value - width, value + width)
