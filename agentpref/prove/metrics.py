"""Measures of a policy, as pure functions of numbers and tokens.

A *margin* is DPO's implicit reward margin of one held-out pair (2305.18290, eq. 5, without β):
h = log[π/π_0](chosen) − log[π/π_0](rejected), in nats. A policy is right about a pair when h > 0.
The margin of a held-out thumb is the distance of its log-ratio from the policy's reference point,
see :func:`thumb_margins`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from agentpref.errors import TrainingDiverged, UpdateError


def correctness(margins: Iterable[float]) -> tuple[float, ...]:
    """Whether each pair is right: 1 if h > 0, 0 if h < 0, and ½ (a coin) if h = 0.

    The base's margins are all 0, so it scores ½. TRL's ``rewards/accuracies`` counts a tie as
    wrong, so a policy that has learned nothing looks worse than chance there.

    Raises:
        TrainingDiverged: for a margin that is NaN or infinite.
    """
    margins = tuple(margins)
    for index, margin in enumerate(margins):
        if not math.isfinite(margin):
            raise TrainingDiverged(
                f"the margin of held-out pair {index} is {margin}: the policy's log-probabilities "
                "are not finite; lower the learning rate, or check the adapter's weights"
            )
    return tuple(0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins)


def ranking_accuracy(ratios: Sequence[float], labels: Sequence[float]) -> float:
    """Share of an example's comparisons that a policy ranks as the labels do; ties count ½.

    Two completions with different labels make a comparison, so a pair's accuracy is 0, ½ or 1. With
    no comparison at all it is ½.

    >>> ranking_accuracy([2.0, 1.0, 0.0], [1.0, 0.0, 0.5])
    0.6666666666666666
    """
    right = correctness(
        ratios[i] - ratios[j]
        for i, better in enumerate(labels)
        for j, worse in enumerate(labels)
        if better > worse
    )
    return accuracy(right) if right else 0.5


def thumb_margins(
    ratios: Sequence[float], mismatched: Sequence[float], desirable: Sequence[bool]
) -> tuple[float, ...]:
    """±(r − z) of each held-out thumb, in nats: + if the answer was liked, − if it was disliked.

    ``ratios`` are the log-ratios r = log[π/π_0] of the judged answers. z is the mean of
    ``mismatched``, the log-ratios of answers to other prompts: how far the policy has moved in
    general. A policy is right about a thumb if it has moved this answer up, or down, against z.

    z is KTO's reference point (2402.01306, section 4.1; ``kto_margin``) without its clamp at 0.
    With the clamp, a policy that lowers all log-ratios, as preference training tends to, would be
    wrong about every like. Without it, a constant added to all log-ratios changes no margin. A
    constant added to the judged answers alone still moves likes and dislikes against each other, so
    they count in equal numbers (:func:`evenly`). The base's margins are all 0.
    """
    reference = math.fsum(mismatched) / len(mismatched) if mismatched else 0.0
    return tuple(
        ratio - reference if liked else reference - ratio
        for ratio, liked in zip(ratios, desirable, strict=True)
    )


def evenly(desirable: Mapping[str, bool]) -> frozenset[str]:
    """Choose as many likes as dislikes, by id: all of the rarer kind, of the other the lowest ids.

    A policy that moves every answer the same way is right about all of one kind and wrong about all
    of the other, and so scores ½. Ids are hashes, so the choice is random and yet fixed. Thumbs of
    one kind alone prove nothing, and none is chosen. The certainty depends on the rarer kind:
    against weighing all of both, the standard error grows by about √2 at most.
    """
    likes = sorted(key for key, liked in desirable.items() if liked)
    dislikes = sorted(key for key, liked in desirable.items() if not liked)
    number = min(len(likes), len(dislikes))
    return frozenset([*likes[:number], *dislikes[:number]])


def accuracy(right: Sequence[float]) -> float:
    """Held-out preference accuracy: the mean of :func:`correctness`.

    Raises:
        UpdateError: there are no pairs.
    """
    if not right:
        raise UpdateError("the accuracy of 0 held-out pairs is not defined; log more comparisons")
    return math.fsum(right) / len(right)


@dataclass(frozen=True, slots=True)
class RMatrix:
    """Accuracies over a stream of T updates that bring one stratum each.

    ``rows[i][j]`` is the accuracy on the j-th stratum after update i. Row 0 is before any update
    (b in 1706.08840); row i + 1 is after the update that brought ``strata[i]``. There are T columns
    and T + 1 rows. Below, R[i, j] counts both from 1, as the papers do. With T = 1, the means over
    T − 1 strata are empty and taken as 0: nothing came earlier that could be forgotten.
    """

    strata: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            UpdateError: unless there are T ≥ 1 strata, T + 1 rows and T accuracies in each row.
        """
        size = len(self.strata)
        widths = [len(row) for row in self.rows]
        if size == 0 or widths != [size] * (size + 1):
            raise UpdateError(
                f"an R matrix of {size} strata has rows of widths {widths}, but needs {size + 1} "
                f"rows of {size}: one before any update and one after each"
            )

    @property
    def acc(self) -> float:
        """ACC = 1/T Σ_j R[T, j], mean accuracy at the end (1706.08840, eq. 2)."""
        return _mean(list(self.rows[-1]))

    @property
    def bwt(self) -> float:
        """BWT = 1/(T−1) Σ_{j<T} R[T, j] − R[j, j]; below 0 is forgetting (1706.08840, eq. 3)."""
        last = self.rows[-1]
        return _mean([last[j] - self.rows[j + 1][j] for j in range(len(last) - 1)])

    @property
    def fwt(self) -> float:
        """FWT = 1/(T−1) Σ_{j>1} R[j−1, j] − b_j, gain before training on j (1706.08840, eq. 4)."""
        return _mean([self.rows[j][j] - self.rows[0][j] for j in range(1, len(self.strata))])

    @property
    def forgetting(self) -> float:
        """F = 1/(T−1) Σ_{j<T} max_{1≤i<T} R[i, j] − R[T, j] (Chaudhry et al., 1801.10112, eq. 3).

        Lopez-Paz & Ranzato define no F. Row 0 does not count: it is before any update.
        """
        trained, last = self.rows[1:-1], self.rows[-1]
        return _mean([max(row[j] for row in trained) - last[j] for j in range(len(last) - 1)])

    def to_mapping(self) -> dict[str, Any]:
        """Matrix and metrics as plain values, for reports."""
        metrics = {"acc": self.acc, "bwt": self.bwt, "fwt": self.fwt, "forgetting": self.forgetting}
        return asdict(self) | metrics


def recovery(acc: float, naive: float, joint: float) -> float | None:
    """(ACC − ACC_naive) / (ACC_joint − ACC_naive): the share of the forgetting gap that is closed.

    0 is no better than updating without protection, 1 as good as training on all data at once.
    ``None`` where joint training is no better than naive: there is no gap to close.
    """
    return None if joint <= naive else (acc - naive) / (joint - naive)


def distinct_n(texts: Iterable[Sequence[Hashable]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams in a set of generations (after Li et al., 1510.03055).

    ``texts`` are token or word sequences. The divisor is the number of n-grams, not of tokens as in
    the paper, so the value is in [0, 1] for answers of any length; 0.0 if no text has n tokens. It
    falls as the texts grow in number or length: compare only answers to the same prompts.
    """
    grams = list(chain.from_iterable(zip(*(t[i:] for i in range(n)), strict=False) for t in texts))
    return len(set(grams)) / len(grams) if grams else 0.0


def length_ratio(mean: float, other: float) -> float:
    """Mean length of one set of texts over that of another, in tokens or any one unit.

    A mean below 1 counts as 1, so that a set of empty answers gives a finite ratio.
    """
    return max(mean, 1.0) / max(other, 1.0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
