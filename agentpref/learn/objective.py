"""The objective of one batch: losses and KL penalty, and the passes in which its gradient is taken.

L = mean over judged examples of their loss + λ·max(0, KL(π_live ‖ π_θ) − target)
  + mean over ordinary answers of α·NLL/|y| + κ·KL(π_live ‖ π_θ)
  + mean over remarks of ω·KL(π_live told the comment ‖ π_θ)/|y|

Where live is far from the base, the batches between those also have λ·max(0, KL(π_0 ‖ π_θ) − t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.config import UpdateConfig
from agentpref.errors import TrainingDiverged
from agentpref.learn import adapter
from agentpref.learn.batch import Batch, chunks
from agentpref.learn.encode import EncodedExample
from agentpref.learn.logps import Choice, Logps
from agentpref.learn.losses import Loss, LossInputs, LossOutput, load_loss
from agentpref.learn.losses.cloning import Cloning
from agentpref.learn.losses.pairwise import nll_anchor
from agentpref.learn.team import Team
from agentpref.types import BASE, Example

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from agentpref.learn.memory import Room


class TrainingRow(NamedTuple):
    """An example to train, and the log-probs of its completions under frozen policies.

    ``reference`` is the base, π_0; ``live`` is what training starts from, where a loss needs it.
    """

    encoded: EncodedExample
    reference: Logps
    live: Logps | None = None

    def freeze(self) -> dict[str, Any]:
        """The row as JSON values without text; log-probs are in hexadecimal, to the last bit."""
        scores = [None if logps is None else [x.hex() for x in logps] for logps in self[1:]]
        return {**self.encoded.freeze(), "scores": scores}

    @classmethod
    def thaw(cls, values: Mapping[str, Any]) -> TrainingRow:
        """The row that :meth:`freeze` wrote."""
        reference, live = (
            None if scores is None else tuple(map(float.fromhex, scores))
            for scores in values["scores"]
        )
        return cls(EncodedExample.thaw(values), reference or (), live)


class StepResult(NamedTuple):
    """What one batch came to: its mean loss, its mean margin, and KL to live where it was taken.

    The loss is that of the judged examples with the anchors on their chosen answers, and the margin
    h; KL is in nats per token. ``nll`` is that of the ordinary answers, per token, and ``lesson``
    the KL of the remarks; ``None`` without any in the batch.
    """

    loss: float
    margin: float
    kl: float | None
    nll: float | None = None
    lesson: float | None = None


class Leash(NamedTuple):
    """How far a candidate may go, in nats per token.

    ``target`` is what it may go from ``start`` without a penalty, and ``base`` from the base;
    ``None`` does not measure that. ``spent`` is how far live is from the base.
    """

    start: adapter.Start
    target: float
    base: float | None = None
    spent: float = 0.0

    @classmethod
    def of(cls, config: UpdateConfig, start: adapter.Start, *, live: bool, spent: float) -> Leash:
        """The leash of a candidate that starts from a ``live`` adapter, or without one.

        An update may spend a share of what is left of the budget, so that a chain of updates nears
        the budget and never reaches it. A refit from the base has all of the budget to spend, as
        far as the base does not pull.
        """
        kl, budget = config.kl, config.gate.budget
        pull = kl.pull * budget
        if start == "base" or not live:
            return cls(start, max(kl.target, pull) if live else min(kl.target, kl.share * budget))
        target = min(kl.target, kl.share * max(_LEAST * budget, budget - spent))
        return cls(start, target, pull if spent + target > pull else None, spent)


class ForwardPlan(NamedTuple):
    """How rows become log-probs on this machine: the route, its padding, and the room for a pass.

    For the report, ``precision`` is what the base is held in, and the choice says why this route.
    """

    choice: Choice
    pad: int
    room: Room
    precision: str


_LEAST = 0.02
"""What share of the budget an update may always spend, or it could learn nothing at all."""


class _Terms(NamedTuple):
    """Means over the rows of one pass: loss, margin, and KL where it is due.

    In a team each process has a part of them, and the parts add up to the means.
    """

    loss: Tensor
    margin: Tensor
    kl: Tensor | None


class Objective:
    """Gradients of one batch's objective, accumulated over passes of a bounded size.

    The KL penalty needs a forward pass of the live policy, so it is taken on every other batch and
    counts twice there; so does that of the base, on the batches between. Ordinary answers take
    passes of their own.

    The processes of a team take every pass together: its rows are dealt out, and its KL is that of
    all of them, so a batch comes to what it would in one process with passes of that size. The
    result is the same number in all processes; each one's gradient is a part, to be added up.
    """

    def __init__(
        self,
        model: PeftModel,
        plan: ForwardPlan,
        losses: Losses,
        config: UpdateConfig,
        leash: Leash,
        team: Team | None = None,
    ) -> None:
        self._team = team or Team()
        self._model, self._route, self._pad = model, plan.choice.route, plan.pad
        self._tokens = plan.room.tokens
        self._losses, self._weight, self._leash = losses, config.kl.weight, leash
        self._anchor, self._of_remarks = config.anchor, config.comments.weight
        self._kl_is_due = False

    @property
    def _bound(self) -> tuple[adapter.Start, float] | None:
        """The policy that this batch is held to, and how far it may be from it."""
        if self._kl_is_due:
            return self._leash.start, self._leash.target
        if self._weight > 0 and self._leash.base is not None:
            return "base", self._leash.base
        return None

    def __call__(self, rows: Sequence[TrainingRow]) -> StepResult:
        """Accumulate the gradient of the batch, and return what it came to."""
        self._kl_is_due = not self._kl_is_due and self._weight > 0
        remarks = [row for row in rows if row.encoded.advised is not None]
        ordinary = [
            row for row in rows if row.encoded.example.ordinary and row.encoded.advised is None
        ]
        judged = [row for row in rows if not row.encoded.example.ordinary]
        found = [[0.0] * 4, [0.0] * 4, [0.0] * 4]
        for number, group in enumerate((judged, ordinary, remarks)):
            for part in self._passes(group):
                share = len(part) / len(group)
                more = self._take(part, share)
                found[number] = [
                    value + share * own for value, own in zip(found[number], more, strict=True)
                ]
        sums = self._team.sum([*found[0], *found[1][:2], *found[2][:2], *self._losses.seen()])
        objective, loss, margin, kl, of_ordinary, nll, of_remarks, lesson = sums[:8]
        objective += of_ordinary + of_remarks
        if not math.isfinite(objective):
            raise TrainingDiverged(
                f"the loss became {objective}; lower learning_rate, or run 'agentpref verify' on "
                "the log"
            )
        self._losses.end_batch(sums[8:])
        return StepResult(
            loss,
            margin,
            kl if self._kl_is_due else None,
            nll if ordinary else None,
            lesson if remarks else None,
        )

    def state(self) -> dict[str, float]:
        """What the next batch depends on; the size of a pass too, since sums depend on it."""
        own = {"kl_is_due": float(self._kl_is_due), "tokens": float(self._tokens)}
        return {**own, **self._losses.state()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a state."""
        self._kl_is_due, self._tokens = bool(state["kl_is_due"]), int(state["tokens"])
        self._losses.restore(state)

    def _passes(self, rows: Sequence[TrainingRow]) -> Iterator[list[TrainingRow]]:
        def cost(row: TrainingRow) -> int:
            return self._route.cost(row.encoded)

        ordered = sorted(rows, key=cost)
        return chunks(
            ordered,
            cost,
            self._tokens,
            side_by_side=self._team.size,
            n=lambda row: len(row.encoded.completions),
        )

    def _take(self, part: Sequence[TrainingRow], share: float) -> list[float]:
        """Take this process's part of one pass's gradient; return objective, loss, margin, KL."""
        rows = self._team.deal(part)
        if part[0].encoded.advised is not None:
            return self._teach(rows, part, share) if rows else [0.0] * 4
        terms = self._terms(rows, part) if rows else None
        own = 0.0 if terms is None or terms.kl is None else float(terms.kl.detach())
        bound = self._bound
        others = self._team.sum([own])[0] - own if bound is not None else 0.0
        if terms is None:
            return [0.0] * 4
        objective, weight, free = terms.loss, self._weight, 0.0 if bound is None else bound[1]
        if part[0].encoded.example.ordinary:
            objective = objective * self._anchor.weight
            if self._kl_is_due:  # nobody asked for a change, so none is free
                weight, free = self._anchor.kl, 0.0
        if terms.kl is not None:
            kl = terms.kl + others
            objective = objective + kl_penalty(kl, weight=2 * weight, target=free)
        (share * objective).backward()  # type: ignore[no-untyped-call]
        return [*map(float, (objective.detach(), terms.loss.detach(), terms.margin)), own]

    def _teach(
        self, rows: Sequence[TrainingRow], part: Sequence[TrainingRow], share: float
    ) -> list[float]:
        """As :meth:`_take`, of remarks: live is told the comment, and the candidate is not."""
        encoded, device = [row.encoded for row in rows], self._model.device
        batch = self._route.layout(encoded, self._pad).to(device)
        told = [replace(row, prompt=row.advised) for row in encoded if row.advised is not None]
        live = self._frozen_states(self._route.layout(told, self._pad).to(device), "live")
        found = self._route.read(self._route.states(self._model, batch), batch, live=live)
        assert found.kl is not None  # it was asked for
        lesson = (batch.sums(found.kl) / batch.lengths())[:, 0].mean() * (len(rows) / len(part))
        (share * self._of_remarks * lesson).backward()  # type: ignore[no-untyped-call]
        value = float(lesson.detach())
        return [self._of_remarks * value, value, 0.0, 0.0]

    def _terms(self, rows: Sequence[TrainingRow], part: Sequence[TrainingRow]) -> _Terms:
        """What ``rows`` add to the means over the pass that they are a part of."""
        batch = self._route.layout([row.encoded for row in rows], self._pad).to(self._model.device)
        bound, ordinary = self._bound, rows[0].encoded.example.ordinary
        frozen = None if bound is None else self._frozen_states(batch, bound[0])
        states = self._route.states(self._model, batch)
        collide = self._losses.needs_collision and not ordinary
        found = self._route.read(states, batch, live=frozen, collision=collide)
        logps = batch.sums(found.logps)
        if ordinary:
            nll = nll_anchor(logps, batch.lengths())[:, 0]
            output = LossOutput(nll, nll.detach() * 0)
        else:
            collision = None if found.collision is None else batch.sums(found.collision)
            output = self._losses(rows, logps, batch.lengths(), collision)
        among = len(rows) / len(part)
        kl = None
        if found.kl is not None:
            answers = [len(row.encoded.own) for row in rows]
            share = sum(answers) / sum(len(row.encoded.own) for row in part)
            kl = _mean_over_own(batch.spread(found.kl), answers) * share
        return _Terms(output.loss.mean() * among, output.margin.mean() * among, kl)

    def _frozen_states(self, batch: Batch, policy: adapter.Start) -> Tensor:
        import torch

        with torch.no_grad(), adapter.policy(self._model, policy) as frozen:
            return self._route.states(frozen, batch)


