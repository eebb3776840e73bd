"""The training loop: the candidate's steps on tonight's pairs and the replayed ones.

It walks a plan of batches, lets the objective take each one's gradient, and steps the optimizer;
it changes the candidate's weights in place and says what happened. It does not choose the rows,
judge the result or save anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentpref.config import UpdateConfig
from agentpref.learn.logps import Route
from agentpref.learn.objective import Objective, StepResult, TrainingRow, criterion_for
from agentpref.learn.plan import plan

if TYPE_CHECKING:
    from peft import PeftModel

Observer = Callable[[StepResult], object]
"""Told what each step came to, in order."""

_SMALL_MODEL = 50_000_000
_MAX_GRADIENT_NORM = 1.0
_WARMUP_SHARE = 0.1
_TAIL = 10


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
    route: Route,
    pad: int,
    config: UpdateConfig,
    epochs: int,
    live: str | None,
    progress: Callable[[int, int], object],
    observe: Observer | None = None,
) -> TrainingReport:
    """Train the candidate in place on ``rows``, in an order fixed by the seed.

    Raises:
        TrainingDiverged: as soon as a loss is not finite; the candidate is then worthless.
    """
    started = time.monotonic()
    rate = config.learning_rate or learning_rate_for(model)
    batches = plan(rows, size=config.batch_size, epochs=epochs, seed=config.seed)
    optimizer, schedule = _optimizer(model, rate, len(batches))
    criterion = criterion_for(rows, config.loss, config.thumbs, live)
    objective = Objective(model, route, pad, criterion, kl=config.kl, wpo=config.loss.wpo)
    history: list[StepResult] = []
    for done, batch in enumerate(batches, start=1):
        history.append(objective(batch))
        _apply(model, optimizer, schedule)
        if observe is not None:
            observe(history[-1])
        progress(done, len(batches))
    tail = history[-_TAIL:]
    kls = [step.kl for step in tail if step.kl is not None]
    return TrainingReport(
        steps=len(batches),
        epochs=epochs,
        learning_rate=rate,
        first_loss=history[0].loss,
        last_loss=sum(step.loss for step in tail) / len(tail),
        kl=sum(kls) / len(kls) if kls else 0.0,
        seconds=time.monotonic() - started,
    )


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
