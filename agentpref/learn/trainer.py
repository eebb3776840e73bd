"""The training loop: the candidate's steps on tonight's pairs and the replayed ones.

It is given encoded rows with their reference log-probs and a model whose policies it may switch;
it changes the candidate's weights in place and says what happened. It does not choose the rows,
judge the result or save anything.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.config import KLSettings, LossSettings, UpdateConfig
from agentpref.errors import TrainingDiverged
from agentpref.learn import adapter
from agentpref.learn import loss as losses
from agentpref.learn.batch import Layout, chunks
from agentpref.learn.encode import EncodedPair
from agentpref.learn.logps import PairLogps, completion_logits, sequence_logps

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

TOKENS_PER_STEP = 2048
"""Padded tokens in one forward and backward pass; larger batches are accumulated."""

_SMALL_MODEL = 50_000_000
_MAX_GRADIENT_NORM = 1.0
_WARMUP_SHARE = 0.1
_TAIL = 10
_WINDOW = 8


class TrainingRow(NamedTuple):
    """A pair to train on, and its log-probs under the reference π_0."""

    encoded: EncodedPair
    reference: PairLogps


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What training did. Losses are means over pairs and KL to live is in nats per token.

    The first loss is the first batch's, the last loss and the KL are means of the last ten.
    """

    steps: int
    epochs: int
    learning_rate: float
    first_loss: float
    last_loss: float
    kl: float
    seconds: float


def epochs_for(new: int) -> int:
    """How often a night's rows are passed over: small nights need more passes to be learned."""
    return 3 if new < 200 else 2 if new < 1000 else 1


def learning_rate_for(model: Any) -> float:
    """2e-3 for models of a few million parameters, 5e-5 for real ones."""
    return 2e-3 if model.num_parameters() < _SMALL_MODEL else 5e-5


def train(
    model: PeftModel,
    rows: Sequence[TrainingRow],
    *,
    layout: Layout,
    pad: int,
    config: UpdateConfig,
    epochs: int,
    progress: Callable[[int, int], object],
) -> TrainingReport:
    """Train the candidate in place on ``rows``, in an order fixed by the seed.

    Raises:
        TrainingDiverged: as soon as a loss is not finite; the candidate is then worthless.
    """
    started = time.monotonic()
    rate = config.learning_rate or learning_rate_for(model)
    plan = list(_plan(rows, config.batch_size, epochs, config.seed))
    optimizer, schedule = _optimizer(model, rate, len(plan))
    step = Step(model, layout, pad, config.loss, config.kl)
    history: list[tuple[float, float | None]] = []
    for done, batch in enumerate(plan, start=1):
        history.append(step(batch))
        _apply(model, optimizer, schedule)
        progress(done, len(plan))
    tail = history[-_TAIL:]
    kls = [kl for _, kl in tail if kl is not None]
    return TrainingReport(
        steps=len(plan),
        epochs=epochs,
        learning_rate=rate,
        first_loss=history[0][0],
        last_loss=sum(loss for loss, _ in tail) / len(tail),
        kl=sum(kls) / len(kls) if kls else 0.0,
        seconds=time.monotonic() - started,
    )


