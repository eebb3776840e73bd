"""The training loop: takes the candidate's steps on new and replayed rows.

It walks a plan of batches, lets the objective take the gradient of each, and steps the optimizer.
Between two steps it may be saved, and stopped by its budget or a signal. The processes of a team
walk the plan side by side; the main one keeps the time and the saved state.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import orjson

from agentpref.config import UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn import generators
from agentpref.learn.checkpoint import Checkpoint, TrainingState, digest_tensors
from agentpref.learn.interrupts import Interrupts
from agentpref.learn.objective import ForwardPlan, Losses, Objective, StepResult, TrainingRow
from agentpref.learn.resume import fingerprint, training_settings
from agentpref.learn.team import Team

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

Observer = Callable[[StepResult], object]
"""Called with what each step came to, in order."""

_SMALL_MODEL = 50_000_000
_MAX_GRADIENT_NORM = 1.0
_WARMUP_SHARE = 0.1
_TAIL = 10
_WINDOW = 8
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What training did. Losses are means over examples and KL to live is in nats per token.

    The first loss is the first batch's; the last loss and the KL are means of the last ten.
    ``resumed_at`` counts the steps that an interrupted run had done before; ``seconds`` are those
    of all steps. ``route``, ``precision``, ``tokens_per_pass`` (of each of the ``processes``) and
    ``recomputes_layers`` are what the machine and the model allowed. ``stopped`` is ``"time"``
    where the budget ended the run before its plan did.
    """

    steps: int
    epochs: int
    learning_rate: float
    first_loss: float
    last_loss: float
    kl: float
    seconds: float
    planned_steps: int
    route: str = ""
    precision: str = ""
    tokens_per_pass: int = 0
    recomputes_layers: bool = False
    resumed_at: int = 0
    processes: int = 1
    stopped: Literal["end", "time"] = "end"


@dataclass(frozen=True, slots=True)
class Limits:
    """What may stop a run before its plan ends: a budget in seconds, and signals."""

    seconds: float | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    clock: Callable[[], float] = time.monotonic


def epochs_for(new: int) -> int:
    """How many epochs to train on so many new examples: small updates need more of them."""
    return 3 if new < 200 else 2 if new < 1000 else 1


def learning_rate_for(model: Any) -> float:
    """2e-3 for models of a few million parameters, 5e-5 for real ones."""
    return 2e-3 if model.num_parameters() < _SMALL_MODEL else 5e-5


