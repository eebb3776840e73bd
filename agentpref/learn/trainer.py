"""The training loop: trains the candidate on new and replayed rows, batch by batch.

Between two steps a run can be saved, and stopped by its budget or a signal. The processes of a team
go through the same batches side by side; the main one keeps the time and the saved state. A run has
random number generators of its own, so the host's stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import orjson

from agentpref.config import UpdateConfig
from agentpref.errors import UnusableState
from agentpref.learn.checkpoint import (
    Checkpoint,
    TrainingState,
    digest_tensors,
    fingerprint,
    training_settings,
)
from agentpref.learn.objective import (
    ForwardPlan,
    Leash,
    Losses,
    Objective,
    StepResult,
    TrainingRow,
)
from agentpref.learn.process import Interrupts
from agentpref.learn.schedule import learning_rate_for, plan_batches, rate_share
from agentpref.learn.team import Team

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

Observer = Callable[[StepResult], object]
"""A callback that gets the result of every step, in order."""

_MAX_GRADIENT_NORM = 1.0
_TAIL = 10


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What training did. Losses are means over examples and KL to live is in nats per token.

    The first loss is the first batch's; the last loss and the KL are means of the last ten. The KL
    had no penalty up to ``kl_target`` from live, and up to ``kl_pull`` from the base (``None``: it
    was not measured), since live was ``kl_spent`` from the base. ``first_nll`` and ``last_nll`` are
    means over the ordinary answers of the first and the last ten batches, in nats per token, and
    ``first_lesson`` and ``last_lesson`` the same of the KL from live, told what people remarked.
    ``resumed_at`` counts the steps before an interruption, ``seconds`` covers all. Machine and
    model allowed ``route`` (why: :class:`~agentpref.learn.logps.Choice`), ``precision``,
    ``tokens_per_pass`` (of a process) and ``recomputes_layers``. ``imitation`` is the weight that
    the chosen answers' NLL had at least. ``stopped`` says what ended it.
    """

    steps: int
    epochs: int
    learning_rate: float
    first_loss: float
    last_loss: float
    kl: float
    seconds: float
    planned_steps: int
    kl_spent: float = 0.0
    kl_target: float = 0.0
    kl_pull: float | None = None
    first_nll: float | None = None
    last_nll: float | None = None
    first_lesson: float | None = None
    last_lesson: float | None = None
    route: str = ""
    route_reason: str = ""
    route_errors: dict[str, float] = field(default_factory=dict)
    precision: str = ""
    tokens_per_pass: int = 0
    recomputes_layers: bool = False
    resumed_at: int = 0
    processes: int = 1
    imitation: float = 0.0
    stopped: Literal["end", "time"] = "end"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that stop a run before its plan ends: a budget in seconds, and signals."""

    seconds: float | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    clock: Callable[[], float] = time.monotonic


def train(
    model: PeftModel,
    rows: Sequence[TrainingRow],
    *,
    plan: ForwardPlan,
    config: UpdateConfig,
    epochs: int,
    live: str | None,
    leash: Leash,
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
        plan: the route from rows to log-probs, and the size of a pass.
        config: the settings of the update.
        epochs: how often to train on all rows.
        live: the revision that serves, ``None`` for the base.
        leash: what training starts from, and how far it may go.
        progress: called with ``(done, planned)`` steps.
        observe: called with the result of each step; steps done before an interruption are not
            repeated.
        identity: what identifies the base, as far as the weights depend on it.
        checkpoint: saves the state; a saved state of the same run is resumed.
        limits: stop the run early, after one step or later. Under a budget the learning rate falls
            to zero by steps or by time, whichever is further on (1905.04753), so a run that time
            stops has cooled down as well.
        team: the processes that train together; each calls this with the same rows. Checkpoint,
            limits and observer are the main one's.

    Raises:
        TrainingDiverged: a loss is not finite; the candidate is then worthless.
        UpdateError: another process ended, or has other weights than this one.
        KeyboardInterrupt: a signal came; the state of the last whole step is saved.
    """
    import torch

    rate = config.learning_rate or learning_rate_for(model)
    batches = plan_batches(rows, size=config.batch_size, epochs=epochs, seed=config.seed)
    judged = [row.encoded.example for row in rows if not row.encoded.example.ordinary]
    losses = Losses(config, judged, live)
    team, choice = team or Team(), plan.choice
    objective = Objective(model, plan, losses, config, leash, team)
    run = _Run(model, batches, rate, objective, checkpoint, limits or Limits(), team)
    run.name = fingerprint(
        batches,
        config=training_settings(config),
        base=dict(identity or {}),
        start=digest_tensors(run.weights),
        live=live or "",
        leash=[*leash],
        rate=rate,
        route=choice.route.name,
        **({"processes": team.size} if team.size > 1 else {}),  # sums depend on it
    )
    with torch.random.fork_rng(devices=_gpus(model)):
        torch.manual_seed(config.seed)
        resumed_at = run.resume()
        run.align()
        run.walk(progress, observe)
    tail = run.history[-_TAIL:]
    kls = [step.kl for step in tail if step.kl is not None]
    nlls = [step.nll for step in run.history if step.nll is not None]
    lessons = [step.lesson for step in run.history if step.lesson is not None]
    return TrainingReport(
        steps=len(run.history),
        epochs=epochs,
        learning_rate=rate,
        first_loss=run.history[0].loss,
        last_loss=sum(step.loss for step in tail) / len(tail),
        kl=sum(kls) / len(kls) if kls else 0.0,
        seconds=run.seconds(),
        planned_steps=len(batches),
        kl_spent=leash.spent,
        kl_target=leash.target,
        kl_pull=leash.base,
        first_nll=_mean(nlls[:_TAIL]),
        last_nll=_mean(nlls[-_TAIL:]),
        first_lesson=_mean(lessons[:_TAIL]),
        last_lesson=_mean(lessons[-_TAIL:]),
        route=choice.route.name,
        route_reason=choice.reason,
        route_errors=choice.errors,
        precision=plan.precision,
        tokens_per_pass=plan.room.tokens,
        recomputes_layers=plan.room.recomputes,
        resumed_at=resumed_at,
        processes=team.size,
        stopped="end" if len(run.history) == len(batches) else "time",
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class _Run:
    """The state of one run, which changes from step to step."""

    def __init__(
        self,
        model: PeftModel,
        batches: Sequence[Sequence[TrainingRow]],
        rate: float,
        objective: Objective,
        checkpoint: Checkpoint | None,
        limits: Limits,
        team: Team,
    ) -> None:
        import torch

        self.model, self.batches, self.rate, self.objective = model, batches, rate, objective
        self.checkpoint, self.limits, self.team = checkpoint, limits, team
        self.name = ""
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW([*self.weights.values()], lr=rate, weight_decay=0.0)
        self.history: list[StepResult] = []
        self._start, self._seconds_before, self._started = 0, 0.0, limits.clock()
        self._position = 0.0

    def seconds(self) -> float:
        """The time of all steps, including those before an interruption."""
        return self._seconds_before + self.limits.clock() - self._started

    def walk(self, progress: Callable[[int, int], object], observe: Observer | None) -> None:
        """Take the remaining steps, as far as the limits allow, and save the state."""
        planned = len(self.batches)
        if self._start:
            progress(self._start, planned)
        with self.limits.interrupts.deferred():
            while self._continues():
                self._step(self.batches[len(self.history)])
                if self.checkpoint is not None and self.checkpoint.due():
                    self.checkpoint.save(self.state())
                if observe is not None:
                    observe(self.history[-1])
                progress(len(self.history), planned)
            if self.team.size > 1:
                self.team.conclude(digest_tensors(self.weights))
            if self.checkpoint is not None:
                self.checkpoint.save(self.state())

    def resume(self) -> int:
        """Restore the interrupted run of this name; return the number of steps that it had done."""
        state = self.checkpoint.load(self.name) if self.checkpoint is not None else None
        if self.checkpoint is None or state is None:
            return 0
        try:
            self._restore(state)
        except UnusableState as error:
            self.checkpoint.discard(str(error))
            return 0
        return state.step

    def align(self) -> None:
        """Give all processes the main one's weights, moments and history; keep own generators."""
        if self.team.size == 1:
            return
        from safetensors.torch import load, save

        own, generators = self.state(), _generator_states(self.model)
        place = orjson.dumps([own.seconds, own.objective, [list(step) for step in own.history]])
        seconds, objective, history = orjson.loads(self.team.broadcast(place))
        shared = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in own.tensors.items()
            if name not in generators
        }
        tensors = load(self.team.broadcast(save(shared)))
        if not self.team.main:
            self._restore(
                replace(
                    own,
                    step=len(history),
                    seconds=seconds,
                    objective=objective,
                    history=[StepResult(*step) for step in history],
                    tensors=tensors | generators,
                )
            )

    def state(self) -> TrainingState:
        """All of the run between two steps. Training does not use Python's own generator."""
        tensors: dict[str, Tensor] = {f"weight.{n}": p for n, p in self.weights.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adamw.{index}.{key}": value for key, value in moments.items()}
        return TrainingState(
            fingerprint=self.name,
            step=len(self.history),
            planned=len(self.batches),
            seconds=self.seconds(),
            objective=self.objective.state(),
            history=self.history,
            tensors=tensors | _generator_states(self.model),
        )

    def _continues(self) -> bool:
        """Whether to take another step, and at what position (in steps): the main one decides."""
        done, planned, interrupts = len(self.history), len(self.batches), self.limits.interrupts
        used, budget = 0.0, self.limits.seconds
        if budget is not None:
            used = (self.limits.clock() - self._started) / budget if budget > 0 else 1.0
        by_time = self._start + min(used, 1.0) * (planned - self._start)
        over, self._position, signum = self.team.agree(
            [
                done == planned or interrupts.asked or (done > 0 and used >= 1),
                max(done, min(by_time, planned - 1)),
                interrupts.signum or 0,
            ]
        )
        if signum:
            interrupts.signum = int(signum)
        return not over

    def _step(self, batch: Sequence[TrainingRow]) -> None:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_share(self._position, len(self.batches))
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

        saved, generators = state.tensors, _generator_states(self.model)
        expected = {f"weight.{n}": p for n, p in self.weights.items()} | generators
        for index, parameter in enumerate(self.weights.values()):
            shapes = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
            moments = {f"adamw.{index}.{key}": like for key, like in shapes.items()}
            if moments.keys() & saved.keys():  # a parameter without a gradient has no moments
                expected |= moments
        for name in sorted(expected.keys() | saved.keys()):
            if not _alike(saved.get(name), expected.get(name)):
                raise UnusableState(f"it is damaged ({name})")
        known = self.objective.state().keys() == state.objective.keys()
        if not known or state.planned != len(self.batches):
            raise UnusableState("it is damaged (objective or plan)")
        try:
            torch.set_rng_state(saved["generator.cpu"])
            for gpu in _gpus(self.model):
                torch.cuda.set_rng_state(saved[f"generator.{gpu}"], gpu)
        except RuntimeError as error:
            raise UnusableState(f"it is damaged ({error})") from error
        optimizer: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            if name.startswith("adamw."):
                _, number, key = name.split(".")
                optimizer.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        self.objective.restore(state.objective)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(saved[f"weight.{name}"])
        self.history = list(state.history)
        self._start, self._seconds_before = state.step, state.seconds


def _alike(saved: Tensor | None, expected: Tensor | None) -> bool:
    """Whether a saved tensor is finite, and has the shape and type of the expected one."""
    if saved is None or expected is None:
        return False
    same = saved.shape == expected.shape and saved.dtype == expected.dtype
    return same and bool(saved.isfinite().all())


def _gpus(model: PeftModel) -> list[int]:
    """The number of the model's GPU; nothing on a CPU."""
    import torch

    device = model.device
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]


def _generator_states(model: PeftModel) -> dict[str, Tensor]:
    """The states of all random number generators that training uses, by name."""
    import torch

    states = {f"generator.{gpu}": torch.cuda.get_rng_state(gpu) for gpu in _gpus(model)}
    return {"generator.cpu": torch.get_rng_state(), **states}
