"""The objective of one batch: what is added up, and in passes of what size its gradient is taken.

It is given encoded rows with their reference log-probs and a model whose policies it may switch,
and accumulates gradients in the candidate. What a row's log-probs come to is the criterion's
business; the KL penalty, which is not a row's but a policy's, is added here. It knows nothing of
epochs, optimizers or time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agentpref.config import KLSettings, LossSettings, ThumbSettings
from agentpref.errors import TrainingDiverged
from agentpref.learn import adapter
from agentpref.learn.batch import Batch, chunks
from agentpref.learn.criterion import Criterion
from agentpref.learn.encode import Encoded, EncodedPair
from agentpref.learn.kto import Seen
from agentpref.learn.logps import PairLogps, Route
from agentpref.learn.loss import kl_penalty
from agentpref.learn.team import Team

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from agentpref.learn.memory import Room


class TrainingRow(NamedTuple):
    """A pair or thumb to train on, and its log-probs under the reference π_0."""

    encoded: Encoded
    reference: PairLogps


class StepResult(NamedTuple):
    """What one batch came to: its mean loss, its mean margin, and KL to live where it was taken.

    The loss is that of the rows, anchors included, and the margin h; KL is in nats per token.
    """

    loss: float
    margin: float
    kl: float | None


class Means(NamedTuple):
    """By what means log-probs come about: the route, its padding, and the room for one pass.

    ``precision`` is what the base is held in, for the report.
    """

    route: Route
    pad: int
    room: Room
    precision: str


class _Terms(NamedTuple):
    """Means over the rows of one pass: loss, margin, and KL where it is due.

    In a team it is this process's part of them, and the parts of all add up to the means.
    """

    loss: Tensor
    margin: Tensor
    kl: Tensor | None


class Objective:
    """Gradients of one batch's objective, accumulated over passes of a bounded size.

    The KL penalty needs a forward pass of the live policy too, so it is taken on every other batch
    and counts twice there.

    A team takes every pass together: its rows are dealt out, and its KL is that of all of them, so
    that a batch comes to what it would in one process whose passes are that large. What it came to
    is the same number in all processes; the gradient is each one's part, to be added up.
    """

    def __init__(
        self,
        model: PeftModel,
        means: Means,
        criterion: Criterion,
        *,
        kl: KLSettings,
        wpo: bool = False,
        team: Team | None = None,
    ) -> None:
        self._team = team or Team()
        self._model, self._route, self._pad = model, means.route, means.pad
        self._tokens = means.room.tokens
        self._criterion, self._kl, self._wpo = criterion, kl, wpo
        self._kl_is_due = False

    def __call__(self, rows: Sequence[TrainingRow]) -> StepResult:
        """Accumulate the gradient of the batch, and say what it came to."""
        self._kl_is_due = not self._kl_is_due and self._kl.weight > 0
        found = [0.0] * 4
        for part in self._passes(rows):
            share = len(part) / len(rows)
            more = self._take(part, share)
            found = [value + share * own for value, own in zip(found, more, strict=True)]
        seen = self._criterion.seen()
        objective, loss, margin, kl, total, noted = self._team.sum([*found, *seen])
        _check_finite(objective)
        self._criterion.end_batch(Seen(total, int(noted)))
        return StepResult(loss, margin, kl if self._kl_is_due else None)

    def state(self) -> dict[str, float]:
        """What is remembered from batch to batch; passes of one size, since sums depend on it."""
        own = {"kl_is_due": self._kl_is_due, "tokens": self._tokens}
        return {**{name: float(value) for name, value in own.items()}, **self._criterion.state()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state, as if the batches before it had just been seen."""
        self._kl_is_due, self._tokens = bool(state["kl_is_due"]), int(state["tokens"])
        self._criterion.restore(state)

    def _passes(self, rows: Sequence[TrainingRow]) -> Iterator[list[TrainingRow]]:
        ordered = sorted(rows, key=self._cost)
        return chunks(ordered, self._cost, self._tokens, side_by_side=self._team.size)

    def _take(self, part: Sequence[TrainingRow], share: float) -> list[float]:
        """Take this process's part of one pass's gradient; return objective, loss, margin, KL."""
        rows = self._team.deal(part)
        terms = self._terms(rows, part) if rows else None
        own = 0.0 if terms is None or terms.kl is None else float(terms.kl.detach())
        others = self._team.sum([own])[0] - own if self._kl_is_due else 0.0
        if terms is None:
            return [0.0] * 4
        objective = terms.loss + self._penalty(terms.kl, others)
        (share * objective).backward()  # type: ignore[no-untyped-call]
        return [*map(float, (objective.detach(), terms.loss.detach(), terms.margin)), own]

    def _terms(self, rows: Sequence[TrainingRow], part: Sequence[TrainingRow]) -> _Terms:
        """What ``rows`` add to the means over the pass that they are a part of."""
        batch = self._route.layout([row.encoded for row in rows], self._pad).to(self._model.device)
        live = self._live_states(batch)
        states = self._route.states(self._model, batch)
        found = self._route.read(states, batch, live=live, collision=self._wpo)
        collision = None if found.collision is None else batch.sums(found.collision)
        judged = self._criterion(rows, batch.sums(found.logps), collision)
        among = len(rows) / len(part)
        kl = None
        if found.kl is not None:
            kl = _mean_kl(rows, batch.means(found.kl)) * (_answers(rows) / _answers(part))
        return _Terms(judged.loss.mean() * among, judged.margin.mean() * among, kl)

    def _penalty(self, kl: Tensor | None, others: float) -> Tensor | float:
        """The penalty on the KL of a whole pass, of which ``others`` is other processes' part."""
        if kl is None:
            return 0.0
        return kl_penalty(kl + others, weight=2 * self._kl.weight, target=self._kl.target)

    def _live_states(self, batch: Batch) -> Tensor | None:
        if not self._kl_is_due:
            return None
        import torch

        with torch.no_grad(), adapter.policy(self._model, "live") as live:
            return self._route.states(live, batch)

    def _cost(self, row: TrainingRow) -> int:
        return self._route.cost(row.encoded)


def criterion_for(
    rows: Sequence[TrainingRow], loss: LossSettings, thumbs: ThumbSettings, live: str | None
) -> Criterion:
    """A criterion whose likes and dislikes are balanced to the rows of a run."""
    liked = [
        row.encoded.thumb.desirable for row in rows if not isinstance(row.encoded, EncodedPair)
    ]
    return Criterion(
        loss, thumbs, desirable=sum(liked), undesirable=len(liked) - sum(liked), live=live
    )


def _mean_kl(rows: Sequence[TrainingRow], kl: Tensor) -> Tensor:
    """Mean over the answers that are trained: ``kl`` is ``[2·rows]``, first completions first.

    A thumb's second completion is another prompt's answer, which nobody would give here.
    """
    second = [1.0 if isinstance(row.encoded, EncodedPair) else 0.0 for row in rows]
    trained = kl.new_tensor([[1.0] * len(rows), second]).flatten()
    return (kl * trained).sum() / trained.sum()


def _answers(rows: Sequence[TrainingRow]) -> int:
    """How many answers are trained: both of a pair, and a thumb's own."""
    return sum(2 if isinstance(row.encoded, EncodedPair) else 1 for row in rows)


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the loss became {value}; lower learning_rate, or run 'agentpref verify' on the log"
        )
