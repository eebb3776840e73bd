"""Compares any number of revisions on the same examples, stratum by stratum.

The unit is the prompt: examples that share one rise and fall together. Where each prompt is either
right or wrong, the interval of an accuracy is exact (Clopper & Pearson 1934, Biometrika 26); else,
with ties or several examples of a prompt, it is the percentile bootstrap over prompts of
:mod:`agentpref.prove.bootstrap`. Two revisions are compared by the change on each prompt: an exact
sign test, which holds at any number of prompts, and the mean with an interval of the same
confidence. Where prompts change by one and the same size or not at all, that is the adjusted Wald
interval of a paired difference (Bonett & Price 2012, J Educ Behav Stat 37; scipy has none), which
has a width also if all prompts changed alike: simulated, it holds the true change in .944 to 1.00
of the cases, for 8 to 100 prompts and a nominal .95. Else it is bootstrapped. Revisions are told
apart only where both agree, and the interval is widened to 0 where the sign test cannot exclude it.

Nothing is corrected for looking at many strata or many times: this is for looking. The gate decides
by its own evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Literal

from agentpref.learn.encode import EncodedExample
from agentpref.prefer.strata import ANY, coarsen, stratify
from agentpref.prove.bootstrap import Paired, lower_bound, scipy
from agentpref.prove.evaluate import Scores
from agentpref.prove.metrics import accuracy
from agentpref.prove.signs import sign_test
from agentpref.types import Stratum

Method = Literal["exact", "bootstrap", "none"]
Finding = Literal["better", "worse", "not told apart"]
ALL, THUMBS = "all", "thumbs"
"""The names of the group of all examples, and of the lone thumbs among them."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An accuracy with a two-sided interval; ``none`` where it has none, as the base's ½."""

    accuracy: float
    lower: float | None
    upper: float | None
    method: Method


@dataclass(frozen=True, slots=True)
class Difference:
    """The change of accuracy from ``against`` to ``revision`` on the same examples.

    ``lower`` and ``upper`` are the ends of a two-sided interval. ``wins`` and ``losses`` count the
    prompts on which the revision is more and less often right; ``p`` is that of the two-sided sign
    test on them. ``finding`` names a change that both exclude 0 for.
    """

    revision: str
    against: str
    change: float
    lower: float
    upper: float
    wins: int
    losses: int
    p: float
    finding: Finding


@dataclass(frozen=True, slots=True)
class Group:
    """One group of examples, and how right each revision is about it.

    ``trained`` says that these are examples whose prompts trained one of the revisions, and so show
    what it remembers and not what it has understood. ``examples`` counts those that count as
    evidence, lone ``thumbs`` among them; ``prompts`` are distinct.
    """

    name: str
    trained: bool
    examples: int
    thumbs: int
    prompts: int
    accuracy: Mapping[str, Interval]
    differences: tuple[Difference, ...]


def compare(
    rows: Sequence[EncodedExample],
    scores: Mapping[str, Sequence[float]],
    *,
    trained: Sequence[bool],
    by_age: bool,
    minimum: int,
    confidence: float,
    seed: int,
) -> list[Group]:
    """Compare revisions on all rows, on their lone thumbs, and on each stratum.

    Args:
        rows: what was scored.
        scores: how right each revision is about each row, from 0 to 1, by its name.
        trained: of each row, whether its prompt trained one of the revisions. These rows are in
            groups of their own.
        by_age: whether strata have thirds of age; a file's rows have no time of their own.
        minimum: strata with fewer rows are pooled with their siblings, as in the gate.
        confidence: of the intervals, which are two-sided.
        seed: of the bootstrap.

    Returns:
        The groups with any evidence. Lone thumbs count in equal numbers of likes and dislikes.
    """
    found: list[Group] = []
    for is_trained in (False, True):
        numbers = [i for i in range(len(rows)) if trained[i] is is_trained]
        for name, some in _groups(rows, numbers, by_age, minimum):
            any_scores = next(iter(scores.values()))
            counted = Scores(rows, any_scores, any_scores).counted(some)
            if not counted:
                continue
            prompts = [rows[i].example.prompt.id for i in counted]
            own = {rev: [right[i] for i in counted] for rev, right in scores.items()}
            found.append(
                Group(
                    name,
                    is_trained,
                    len(counted),
                    sum(rows[i].example.lone for i in counted),
                    len(set(prompts)),
                    {rev: interval(right, prompts, confidence, seed) for rev, right in own.items()},
                    tuple(
                        difference(later, own[later], first, own[first], prompts, confidence, seed)
                        for first, later in combinations(own, 2)
                    ),
                )
            )
    return found


