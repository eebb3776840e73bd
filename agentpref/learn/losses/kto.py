"""KTO: the loss of lone thumbs, which have nothing to compare with.

The paper (2402.01306) takes its reference point z₀ from the other answers of the same micro-batch,
which ties an example's loss to its neighbours and fails at micro-batch 1. Here z₀ is a running
estimate over the examples of earlier batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agentpref.learn.losses import Loss, LossInputs, LossOutput
from agentpref.learn.losses.pairwise import nll_anchor

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.config import ThumbSettings, UpdateConfig
    from agentpref.types import Example

DECAY = 31 / 33
"""How much an estimate is worth one row later: as steady as a mean over the paper's 32 rows."""


class KTO(Loss):
    """λ·(KTO loss) of each lone example; a label above 0 is a like.

    The mismatched completions only move the reference point of later batches.

    Where corrections are trained, too, a liked answer has their NLL anchor, together at most as
    much as they have. People who correct what is wrong and like what is right would else show one
    side only: on 65 corrections ("Yes") and 72 likes ("No") the policy learned to say "Yes" to
    everything, and with the anchor to tell both apart. Thumbs alone have their other side in
    dislikes, and an anchor would hold them where they are.
    """

    lone = True
    reads = frozenset({"beta", "nll_on_corrections"})

    def __init__(self, config: UpdateConfig, examples: Sequence[Example], live: str) -> None:
        super().__init__(config, examples, live)
        liked = [is_liked(example) for example in examples if example.lone]
        likes = sum(liked)
        lambdas = balance(config.thumbs, desirable=likes, undesirable=len(liked) - likes)
        weight = config.thumbs.weight
        corrections = sum(example.origin == "correction" for example in examples)
        self._anchor = config.loss.nll_on_corrections * min(1.0, corrections / max(1, likes))
        self._weights = {True: weight * lambdas.desirable, False: weight * lambdas.undesirable}
        self._reference_point = ReferencePoint()

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss, and the distance of each log-ratio from the reference point."""
        import torch

        if inputs.mismatched is not None:
            self._reference_point.note(inputs.mismatched)
        z0, ratio = self._reference_point.value, inputs.ratios[:, 0]
        likes = [is_liked(example) for example in inputs.examples]
        liked = torch.tensor(likes, device=ratio.device)
        weights = ratio.new_tensor([self._weights[like] for like in likes])
        loss = kto_loss(ratio, liked, beta=self.config.loss.beta, reference_point=z0)
        margin = kto_margin(ratio.detach(), liked, reference_point=z0)
        nll = nll_anchor(inputs.policy[:, 0], inputs.lengths[:, 0])
        return LossOutput(weights * (loss + self._anchor * nll * liked), margin)

    def seen(self) -> tuple[float, ...]:
        """Sum and number of the mismatched log-ratios of this batch."""
        return self._reference_point.seen()

    def end_batch(self, seen: Sequence[float]) -> None:
        """Move the reference point by the mismatched log-ratios of the whole batch."""
        total, rows = seen
        self._reference_point.end_batch(Seen(total, int(rows)))

    def state(self) -> dict[str, float]:
        """The reference point."""
        return self._reference_point.state()

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a reference point."""
        self._reference_point.restore(state)


def is_liked(example: Example) -> bool:
    """Whether a lone example's completion was liked."""
    return (example.completions[0].label or 0.0) > 0


def kto_loss(
    ratio: Tensor, desirable: Tensor, *, beta: float, reference_point: Tensor | float
) -> Tensor:
    """1 − σ(±β(r − z₀)), one number per answer: + where it was liked, − where it was not.

    KTO (2402.01306, equation 7) is λ times this: λ less the value λ·σ(±β(r − z₀)), so ½·λ where
    r = z₀. ``ratio`` is r, the log-ratio of each judged answer, and ``desirable`` a mask over
    them; ``reference_point`` is z₀ in nats, a constant.
    """
    return (-beta * kto_margin(ratio, desirable, reference_point=reference_point)).sigmoid()


def kto_margin(ratio: Tensor, desirable: Tensor, *, reference_point: Tensor | float) -> Tensor:
    """±(r − z₀), one number per answer: above zero where the policy agrees with the thumb."""
    return (ratio - reference_point).where(desirable, reference_point - ratio)


class Seen(NamedTuple):
    """The log-ratios, in nats, of mismatched answers in one batch: their sum and their number."""

    total: float
    rows: int


class ReferencePoint:
    """z₀ = max(0, the mean log-ratio of mismatched answers), as an exponential moving average.

    Nobody wants an answer to another prompt, so its log-ratio says how far the policy has moved in
    general: the estimate of KL(π_θ ‖ π_0) that KTO compares with.

    The value is constant during a batch, so a batch has the same loss and gradient in whatever
    passes it is taken. The average forgets by the row (``DECAY``), so batches with few thumbs count
    for less. It is divided by the weight seen so far, as Adam's moments are (1412.6980, section 3),
    so it is a mean from the first row on.
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
        """Gather the log-ratios of one pass; they count from the next batch on."""
        self._noted.append(ratios.detach())

    def seen(self) -> Seen:
        """What was noted since the last batch ended."""
        ratios = [value for noted in self._noted for value in noted.tolist()]
        return Seen(sum(sorted(ratios)), len(ratios))  # sorted: the same sum in any order of passes

    def end_batch(self, seen: Seen) -> None:
        """Fold what all processes have seen into the estimate."""
        self._noted.clear()
        if seen.rows:
            kept = DECAY**seen.rows
            self._mean = kept * self._mean + (1 - kept) * seen.total / seen.rows
            self._weight = kept * self._weight + (1 - kept)

    def state(self) -> dict[str, float]:
        """All that the next batch depends on."""
        return {"mean": self._mean, "weight": self._weight}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a state, bit for bit."""
        self._mean, self._weight = state["mean"], state["weight"]
        self._noted.clear()


class Lambdas(NamedTuple):
    """λ_D and λ_U: what a like and a dislike weigh."""

    desirable: float
    undesirable: float


def balance(settings: ThumbSettings, *, desirable: int, undesirable: int) -> Lambdas:
    """λ_D and λ_U, balanced to the numbers of likes and dislikes where the settings leave them out.

    Balanced is λ_D·n_D = λ_U·n_U, the lower end of the [1, 4/3] that the paper recommends, where
    neither side outweighs the other; with both left out, the mean λ over the thumbs is 1. Where
    one side has no rows there is nothing to balance, and what is left out is 1.
    """
    likes, dislikes = settings.desirable, settings.undesirable
    if not desirable or not undesirable:
        return Lambdas(1.0 if likes is None else likes, 1.0 if dislikes is None else dislikes)
    if likes is None:
        side = (desirable + undesirable) / 2 if dislikes is None else dislikes * undesirable
        likes = side / desirable
    return Lambdas(likes, likes * desirable / undesirable if dislikes is None else dislikes)