_CLONING = "cloning of decisions"  # which no package registers


class Losses:
    """The losses of a run: ``loss.kind`` compares completions, and ``thumbs.kind`` takes lone ones.

    Decisions of conversations, which an offline method has weighed, are cloned; whole conversations
    that it has paired are compared.

    Args:
        config: the settings of the update.
        examples: all that the run trains.
        live: the revision that training starts from; ``None`` is the base.
    """

    def __init__(self, config: UpdateConfig, examples: Sequence[Example], live: str | None) -> None:
        said = [example for example in examples if not example.cloned]
        kinds = dict.fromkeys((config.loss.kind, config.thumbs.kind))
        self._pairs, self._thumbs = config.loss.kind, config.thumbs.kind
        self._losses: dict[str, Loss] = {
            name: load_loss(name)(config, said, live or BASE) for name in kinds
        }
        self._losses[_CLONING] = Cloning(config, [], live or BASE)

    @property
    def needs_collision(self) -> bool:
        """Whether a loss reads log Σ_v π_θ(v)²."""
        return any(loss.needs_collision for loss in self._losses.values())

    @property
    def needs_live(self) -> bool:
        """Whether a loss reads log-probs of the live policy."""
        return any(loss.needs_live for loss in self._losses.values())

    def __call__(
        self,
        rows: Sequence[TrainingRow],
        logps: Tensor,
        lengths: Tensor,
        collision: Tensor | None = None,
    ) -> LossOutput:
        """The loss and margin of each row of one pass, ``[rows]``.

        ``logps`` and ``collision`` sum log π_θ(y_t) and log Σ_v π_θ(v)² over the tokens of each
        completion, and ``lengths`` counts these tokens, all ``[rows, n]``.
        """
        import torch

        reference = logps.new_tensor([row.reference for row in rows])
        kinds = [self._kind(row.encoded.example) for row in rows]
        loss, margin = logps.new_zeros(len(rows)), logps.new_zeros(len(rows))
        for kind in (name for name in self._losses if name in kinds):
            numbers = [number for number, own in enumerate(kinds) if own == kind]
            examples = [rows[number].encoded.example for number in numbers]
            live = None
            if self._losses[kind].needs_live:
                live = logps.new_tensor([rows[number].live for number in numbers])
            at = torch.tensor(numbers, device=logps.device)
            own = slice(None, len(examples[0].completions))
            inputs = LossInputs(
                examples,
                logps[at][:, own],
                reference[at][:, own],
                lengths[at][:, own],
                live=None if live is None else live[:, own],
                collision=None if collision is None else collision[at][:, own],
                mismatched=(logps - reference).detach()[at, -1] if examples[0].lone else None,
            )
            output = self._losses[kind](inputs)
            loss = loss.index_copy(0, at, output.loss)
            margin = margin.index_copy(0, at, output.margin)
        return LossOutput(loss, margin)

    def _kind(self, example: Example) -> str:
        """The name of the loss of an example."""
        if example.cloned:
            return _CLONING
        return self._thumbs if example.lone else self._pairs

    def seen(self) -> list[float]:
        """What the losses gathered since the last batch ended."""
        return [number for loss in self._losses.values() for number in loss.seen()]

    def end_batch(self, seen: Sequence[float]) -> None:
        """Give each loss its part of what all processes have seen."""
        numbers = list(seen)
        for loss in self._losses.values():
            size = len(loss.seen())
            loss.end_batch(numbers[:size])
            numbers = numbers[size:]

    def state(self) -> dict[str, float]:
        """The states of the losses, by name."""
        return {
            f"{name}.{key}": value
            for name, loss in self._losses.items()
            for key, value in loss.state().items()
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a state."""
        for name, loss in self._losses.items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            loss.restore(own)


def kl_penalty(kl: Tensor, *, weight: float, target: float) -> Tensor:
    """λ·max(0, KL − target), a scalar from a scalar in nats per token.

    Below the target the gradient is zero; above it, it is λ times that of the KL. A weight adapted
    to hold the target (1909.08593, section 2.2) was tried first: docs/LOG.md says what it did.
    """
    return weight * (kl - target).clamp(min=0)


def _mean_over_own(values: Tensor, own: Sequence[int]) -> Tensor:
    """Mean of ``[rows, n]`` over the first ``own`` completions of each row.

    The mismatched completion of a lone example is no answer to its prompt, and does not count.
    """
    import torch

    columns = torch.arange(values.shape[1], device=values.device)
    counted = columns < torch.tensor(own, device=values.device)[:, None]
    return (values * counted).sum() / counted.sum()
