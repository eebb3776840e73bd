"""What KTO needs beyond its formula: the reference point z₀, and how likes weigh against dislikes.

The paper (2402.01306) takes z₀ from the other answers of the same micro-batch, which ties what a
row comes to to its neighbours and fails at micro-batch 1. Here it is a running estimate over the
rows of earlier batches. Nothing here knows a model, a loss or how batches are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from agentpref.config import ThumbSettings

if TYPE_CHECKING:
    from torch import Tensor

DECAY = 31 / 33
"""How much an estimate is worth one row later: as steady as a mean over the paper's 32 rows."""


class Seen(NamedTuple):
    """The log-ratios, in nats, of mismatched answers in one batch: their sum and their number."""

    total: float
    rows: int


class ReferencePoint:
    """z₀ = max(0, the mean log-ratio of mismatched answers), as an exponential moving average.

    An answer to another prompt is an answer that nobody asked for, so that its log-ratio says how
    far the policy has moved in general: the estimate of KL(π_θ ‖ π_0) that KTO compares with.

    The value stands still during a batch: rows are noted as passes see them and folded in by
    ``end_batch``, all at once. So a batch has the same loss and gradient in whatever passes it is
    taken, one row at a time or all together, and its rows are not judged by their neighbours. The
    price is that z₀ is one batch old, and 0 in the first one (unless ``end_batch`` is told before
    it what the scores of the policy that training starts from have shown).

    The average forgets by the row (``DECAY``), not by the batch, so that batches with few thumbs
    count for less; it starts at zero and is divided by the weight seen so far, as Adam's moments
    are (1412.6980, section 3), so that it is a mean from the first row on.
    """

    def __init__(self) -> None:
        self._mean = 0.0
        self._weight = 0.0
        self._noted: list[Tensor] = []

    @property
    def value(self) -> float:
        """z₀ in nats, 0 or more; 0 until a batch with mismatched answers has ended."""
        return max(0.0, self._mean / self._weight) if self._weight else 0.0

    def note(self, ratios: Tensor) -> None:
        """Remember the log-ratios of one pass; they count from the next batch on."""
        self._noted.append(ratios.detach())

    def seen(self) -> Seen:
        """What was noted since the last batch ended; processes that share a batch add theirs up."""
        ratios = [value for noted in self._noted for value in noted.tolist()]
        return Seen(sum(sorted(ratios)), len(ratios))  # sorted: the same sum in any order of passes

    def end_batch(self, seen: Seen | None = None) -> None:
        """Fold what was seen into the estimate; ``seen`` is the sum over processes, if several."""
        total, rows = seen or self.seen()
        self._noted.clear()
        if rows:
            kept = DECAY**rows
            self._mean = kept * self._mean + (1 - kept) * total / rows
            self._weight = kept * self._weight + (1 - kept)

    def state(self) -> dict[str, float]:
        """All that the next batch depends on, to be taken between batches."""
        return {"mean": self._mean, "weight": self._weight}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state, bit for bit."""
        self._mean, self._weight = state["mean"], state["weight"]
        self._noted.clear()


class Lambdas(NamedTuple):
    """λ_D and λ_U: what a like and a dislike weigh."""

    desirable: float
    undesirable: float


def balance(settings: ThumbSettings, *, desirable: int, undesirable: int) -> Lambdas:
    """λ_D and λ_U, balanced to the night's counts where the settings leave them open.

    Balanced is λ_D·n_D = λ_U·n_U, the lower end of the [1, 4/3] that the paper recommends, where
    neither side outweighs the other; with both left open, the mean λ over the thumbs is 1. Where
    one side has no rows there is nothing to balance, and what is left open is 1.
    """
    likes, dislikes = settings.desirable, settings.undesirable
    if not desirable or not undesirable:
        return Lambdas(1.0 if likes is None else likes, 1.0 if dislikes is None else dislikes)
    if likes is None:
        side = (desirable + undesirable) / 2 if dislikes is None else dislikes * undesirable
        likes = side / desirable
    return Lambdas(likes, likes * desirable / undesirable if dislikes is None else dislikes)
