"""How right a judge is, measured on gold: questions whose better answer people have named.

A judge is trusted in a stratum where an exact one-sided bound shows that it is right more often
than a coin; its noise ε there is the share of its pairs that training has to expect to be flipped.
A question counts once, by the verdict that holds in both orders. Ties make no pairs, so they count
neither as right nor as wrong, but are shown.

Intervals of shares are exact (Clopper and Pearson 1934). The biases of position and length only
tell people what is wrong with a judge; nothing is decided by them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

from agentpref.errors import MissingDependency
from agentpref.types import Winner

LEAST_NOISE = 0.05
"""No judge counts as righter than this: a few dozen gold labels do not show it."""

_BINS = 10
_DRAWS = 10_000  # Monte Carlo error of a 95 % limit: about .02 standard errors


class GoldVerdict(NamedTuple):
    """What a judge said of one question whose better answer people know.

    ``stratum`` is the question's tag, ``gold`` the better answer. Both verdicts name the answers as
    they were given: ``swapped`` is swapped back. ``longer`` is the longer answer, ``None`` where
    both are as long. ``confidence`` is how probable the judge held its verdict to be, .5 to 1.
    """

    stratum: str
    gold: Literal["a", "b"]
    as_given: Winner
    swapped: Winner
    longer: Literal["a", "b"] | None
    confidence: float | None = None

    @property
    def winner(self) -> Winner:
        """The verdict that holds in both orders, else a tie."""
        return self.as_given if self.as_given == self.swapped else "tie"

    @property
    def right(self) -> bool | None:
        """Whether the verdict is people's; ``None`` for a tie."""
        return None if self.winner == "tie" else self.winner == self.gold

    def swap(self) -> GoldVerdict:
        """The same verdicts with the answers in the other order."""
        other: Mapping[Any, Any] = {"a": "b", "b": "a"}
        gold, given, swapped, longer = (other.get(one, one) for one in self[1:5])
        return GoldVerdict(self.stratum, gold, swapped, given, longer, self.confidence)