class Step:
    """Gradients of one batch's objective, accumulated over passes of a bounded size.

    The KL penalty needs a forward pass of the live policy too, so it is taken on every other batch
    and counts twice there.
    """

    def __init__(
        self, model: PeftModel, layout: Layout, pad: int, loss: LossSettings, kl: KLSettings
    ) -> None:
        self._model, self._layout, self._pad = model, layout, pad
        self._loss, self._kl = loss, kl
        self._kl_is_due = False

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[float, float | None]:
        """Accumulate the gradient of the batch; return its mean loss and, if taken, its KL."""
        self._kl_is_due = not self._kl_is_due and self._kl.weight > 0
        by_width = sorted(rows, key=lambda row: row.encoded.width)
        loss, kl, start = 0.0, 0.0, 0
        for run in chunks([row.encoded for row in by_width], TOKENS_PER_STEP):
            part = by_width[start : start + len(run)]
            start += len(run)
            share = len(part) / len(rows)
            preference, excess, moved = self._terms(part)
            objective = share * (preference + 2 * self._kl.weight * excess)
            _check_finite(objective)
            objective.backward()  # type: ignore[no-untyped-call]
            loss += share * float(preference.detach())
            kl += share * float(moved.detach())
        return loss, kl if self._kl_is_due else None

    def _terms(self, rows: Sequence[TrainingRow]) -> tuple[Tensor, Tensor, Tensor]:
        """Means over the rows: the preference loss with its anchor, KL above target, and KL."""
        batch = self._layout([row.encoded for row in rows], self._pad)
        live = self._live_logits(batch)
        logits = completion_logits(self._model, batch)
        preference = self._preference(rows, sequence_logps(logits, batch))
        if live is None:
            nothing = preference.new_zeros(())
            return preference, nothing, nothing
        per_token = losses.token_kl(live, logits)
        return preference, *losses.kl_excess(
            per_token, batch.real.to(logits.device), self._kl.target
        )

    def _preference(self, rows: Sequence[TrainingRow], logps: Tensor) -> Tensor:
        chosen, rejected = logps.chunk(2)
        columns = _columns(rows, chosen.device)
        margin = losses.reward_margin(
            chosen, rejected, columns["ref_chosen"], columns["ref_rejected"]
        )
        wrong = losses.dpo_loss(margin, beta=self._loss.beta, noise=columns["noise"])
        anchor = losses.nll_anchor(chosen, columns["length"]) * self._anchor_weights(rows, chosen)
        return (columns["weight"] * wrong + anchor).mean()

    def _live_logits(self, batch: Any) -> Tensor | None:
        if not self._kl_is_due:
            return None
        import torch

        with torch.no_grad(), adapter.policy(self._model, "live") as live:
            return completion_logits(live, batch)

    def _anchor_weights(self, rows: Sequence[TrainingRow], like: Tensor) -> Tensor:
        corrected = [row.encoded.pair.origin == "correction" for row in rows]
        return like.new_tensor(
            [self._loss.nll_on_corrections if c else self._loss.nll for c in corrected]
        )


def _columns(rows: Sequence[TrainingRow], device: Any) -> dict[str, Tensor]:
    import torch

    columns = {
        "ref_chosen": [row.reference.chosen for row in rows],
        "ref_rejected": [row.reference.rejected for row in rows],
        "noise": [row.encoded.pair.noise for row in rows],
        "weight": [row.encoded.pair.weight for row in rows],
        "length": [float(len(row.encoded.chosen)) for row in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def _plan(
    rows: Sequence[TrainingRow], size: int, epochs: int, seed: int
) -> Iterator[list[TrainingRow]]:
    """Batches of every epoch, each epoch in an order of its own.

    Within a window of some batches rows are put beside others of like width, so that little is
    spent on padding; the batches of a window then come in random order.
    """
    rng = random.Random(seed)
    for _ in range(epochs):
        shuffled = rng.sample(list(rows), len(rows))
        for start in range(0, len(shuffled), size * _WINDOW):
            window = shuffled[start : start + size * _WINDOW]
            window.sort(key=lambda row: row.encoded.width)
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            yield from rng.sample(batches, len(batches))


def _optimizer(model: PeftModel, rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW on the candidate, warmed up over a tenth of the steps, then falling to zero."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    warmup = max(1, round(_WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)),
    )
    return optimizer, schedule


def _apply(model: PeftModel, optimizer: Any, schedule: Any) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.requires_grad], _MAX_GRADIENT_NORM
    )
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def _check_finite(objective: Tensor) -> None:
    value = float(objective.detach())
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the loss became {value}; lower learning_rate, or run 'agentpref verify' on the log"
        )