def _groups(
    rows: Sequence[EncodedExample], numbers: Sequence[int], by_age: bool, minimum: int
) -> Iterator[tuple[str, list[int]]]:
    """All rows, the lone ones if there are others, and the strata unless there is only one."""
    if not numbers:
        return
    yield ALL, [*numbers]
    lone = [i for i in numbers if rows[i].example.lone]
    if 0 < len(lone) < len(numbers):
        yield THUMBS, lone
    strata = stratify([rows[i].example for i in numbers])
    if not by_age:
        strata = tuple(stratum._replace(age=ANY) for stratum in strata)
    strata = coarsen(strata, minimum)
    groups: dict[Stratum, list[int]] = {}
    for number, stratum in zip(numbers, strata, strict=True):
        groups.setdefault(stratum, []).append(number)
    if len(groups) > 1:
        yield from ((short(stratum), groups[stratum]) for stratum in sorted(groups))


def short(stratum: Stratum) -> str:
    """The name of a stratum without its namespace and without the parts that are pooled."""
    return "/".join(part for part in stratum[1:] if part != ANY)


def interval(
    right: Sequence[float], prompts: Sequence[str], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of ``right`` with a two-sided interval over prompts.

    >>> interval([1.0] * 5, ["a", "b", "c", "d", "e"])
    Interval(accuracy=1.0, lower=0.47817624708337014, upper=1.0, method='exact')
    """
    mean, means = accuracy(right), _means(right, prompts)
    if set(means) <= {0.0, 1.0} and (len(means) == len(right) or len(set(means)) == 1):
        lower, upper = proportion(sum(means), len(means), confidence)
        return Interval(mean, lower, upper, "exact")
    if len(set(means)) == 1:
        return Interval(mean, None, None, "none")
    paired = Paired((0.0,) * len(right), tuple(right), tuple(prompts))
    lower, upper = _bootstrapped(paired, confidence, seed)
    return Interval(mean, max(0.0, lower), min(1.0, upper), "bootstrap")


def proportion(right: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share, ``right`` of ``total`` (Clopper & Pearson)."""
    found = scipy("stats").binomtest(round(right), total).proportion_ci(confidence, "exact")
    return float(found.low), float(found.high)


def difference(
    revision: str,
    right: Sequence[float],
    against: str,
    right_against: Sequence[float],
    prompts: Sequence[str],
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two revisions on the same examples, see :class:`Difference`."""
    paired = Paired(tuple(right_against), tuple(right), tuple(prompts))
    changes = _means([new - old for new, old in zip(right, right_against, strict=True)], prompts)
    wins, losses = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    p = sign_test(wins, losses)
    sizes = {abs(change) for change in changes if change}
    if len(sizes) < 2 and (len(changes) == len(right) or len(set(changes)) == 1):
        bounds = _adjusted_wald(wins, losses, len(changes), max(sizes, default=1.0), confidence)
    else:
        bounds = _bootstrapped(paired, confidence, seed)
    lower, upper = bounds
    finding: Finding = "not told apart"
    if p >= 1 - confidence:
        lower, upper = min(lower, 0.0), max(upper, 0.0)
    elif lower > 0 or upper < 0:
        finding = "better" if lower > 0 else "worse"
    change = accuracy(right) - accuracy(right_against)
    return Difference(revision, against, change, lower, upper, wins, losses, p, finding)


def _adjusted_wald(
    up: int, down: int, total: int, size: float, confidence: float
) -> tuple[float, float]:
    """The interval of the mean of ``total`` changes by +``size``, −``size`` or 0.

    Bonett & Price (2012): Wald's, with one change more in either direction.
    """
    better, worse = (up + 1) / (total + 2), (down + 1) / (total + 2)
    mean = better - worse
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    width = z * math.sqrt((better + worse - mean**2) / (total + 2))
    return size * max(-1.0, mean - width), size * min(1.0, mean + width)


def _bootstrapped(paired: Paired, confidence: float, seed: int) -> tuple[float, float]:
    """The two-sided percentile interval of the mean change, resampled over prompts."""
    each = (1 + confidence) / 2
    lower = lower_bound(paired, confidence=each, seed=seed).lower
    return lower, -lower_bound(paired.swap(), confidence=each, seed=seed).lower


def _means(values: Sequence[float], prompts: Sequence[str]) -> list[float]:
    """The mean of the values of each prompt."""
    by_prompt: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(value)
    return [sum(own) / len(own) for own in by_prompt.values()]