class Estimate(NamedTuple):
    """A number with a two-sided interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """How right a judge is on ``n`` questions; ``None`` where nothing was there to measure by.

    ``right``, ``wrong`` and ``ties`` add up to ``n``. ``accuracy`` is the share of the right ones
    among the decided, and ``lower`` its one-sided exact bound, 0 where nothing was decided.
    ``consistency`` is the share of questions on which both orders agree. ``position_bias``, -.5 to
    .5, is the share of verdicts, ties left out, that name the answer shown first, minus .5.
    ``sensitivity`` and ``specificity`` are the accuracy where the longer and where the shorter
    answer is the better one, and ``length_bias`` is their difference: above 0, length pleases.
    ``calibration_error`` (expected calibration error, ten bins) and ``brier`` compare confidences
    with what was right, on decided questions with a confidence; 0 is perfect.
    """

    n: int
    right: int
    wrong: int
    ties: int
    accuracy: Estimate | None
    lower: float
    consistency: Estimate | None
    position_bias: Estimate | None
    sensitivity: Estimate | None
    specificity: Estimate | None
    length_bias: Estimate | None
    calibration_error: float | None = None
    brier: float | None = None

    @property
    def noise(self) -> float:
        """ε, the share of its decided verdicts that are wrong: the Jeffreys mean."""
        return (self.wrong + 0.5) / (self.right + self.wrong + 1)

    @property
    def trusted(self) -> bool:
        """Whether it is shown to be right more often than a coin."""
        return self.lower > 0.5

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values; ``noise`` and ``trusted`` are there to be read by people."""
        found = asdict(self) | {"noise": self.noise, "trusted": self.trusted}
        return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in found.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Reliability:
        """Undo :meth:`to_mapping`; keys of newer versions are passed over."""
        known: dict[str, Any] = {
            name: Estimate(**value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if name in cls.__dataclass_fields__
        }
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How right a judge is in each stratum; ``pooled`` is all of it, and only for show."""

    confidence: float
    pooled: Reliability
    strata: Mapping[str, Reliability] = field(default_factory=dict)

    def noise(self, tag: str) -> float | None:
        """The judge's ε in a stratum, .05 or more and below .5; ``None`` if it is not trusted."""
        known = self.strata.get(tag)
        # Where the bound is above .5, more than half are right, and so ε is below .5.
        return max(LEAST_NOISE, known.noise) if known is not None and known.trusted else None

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values; the pooled reliability is ``all``."""
        strata = {tag: one.to_mapping() for tag, one in self.strata.items()}
        return {"confidence": self.confidence, "all": self.pooled.to_mapping(), "strata": strata}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Calibration:
        """Undo :meth:`to_mapping`."""
        strata = {tag: Reliability.from_mapping(one) for tag, one in values["strata"].items()}
        return cls(values["confidence"], Reliability.from_mapping(values["all"]), strata)


def calibrate(gold: Sequence[GoldVerdict], *, confidence: float = 0.95) -> Calibration:
    """Measure a judge in each stratum that has gold.

    Raises:
        MissingDependency: scipy is not installed.
    """
    strata: dict[str, list[GoldVerdict]] = defaultdict(list)
    for one in gold:
        strata[one.stratum].append(one)
    return Calibration(
        confidence,
        _reliability(gold, confidence),
        {tag: _reliability(strata[tag], confidence) for tag in sorted(strata)},
    )


def _reliability(gold: Sequence[GoldVerdict], confidence: float) -> Reliability:
    right, wrong = _counts(gold)
    longer = share(*_counts([one for one in gold if one.longer == one.gold]), confidence)
    shorter = share(
        *_counts([one for one in gold if one.longer not in (one.gold, None)]), confidence
    )
    agree = sum(one.as_given == one.swapped for one in gold)
    sure = [(one.confidence, one.right) for one in gold]
    known = [(c, r) for c, r in sure if c is not None and r is not None]
    return Reliability(
        n=len(gold),
        right=right,
        wrong=wrong,
        ties=len(gold) - right - wrong,
        accuracy=share(right, wrong, confidence),
        lower=_lower(right, wrong, confidence),
        consistency=share(agree, len(gold) - agree, confidence),
        position_bias=_position_bias(gold, confidence),
        sensitivity=longer,
        specificity=shorter,
        length_bias=None if longer is None or shorter is None else _difference(longer, shorter),
        calibration_error=_calibration_error(known),
        brier=sum((c - r) ** 2 for c, r in known) / len(known) if known else None,
    )


def _counts(gold: Iterable[GoldVerdict]) -> tuple[int, int]:
    """How many verdicts are right, and how many are wrong."""
    counts = Counter(one.right for one in gold)
    return counts[True], counts[False]


def share(yes: int, no: int, confidence: float) -> Estimate | None:
    """yes / (yes + no) with its exact two-sided interval; ``None`` of nothing."""
    if not yes + no:
        return None
    test = library("scipy.stats").binomtest(yes, yes + no)
    low, high = test.proportion_ci(confidence, method="exact")
    return Estimate(yes / (yes + no), float(low), float(high))


def _lower(right: int, wrong: int, confidence: float) -> float:
    """The one-sided exact lower bound of right / (right + wrong)."""
    if not right + wrong:
        return 0.0
    test = library("scipy.stats").binomtest(right, right + wrong, alternative="greater")
    return float(test.proportion_ci(confidence, method="exact").low)


def _difference(one: Estimate, other: Estimate) -> Estimate:
    """The difference of two independent shares, with an interval made of both of theirs.

    Newcombe 1998, method 10, with exact intervals for Wilson's: conservative, and not of no width
    where both shares are 0 or 1, as a normal or a bootstrap interval is.
    """
    value = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above))


def _position_bias(gold: Sequence[GoldVerdict], confidence: float) -> Estimate | None:
    """Σ first / Σ named − ½, where ``first`` of a question's ``named`` verdicts name the first.

    The two verdicts of a question hang together: a consistent judge names the first answer exactly
    once each time. So questions are resampled, not verdicts. A bootstrap would give such a judge an
    interval of no width after a single question; a Bayesian bootstrap, whose prior weighs as much
    as one question over the five kinds (first, named), does not.
    """
    kinds = Counter((first, named) for first, named in map(_named, gold) if named)
    if not kinds:
        return None
    import numpy as np  # which scipy brings

    firsts, nameds = np.array([0, 1, 0, 1, 2]), np.array([1, 1, 2, 2, 2])
    counts = np.array([kinds[kind] for kind in zip(firsts.tolist(), nameds.tolist(), strict=True)])
    value = float(counts @ firsts / (counts @ nameds)) - 0.5
    drawn = np.random.default_rng(0).dirichlet(counts + 1 / len(counts), _DRAWS)  # (draws, kinds)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn @ firsts / (drawn @ nameds) - 0.5, [tail, 1 - tail])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def _named(one: GoldVerdict) -> tuple[int, int]:
    """How many of a question's two verdicts name the answer shown first, and how many name one."""
    first = (one.as_given == "a") + (one.swapped == "b")
    return first, sum(winner != "tie" for winner in (one.as_given, one.swapped))


def _calibration_error(known: Sequence[tuple[float, bool]]) -> float | None:
    """Σ_b n_b / n · |mean confidence − share right| over ten equal bins b (Guo et al. 2017)."""
    if not known:
        return None
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for sure, right in known:
        bins[min(int(sure * _BINS), _BINS - 1)].append((sure, right))
    return sum(abs(sum(sure - right for sure, right in one)) for one in bins.values()) / len(known)


def drifted(
    calibration: Calibration, rechecked: Sequence[GoldVerdict], confidence: float = 0.95
) -> str | None:
    """Say how far a judge is less right than it was, if that is no chance; else ``None``.

    The test is one-sided and exact: of each stratum, how many of the wrong verdicts fall to the
    recheck is hypergeometric if nothing changed (Fisher's exact test), and the sum over the strata
    is convolved from them (the exact form of the Mantel-Haenszel test), so another mix of strata is
    not taken for drift. Strata that the calibration does not have are passed over, and ties too.
    That the same questions may be asked again, makes the test only more careful.

    Raises:
        MissingDependency: scipy is not installed.
    """
    stats = library("scipy.stats")
    import numpy as np  # which scipy brings

    chances, now, before = np.ones(1), [0, 0], [0, 0]  # chances[k]: of k wrong ones in the recheck
    for tag, known in calibration.strata.items():
        right, wrong = _counts(one for one in rechecked if one.stratum == tag)
        then = known.right + known.wrong
        if right + wrong and then:
            now, before = (
                [now[0] + right, now[1] + wrong],
                [before[0] + known.right, before[1] + then],
            )
            table = stats.hypergeom(then + right + wrong, known.wrong + wrong, right + wrong)
            chances = np.convolve(chances, table.pmf(np.arange(right + wrong + 1)))
    chance = float(chances[now[1] :].sum())
    if chance > 1 - confidence:
        return None
    return (
        f"right in {now[0]} of {sum(now)} decided verdicts now, in {before[0]} of {before[1]} when "
        f"it was calibrated; chance alone does that once in {1 / max(chance, 1e-9):,.0f} times"
    )


def people_agreement(
    votes: Iterable[tuple[Hashable, Hashable, str]], *, alpha: bool = True
) -> dict[str, Any]:
    """How far people agree with themselves and with each other: what no judge can surpass.

    Args:
        votes: what was compared, by whom, and the winner, the oldest first.
        alpha: whether to compute Krippendorff's α, too.

    Returns:
        ``votes``; ``repeats`` and ``self_agreement``: how often a voter judged the same again, and
        the share of these that say what the vote before said; ``pairs`` and ``agreement``: pairs of
        voters who judged the same, and the share that agrees, by the last vote of each; ``alpha``:
        Krippendorff's (nominal), 1 for full agreement, 0 for that of chance. ``None`` where nothing
        was there to compare; of alpha also where nobody ever said anything else.

    Raises:
        MissingDependency: evalica is not installed.
    """
    last: dict[Hashable, dict[Hashable, str]] = defaultdict(dict)
    count, again = 0, list[bool]()
    for unit, voter, winner in votes:
        count += 1
        if voter in last[unit]:
            again.append(last[unit][voter] == winner)
        last[unit][voter] = winner
    shared = [[*by_voter.values()] for by_voter in last.values() if len(by_voter) > 1]
    alike = [one == other for unit in shared for one, other in itertools.combinations(unit, 2)]
    return {
        "votes": count,
        "repeats": len(again),
        "self_agreement": sum(again) / len(again) if again else None,
        "pairs": len(alike),
        "agreement": sum(alike) / len(alike) if alike else None,
        "alpha": _alpha(shared) if alpha else None,
    }


def _alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's α of units with two or more votes each.

    Who voted does not matter to α, so the rows of the table are a unit's first vote, its second,
    and so on, instead of voters: it stays small with many of them.
    """
    if len({winner for unit in units for winner in unit}) < 2:
        return None
    evalica = library("evalica")
    import pandas as pd  # which evalica brings

    return float(evalica.alpha(pd.DataFrame([*itertools.zip_longest(*units)])).alpha)


def library(name: str) -> Any:
    """A library of the extra ``judge``, imported when it is needed.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"measuring a judge needs {error.name}: pip install 'agentpref[judge]'"
        ) from error
