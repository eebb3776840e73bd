"""Whether people changed their minds: a change point in what a frozen policy is right about.

Judgements of one stratum come in order of their dates. None of them trained the live policy: the
old ones were held out, and the new ones it has not learned. Of each prompt it is known whether live
ranks its answers as people did. Most often live is right about the old ones and wrong about the
new; where it never learned what people thought for a while, it is the other way round. Evidence
against an old preference is not forgetting, and noise is no new preference. So minds changed only
where all of these hold, each by an exact test:

- live is on one side about the old judgements, more often than chance (binomial);
- it is on the other side about the new ones, more often than chance (binomial), and about two in
  three at least: where people disagree by a little, the old preference stays protected;
- its rate changes at some point in the order of dates. The statistic is the largest likelihood
  ratio over all points, of two Bernoulli rates, the first higher, against one:

      Λ = max_k  k·H(x_k/k, x_n/n) + (n−k)·H((x_n−x_k)/(n−k), x_n/n),   x_k/k > (x_n−x_k)/(n−k)

  for n judgements, x_k of the first k on the old side, and H the divergence of two Bernoulli
  distributions (Page 1955; Worsley 1983). Without a change all orders of the same judgements are
  equally likely: the p-value is the exact share of lattice paths that reach Λ anywhere.

Contradictions on the very same prompts count like those on fresh ones: the newer judgement makes
another example, which live has not learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from agentpref.prove.bootstrap import scipy
from agentpref.prove.signs import sign_test

CLEAR = 2 / 3
"""The share of the new judgements that must contradict, beside all tests."""


class Judged(NamedTuple):
    """A prompt's judgement: its date in POSIX seconds, and whether the policy agrees with it."""

    at: float
    right: bool


class ChangePoint(NamedTuple):
    """Where the rate falls: ``place`` judgements lie before it; ``p_value`` is exact."""

    place: int
    statistic: float
    p_value: float


class Contradiction(NamedTuple):
    """What new judgements say against old ones.

    ``contradicting`` of ``new`` judgements are on the other side of live than ``opposed`` of
    ``old`` ones; ``live_agrees`` is whether live sides with the new. ``since`` is the date of the
    first judgement after the change point, and ``p_value`` the largest of the three tests.
    ``state`` is ``changed``; or ``undecided``, where more contradict than agree and that is not
    proven yet.
    """

    state: Literal["changed", "undecided"]
    new: int
    contradicting: int
    old: int
    opposed: int
    live_agrees: bool
    since: float
    p_value: float


def by_prompt(values: Iterable[tuple[str, float, float]]) -> list[Judged]:
    """One sign per prompt, in order of dates: of its correctness (0 to 1), which may be even.

    Args:
        values: a prompt's id, a date and a correctness for each example. Examples of one prompt
            are not independent: their mean counts, at the newest date; even ones do not.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for prompt, at, correctness in values:
        found.setdefault(prompt, []).append((at, correctness))
    judged = []
    for own in found.values():
        mean = sum(correctness for _, correctness in own) / len(own)
        if mean != 0.5:
            judged.append(Judged(max(at for at, _ in own), mean > 0.5))
    return sorted(judged)


def contradiction(
    old: Sequence[Judged], new: Sequence[Judged], *, level: float
) -> Contradiction | None:
    """Say whether new judgements contradict what a policy has learned.

    Args:
        old: judgements of what it has learned, which did not train it.
        new: judgements that it has not learned.
        level: the probability, for each test, of a change where there is none.

    Returns:
        ``None`` where there is nothing to say: most old and new judgements are on the same side, or
        it is not proven on which the old ones are.
    """
    agrees = 2 * sum(one.right for one in new) > len(new)
    contradicting = sum(one.right is agrees for one in new)
    opposed = sum(one.right is not agrees for one in old)
    certain = more_than_chance(opposed, len(old))
    if 2 * contradicting <= len(new) or certain > level:
        return None
    ordered = sorted([*old, *new], key=lambda one: one.at)
    point = fall([one.right is not agrees for one in ordered])
    if point is None:
        return None
    p_value = max(more_than_chance(contradicting, len(new)), certain, point.p_value)
    changed = p_value <= level and contradicting >= CLEAR * len(new)
    return Contradiction(
        "changed" if changed else "undecided",
        len(new),
        contradicting,
        len(old),
        opposed,
        agrees,
        ordered[point.place].at,
        p_value,
    )


def fall(right: Sequence[bool]) -> ChangePoint | None:
    """Where a rate falls, if it does anywhere, and how likely such a fall is by chance."""
    n, total = len(right), sum(right)
    if n < 2:
        return None
    np, _ = _numbers()
    k = np.arange(1, n)
    ratios = _ratios(k, np.cumsum(right)[:-1], n, total)
    if ratios.max() <= 0:
        return None
    place = int(ratios.argmax())  # of equal ones, the earliest
    statistic = float(ratios[place])
    return ChangePoint(int(k[place]), statistic, _share_of_paths(n, total, statistic))


def _share_of_paths(n: int, total: int, statistic: float) -> float:
    """The share of the orders of ``total`` ones among ``n`` that reach a statistic at some point.

    Paths are followed point by point by the probability of each number of ones so far, and those
    that reach the statistic leave: O(n · total).
    """
    np, _ = _numbers()
    ones, reached = np.arange(total + 1), 0.0
    inside = np.zeros(total + 1)
    inside[0] = 1.0
    for k in range(1, n):
        is_open = n - k + 1  # places that are not set yet
        up = inside * np.clip((total - ones) / is_open, 0, 1)
        inside = inside - up
        inside[1:] += up[:-1]
        out = _ratios(k, ones, n, total) >= statistic - 1e-12
        reached += float(inside[out].sum())
        inside[out] = 0.0
    return min(1.0, reached)


def _ratios(k: Any, ones: Any, n: int, total: int) -> Any:
    """Logarithms of likelihood ratios of a fall after ``k`` of ``n``; 0 where it is no fall."""
    np, rel_entr = _numbers()
    before = np.clip(ones / k, 0, 1)
    after = np.clip((total - ones) / (n - k), 0, 1)
    mean = total / n

    def divergence(p: Any) -> Any:
        return rel_entr(p, mean) + rel_entr(1 - p, 1 - mean)

    found = k * divergence(before) + (n - k) * divergence(after)
    possible = (ones <= k) & (total - ones <= n - k)
    return np.where(possible & (before > after), found, 0.0)


def more_than_chance(successes: int, trials: int) -> float:
    """The exact p-value of so many successes where half were expected, one-sided."""
    return sign_test(successes, trials - successes, one_sided=True)


def _numbers() -> tuple[Any, Any]:
    """numpy, and scipy's relative entropy.

    Raises:
        MissingDependency: scipy is not installed.
    """
    rel_entr = scipy("special").rel_entr
    import numpy as np  # which scipy brings

    return np, rel_entr
