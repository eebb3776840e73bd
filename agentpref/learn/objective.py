"""The objective of one batch: what is added up, and in passes of what size its gradient is taken.

It is given encoded rows with their reference log-probs and a model whose policies it may switch,
and accumulates gradients in the candidate. It knows nothing of epochs, optimizers or time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.config import KLSettings, LossSettings
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


class TrainingRow(NamedTuple):
    """A pair to train on, and its log-probs under the reference π_0."""

    encoded: EncodedPair
    reference: PairLogps


class StepResult(NamedTuple):
    """What one batch came to: its mean loss, its mean margin h, and KL to live where it was taken.

    The loss is the preference loss with its anchor, a mean over rows; KL is in nats per token.
    """

    loss: float
    margin: float
    kl: float | None


class Objective:
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

    def __call__(self, rows: Sequence[TrainingRow]) -> StepResult:
        """Accumulate the gradient of the batch, and say what it came to."""
        self._kl_is_due = not self._kl_is_due and self._kl.weight > 0
        by_width = sorted(rows, key=lambda row: row.encoded.width)
        loss, margin, kl, start = 0.0, 0.0, 0.0, 0
        for run in chunks([row.encoded for row in by_width], TOKENS_PER_STEP):
            part = by_width[start : start + len(run)]
            start += len(run)
            share = len(part) / len(rows)
            preference, gap, excess, moved = self._terms(part)
            objective = share * (preference + 2 * self._kl.weight * excess)
            _check_finite(objective)
            objective.backward()  # type: ignore[no-untyped-call]
            loss += share * float(preference.detach())
            margin += share * float(gap.detach())
            kl += share * float(moved.detach())
        return StepResult(loss, margin, kl if self._kl_is_due else None)

    def state(self) -> dict[str, float]:
        """What the objective remembers from batch to batch, as numbers."""
        return {"kl_is_due": float(self._kl_is_due)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state, as if the batches before it had just been seen."""
        self._kl_is_due = bool(state["kl_is_due"])

    def _terms(self, rows: Sequence[TrainingRow]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means over the rows: preference loss with its anchor, margin, KL above target, and KL."""
        batch = self._layout([row.encoded for row in rows], self._pad)
        live = self._live_logits(batch)
        logits = completion_logits(self._model, batch)
        preference, margin = self._preference(rows, sequence_logps(logits, batch))
        if live is None:
            nothing = preference.new_zeros(())
            return preference, margin, nothing, nothing
        per_token = losses.token_kl(live, logits)
        return (
            preference,
            margin,
            *losses.kl_excess(per_token, batch.real.to(logits.device), self._kl.target),
        )

    def _preference(self, rows: Sequence[TrainingRow], logps: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = logps.chunk(2)
        columns = _columns(rows, chosen.device)
        margin = losses.reward_margin(
            chosen, rejected, columns["ref_chosen"], columns["ref_rejected"]
        )
        wrong = losses.dpo_loss(margin, beta=self._loss.beta, noise=columns["noise"])
        anchor = losses.nll_anchor(chosen, columns["length"]) * self._anchor_weights(rows, chosen)
        return (columns["weight"] * wrong + anchor).mean(), margin.mean()

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


def _check_finite(objective: Tensor) -> None:
    value = float(objective.detach())
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the loss became {value}; lower learning_rate, or run 'agentpref verify' on the log"
        )
