"""How often one policy's answers are better than another's, by a judge that errs.

A judge that is right in 80 % of the cases brings every win rate nearer to .5, and one that likes
long answers brings that of the wordier policy nearer to 1. :func:`corrected_win_rate` takes this
back, by what gold says of the judge's errors. :func:`length_controlled_win_rate` needs no gold, and
asks what the judge would say if both answers were equally long. :func:`ratings` is for more than
two policies.

A judge's score of a pair is 1 where it prefers the first policy's answer in both orders, 0 where it
prefers the second's, else .5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from agentpref.prefer.judges.calibration import Estimate, GoldVerdict, library
from agentpref.types import Winner

LEAST_GOLD = 2
"""So many labels where the longer, and where the shorter answer is better, for separate errors."""


class WinRate(NamedTuple):
    """The win rate of a policy over another.

    ``raw`` is the mean score of ``pairs`` pairs, ``None`` without pairs. ``corrected`` is free of
    the judge's errors on ``gold`` labels; where it is ``None``, ``why`` says why. ``separately``
    tells whether the errors were counted separately by which answer is the longer.
    """

    pairs: int
    gold: int
    raw: Estimate | None
    corrected: Estimate | None
    separately: bool
    why: str = ""


class LengthControlled(NamedTuple):
    """A win rate at equal lengths.

    ``raw`` is the mean score, and ``controlled`` what the score would be without a difference of
    lengths; ``slope`` is what one standard deviation of it adds to the log-odds, about. All are
    ``None`` without pairs.
    """

    pairs: int
    raw: Estimate | None
    controlled: Estimate | None
    slope: float | None


def corrected_win_rate(
    scores: Sequence[float],
    longer: Sequence[bool | None],
    gold: Sequence[GoldVerdict],
    *,
    confidence: float = 0.95,
) -> WinRate:
    """The win rate free of a judge's errors, with an interval that counts how well these are known.

    Let q₁ be the judge's mean score of the better answer where that is the longer one, and q₀ where
    it is the shorter one. Of pairs in which the first policy's answer is longer, the mean score is
    p = θ q₁ + (1 - θ)(1 - q₀), and so θ = (p + q₀ - 1) / (q₀ + q₁ - 1) (arXiv 2511.21140, with mean
    scores for sensitivity and specificity, so that ties are counted). Where it is shorter, q₀ and
    q₁ change places. Over all pairs, of which the share λ has a longer first answer,

        θ = (p + λ q₀ + (1 - λ) q₁ - 1) / (q₀ + q₁ - 1).

    A pair of equal lengths counts half on each side. The interval is Fieller's: all θ for which a
    two-sided test of numerator - θ · denominator = 0 does not refuse. Unlike the delta method it
    holds where the denominator is known badly. Where the denominator cannot be told from 0, there
    is no corrected rate.

    With fewer than ``LEAST_GOLD`` labels on one side, q₀ = q₁ is the mean over all gold, and
    ``why`` says that what the judge likes about length is neither corrected nor counted. The limit
    is low because few labels make the interval wide, but not wrong: with 12 it covers in 91 % or
    more, with a limit of 5 in as few as 58 %, for a judge that likes length. The number of labels
    decides that, not what they say: to look at the errors first would make the interval too narrow.

    All this supposes that the judge errs on these pairs as it does on the gold: use gold of the
    same stratum.

    Args:
        scores: of the first policy's answers, 0, .5 or 1.
        longer: whether the first policy's answer is the longer one; ``None`` for equal lengths.
        gold: what the judge said where people know better.
        confidence: of the intervals.
    """
    if not scores:
        return WinRate(0, 0, None, None, False, "there are no pairs")
    raw, pairs = _rate(scores, confidence), len(scores)
    if not gold:
        return WinRate(pairs, 0, raw, None, False, "no gold says how often the judge errs")
    q1 = _mean([_score(one) for one in gold if one.longer == one.gold])
    q0 = _mean([_score(one) for one in gold if one.longer not in (one.gold, None)])
    half = [0.5 if one is None else float(one) for one in longer]
    separately, part, why = min(q0.n, q1.n) >= LEAST_GOLD, sum(half) / pairs, ""
    # The numerator is mean score - 1 + Σ n q, the denominator Σ d q - 1, over q with their n and d.
    if separately:
        parts = [(q0, part, 1.0), (q1, 1 - part, 1.0)]
    else:
        q0 = q1 = _mean([*map(_score, gold)])
        parts = [(q1, 1.0, 2.0)]
        why = (
            f"what the judge likes about length is not corrected: that needs {LEAST_GOLD} labels "
            "where the longer answer is better and as many where the shorter one is"
        )
    used = sum(q.n for q, *_ in parts)
    top = sum(scores) / pairs - 1 + sum(n * q.value for q, n, _ in parts)
    bottom = sum(d * q.value for q, _, d in parts) - 1
    # Which answers are longer is chance, too: q₀ and q₁ are weighted pair by pair.
    bias = q0.centre - q1.centre
    over = _mean([s + h * bias for s, h in zip(scores, half, strict=True)], middle=part * bias)
    limits = _fieller(
        over.centre - part * bias - 1 + sum(n * q.centre for q, n, _ in parts),
        sum(d * q.centre for q, _, d in parts) - 1,
        over.variance + sum(n * n * q.variance for q, n, _ in parts),
        sum(n * d * q.variance for q, n, d in parts),
        sum(d * d * q.variance for q, _, d in parts),
        _quantile(confidence),
    )
    if limits is None or bottom <= 0:
        why = (
            "the judge is not shown to be better than a coin: its mean score of the better answer "
            f"is {(bottom + 1) / 2:.2f} on gold of {used}"
        )
        return WinRate(pairs, used, raw, None, separately, why)
    if limits[0] > 1 or limits[1] < 0:
        why = (
            f"a judge that errs as on its gold of {used} cannot give a mean score of "
            f"{raw.value:.2f}; the gold is not like these pairs"
        )
        return WinRate(pairs, used, raw, None, separately, why)
    value, low, high = (_clipped(one) for one in (top / bottom, *limits))
    corrected = Estimate(value, min(low, value), max(high, value))
    return WinRate(pairs, used, raw, corrected, separately, why)


class _Mean(NamedTuple):
    """The mean ``value`` of n numbers.

    ``centre`` and ``variance`` (of the mean) have two numbers added, as far apart as a win and a
    loss, so that a few equal ones do not count as certain (Agresti and Coull 1998).
    """

    n: int
    value: float
    centre: float
    variance: float


def _mean(numbers: Sequence[float], middle: float = 0.0) -> _Mean:
    """The mean of numbers from ``middle`` to ``middle`` + 1, about."""
    more = [*numbers, middle, middle + 1]
    centre = sum(more) / len(more)
    variance = sum((one - centre) ** 2 for one in more) / len(more) ** 2
    value = sum(numbers) / len(numbers) if numbers else middle + 0.5
    return _Mean(len(numbers), value, centre, variance)


def _fieller(
    top: float, bottom: float, of_top: float, both: float, of_bottom: float, z: float
) -> tuple[float, float] | None:
    """All θ with (top - θ bottom)² ≤ z² Var(top - θ bottom); ``None`` where bottom may be 0.

    ``of_top`` and ``of_bottom`` are variances, ``both`` is the covariance.
    """
    a = bottom**2 - z**2 * of_bottom
    b = top * bottom - z**2 * both
    c = top**2 - z**2 * of_top
    if a <= 0 or bottom <= 0:
        return None
    root = math.sqrt(max(0.0, b**2 - a * c))
    return (b - root) / a, (b + root) / a


def _rate(scores: Sequence[float], confidence: float) -> Estimate:
    """The mean score, with a normal interval that has z²/2 ones and as many zeros added."""
    z = _quantile(confidence)
    n, mean = len(scores) + z**2, sum(scores) / len(scores)
    centre = (sum(scores) + z**2 / 2) / n
    squares = sum((one - centre) ** 2 for one in scores)
    squares += z**2 / 2 * (centre**2 + (1 - centre) ** 2)
    wide = z * math.sqrt(squares) / n
    return Estimate(mean, min(mean, _clipped(centre - wide)), max(mean, _clipped(centre + wide)))


def _score(one: GoldVerdict) -> float:
    """The judge's score of the answer that people hold to be the better one."""
    return 0.5 if one.right is None else float(one.right)


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))