def rate_share(position: float, steps: int) -> float:
    """Share of the learning rate at a position in the plan: up over a tenth of it, then to zero."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    return min((position + 1) / warmup, (steps - position) / max(1, steps - warmup))


def plan_batches(
    rows: Sequence[TrainingRow], *, size: int, epochs: int, seed: int
) -> list[list[TrainingRow]]:
    """The batches of every epoch; each epoch has an order of its own, fixed by the seed.

    Within a window of some batches, rows of like width are put together, which saves padding; the
    batches of a window then come in random order.
    """
    rng = random.Random(seed)
    planned: list[list[TrainingRow]] = []
    for _ in range(epochs):
        shuffled = rng.sample(list(rows), len(rows))
        for start in range(0, len(shuffled), size * _WINDOW):
            window = shuffled[start : start + size * _WINDOW]
            window.sort(key=lambda row: row.encoded.width)
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            planned.extend(rng.sample(batches, len(batches)))
    return planned


def train(
    model: PeftModel,
    rows: Sequence[TrainingRow],
    *,
    plan: ForwardPlan,
    config: UpdateConfig,
    epochs: int,
    live: str | None,
    progress: Callable[[int, int], object],
    observe: Observer | None = None,
    identity: Mapping[str, str] | None = None,
    checkpoint: Checkpoint | None = None,
    limits: Limits | None = None,
    team: Team | None = None,
) -> TrainingReport:
    """Train the candidate in place on ``rows``, in an order fixed by the seed.

    Args:
        model: base, live and candidate; only the candidate's weights change.
        rows: the rows to train on, with their reference log-probs.
        plan: how rows become batches and log-probs, and how large a pass may be.
        config: the settings of the update.
        epochs: how often to train on all rows.
        live: the revision that training starts from, ``None`` for the base.
        progress: called with ``(done, planned)`` steps.
        observe: called with what each step came to; steps done before an interruption are not
            repeated.
        identity: what identifies the base, as far as the weights depend on it.
        checkpoint: where the state is saved; a saved state of the same run is continued.
        limits: what may stop the run early. At least one step is done, whatever the budget. Under a
            budget the learning rate falls to zero by steps or by time, whichever is further on
            (1905.04753), so a run that time stops has cooled down as well.
        team: the processes that train together, each of which calls this with the same rows. The
            checkpoint, the limits and the observer are the main one's.

    Raises:
        TrainingDiverged: a loss is not finite; the candidate is then worthless.
        UpdateError: another process ended, or has other weights than this one.
        KeyboardInterrupt: a signal came; the state of the last whole step is saved.
    """
    rate = config.learning_rate or learning_rate_for(model)
    batches = plan_batches(rows, size=config.batch_size, epochs=epochs, seed=config.seed)
    losses = Losses(config, [row.encoded.example for row in rows], live)
    team = team or Team()
    objective = Objective(model, plan, losses, config, team)
    run = _Run(model, batches, rate, objective, limits, team)
    name = fingerprint(
        batches,
        config=training_settings(config),
        base=dict(identity or {}),
        start=digest_tensors(run.weights),
        live=live or "",
        rate=rate,
        route=plan.route.name,
        **({"processes": team.size} if team.size > 1 else {}),  # sums depend on it
    )
    with generators.own(model, config.seed):
        resumed_at = run.resume(checkpoint, name)
        run.align(name)
        stopped = run.walk(checkpoint, name, progress, observe)
    tail = run.history[-_TAIL:]
    kls = [step.kl for step in tail if step.kl is not None]
    return TrainingReport(
        steps=len(run.history),
        epochs=epochs,
        learning_rate=rate,
        first_loss=run.history[0].loss,
        last_loss=sum(step.loss for step in tail) / len(tail),
        kl=sum(kls) / len(kls) if kls else 0.0,
        seconds=run.seconds(),
        planned_steps=len(batches),
        route=plan.route.name,
        precision=plan.precision,
        tokens_per_pass=plan.room.tokens,
        recomputes_layers=plan.room.recomputes,
        resumed_at=resumed_at,
        processes=team.size,
        stopped=stopped,
    )


class _Run:
    """One run between its first step and its last: all that changes from step to step."""

    def __init__(
        self,
        model: PeftModel,
        batches: Sequence[Sequence[TrainingRow]],
        rate: float,
        objective: Objective,
        limits: Limits | None,
        team: Team,
    ) -> None:
        import torch

        self.model, self.batches, self.rate, self.objective = model, batches, rate, objective
        self.limits, self.team = limits or Limits(), team
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW([*self.weights.values()], lr=rate, weight_decay=0.0)
        self.history: list[StepResult] = []
        self._start, self._seconds_before, self._started = 0, 0.0, self.limits.clock()
        self._at = 0.0

    def seconds(self) -> float:
        """The time that all steps took, those before an interruption too."""
        return self._seconds_before + self.limits.clock() - self._started

    def walk(
        self,
        checkpoint: Checkpoint | None,
        name: str,
        progress: Callable[[int, int], object],
        observe: Observer | None,
    ) -> Literal["end", "time"]:
        """Take the remaining steps, as far as the limits allow, and save the state."""
        planned = len(self.batches)
        if self._start:
            progress(self._start, planned)
        with self.limits.interrupts.held():
            while self._continues():
                self._step(self.batches[len(self.history)])
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(self.state(name))
                if observe is not None:
                    observe(self.history[-1])
                progress(len(self.history), planned)
            if self.team.size > 1:
                self.team.conclude(digest_tensors(self.weights))
            if checkpoint is not None:
                checkpoint.save(self.state(name))
        return "end" if len(self.history) == planned else "time"

    def resume(self, checkpoint: Checkpoint | None, name: str) -> int:
        """Restore the interrupted run of this name; return how many steps it had done."""
        state = checkpoint.load(name) if checkpoint is not None else None
        if checkpoint is None or state is None:
            return 0
        try:
            self._restore(state)
        except UnusableState as error:
            checkpoint.discard(str(error))
            return 0
        self.history = list(state.history)
        self._start, self._seconds_before = state.step, state.seconds
        return state.step

    def align(self, name: str) -> None:
        """Give all processes the main one's weights, moments and place."""
        if self.team.size == 1:
            return
        from safetensors.torch import load, save

        own = self.state(name)
        kept = {n: _packed(t) for n, t in own.tensors.items() if not generators.is_state(n)}
        history = [list(result) for result in own.history]
        place = orjson.loads(self.team.tell(orjson.dumps([own.seconds, own.objective, history])))
        tensors = load(self.team.tell(save(kept)))
        if self.team.main:
            return
        seconds, objective, history = place
        self._restore(
            replace(own, objective=objective, tensors=tensors | generators.states(self.model))
        )
        self.history = [StepResult(*result) for result in history]
        self._start, self._seconds_before = len(history), seconds

    def state(self, name: str) -> TrainingState:
        """All of the run between two steps. Nothing draws from Python's own generator."""
        tensors: dict[str, Tensor] = {f"weight.{n}": p for n, p in self.weights.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adamw.{index}.{key}": value for key, value in moments.items()}
        return TrainingState(
            fingerprint=name,
            step=len(self.history),
            planned=len(self.batches),
            seconds=self.seconds(),
            objective=self.objective.state(),
            history=self.history,
            tensors=tensors | generators.states(self.model),
        )

    def _continues(self) -> bool:
        """Whether to take another step, and at what place: the main process decides."""
        asked = self.limits.interrupts.signum or 0
        over, self._at, signum = self.team.agree([self._is_over(), self._position(), asked])
        if signum:
            self.limits.interrupts.signum = int(signum)
        return not over

    def _is_over(self) -> bool:
        if len(self.history) == len(self.batches):
            return True
        if self.limits.interrupts.asked:
            return True
        return len(self.history) > 0 and self._used() >= 1

    def _used(self) -> float:
        """Share of this process's budget that is used up."""
        budget = self.limits.seconds
        if budget is None:
            return 0.0
        return (self.limits.clock() - self._started) / budget if budget > 0 else 1.0

    def _position(self) -> float:
        """How far on the run is, in steps of its plan: by steps done, or by time used."""
        planned = len(self.batches)
        by_time = self._start + min(self._used(), 1.0) * (planned - self._start)
        return max(len(self.history), min(by_time, planned - 1))

    def _step(self, batch: Sequence[TrainingRow]) -> None:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_share(self._at, len(self.batches))
        result = self.objective(batch)
        self.team.sum_gradients(self.weights.values())
        torch.nn.utils.clip_grad_norm_(self.weights.values(), _MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.append(result)

    def _restore(self, state: TrainingState) -> None:
        """Restore a state once all of it is checked; nothing changes where a check fails.

        Raises:
            UnusableState: a tensor or a number is missing, unknown, misshapen or not finite.
        """
        import torch

        left = dict(state.tensors)
        weights = {n: _taken(left, f"weight.{n}", p) for n, p in self.weights.items()}
        moments = dict(enumerate(_moments(left, i, p) for i, p in enumerate(self.weights.values())))
        drawn = {n: _taken(left, n, t) for n, t in generators.states(self.model).items()}
        known = self.objective.state().keys() == state.objective.keys()
        if left or not known or state.planned != len(self.batches):
            raise UnusableState("it is damaged (its parts)")
        generators.restore(self.model, drawn)
        groups = self.optimizer.state_dict()["param_groups"]
        optimizer = {i: found for i, found in moments.items() if found}
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        self.objective.restore(state.objective)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(weights[name])


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _moments(left: dict[str, Tensor], index: int, like: Tensor) -> dict[str, Tensor]:
    """One parameter's moments; none where it never had a gradient."""
    if not any(f"adamw.{index}.{key}" in left for key in _MOMENTS):
        return {}
    shapes = {"exp_avg": like, "exp_avg_sq": like, "step": like.new_zeros(()).float()}
    return {key: _taken(left, f"adamw.{index}.{key}", shapes[key]) for key in _MOMENTS}


def _taken(left: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Take a tensor out, if it is finite and has the shape and type of another."""
    found = left.pop(name, None)
    if (
        found is None
        or found.shape != like.shape
        or found.dtype != like.dtype
        or not bool(found.isfinite().all())
    ):
        raise UnusableState(f"it is damaged ({name})")
    return found