def _quantile(confidence: float) -> float:
    """The two-sided quantile z of the standard normal distribution: 1.96 for .95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def length_controlled_win_rate(
    scores: Sequence[float], length_difference: Sequence[float], *, confidence: float = 0.95
) -> LengthControlled:
    """What the judge would say if both answers were equally long, as in AlpacaEval 2.0.

    A logistic regression of the score on an intercept and on tanh(difference / its standard
    deviation); the win rate is predicted at a difference of 0 (Dubois et al. 2024, arXiv
    2404.04475). AlpacaEval's terms for how difficult an instruction is, and its games against
    itself, need its own data and are left out. The interval is Wald's, in log-odds.

    Both coefficients have the prior of half a win and half a loss, log-F(1, 1) (Greenland and
    Mansournia 2015), so that they are finite also where one policy always wins.

    Args:
        scores: of the first policy's answers, 0 to 1.
        length_difference: length of its answer less that of the second policy's, in any unit.
        confidence: of the intervals.

    Raises:
        MissingDependency: scipy is not installed.
    """
    if not scores:
        return LengthControlled(0, None, None, None)
    optimize = library("scipy.optimize")
    import numpy as np  # which scipy brings

    differences = np.array(length_difference, dtype=float)
    wide = differences.std(ddof=1) if len(scores) > 1 else 0.0
    standard = np.tanh(differences / wide) if wide > 0 else np.zeros(len(scores))
    own = np.column_stack([np.ones(len(scores)), standard])
    features = np.vstack([own, np.eye(2)])  # (pairs + 2, 2): the last two rows are the prior
    targets = np.append(np.array(scores, dtype=float), [0.5, 0.5])

    def loss(weights: Any) -> tuple[float, Any]:
        odds = features @ weights
        given = np.exp(-np.logaddexp(0, -odds))
        return (np.logaddexp(0, odds) - targets * odds).sum(), features.T @ (given - targets)

    fitted = optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    given = 1 / (1 + np.exp(-features @ fitted))
    covariance = np.linalg.inv(features.T @ (features * (given * (1 - given))[:, None]))
    half = _quantile(confidence) * math.sqrt(covariance[0, 0])
    value, low, high = (1 / (1 + math.exp(-fitted[0] - off)) for off in (0, -half, half))
    slope = float(fitted[1])
    return LengthControlled(
        len(scores), _rate(scores, confidence), Estimate(value, low, high), slope
    )


def ratings(comparisons: Iterable[tuple[str, str, Winner]]) -> dict[str, float]:
    """The strength s of each policy by Bradley and Terry, the strongest first.

    P(i beats j) = s_i / (s_i + s_j); the geometric mean of all strengths is 1. A tie is half a win
    of each. To all comparisons, each policy's ties with all others are added, which weigh as much
    as one comparison together: without them, strengths are not finite where a policy never lost, or
    not defined where no chain of comparisons leads from one to another.

    Args:
        comparisons: two policies, and which of their answers is better.

    Raises:
        MissingDependency: evalica is not installed.
    """
    known = [*comparisons]
    names = [*dict.fromkeys(name for a, b, _ in known for name in (a, b))]
    if len(names) < 2:
        return dict.fromkeys(names, 1.0)
    evalica = library("evalica")
    winners = {"a": evalica.Winner.X, "b": evalica.Winner.Y, "tie": evalica.Winner.Draw}
    weak = [(a, b, "tie") for a, b in itertools.combinations(names, 2)]
    firsts, seconds, outcomes = zip(*known, *weak, strict=True)
    found = evalica.bradley_terry(
        firsts,
        seconds,
        [winners[outcome] for outcome in outcomes],
        weights=[1.0] * len(known) + [1 / (len(names) - 1)] * len(weak),
        tolerance=1e-9,
        limit=10_000,
    ).scores
    mean = math.exp(sum(map(math.log, found)) / len(names))
    return {name: float(found[name]) / mean for name in found.sort_values(ascending=False).index}
