"""The common part of all losses that compare completions.

Every two completions of an example with different labels make a comparison; an example's loss is
the mean over its comparisons. For a pair that is the one comparison of chosen and rejected. An
example whose labels are all equal has no comparison, and its loss is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentpref.learn.losses import Loss, LossInputs, LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.config import UpdateConfig
    from agentpref.types import Example


class PairwiseLoss(Loss):
    """w·(preference loss) + α·(NLL anchor), where a subclass gives the preference loss."""

    reads = frozenset({"beta", "wpo", "nll", "nll_on_corrections"})

    per_token = False
    """Whether log-ratios are means over the tokens of each completion."""

    def __init__(self, config: UpdateConfig, examples: Sequence[Example], live: str) -> None:
        super().__init__(config, examples, live)
        self.settings = config.loss

    @property
    def needs_collision(self) -> bool:
        """WPO measures answers against what the policy would draw itself."""
        return self.settings.wpo

    def preference(self, chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
        """The loss of each comparison: log-ratios of both completions and ε, all ``[pairs]``."""
        raise NotImplementedError

    def noise(self, example: Example) -> float:
        """The probability ε that an example's label is flipped."""
        return example.noise if self.settings.noise is None else self.settings.noise

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss and the mean margin h of each example."""
        import torch

        examples, device = inputs.examples, inputs.policy.device
        pairs = _comparisons(examples)
        columns = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 3)
        row, better, worse = columns.unbind(1)
        ratios = inputs.ratios
        margin = ratios[row, better] - ratios[row, worse]
        scaled = ratios / inputs.lengths if self.per_token else ratios
        noise = ratios.new_tensor([self.noise(examples[r]) for r, *_ in pairs])
        loss = self.preference(scaled[row, better], scaled[row, worse], noise)
        weight = ratios.new_tensor([examples[r].weight for r, *_ in pairs])
        if self.settings.wpo:
            own = self._wpo(inputs)
            weight = weight * torch.stack([own[row, better], own[row, worse]]).prod(0)
        counts = ratios.new_zeros(len(examples)).index_add(0, row, torch.ones_like(margin))
        shares = counts.clamp(min=1)
        loss = ratios.new_zeros(len(examples)).index_add(0, row, weight * loss) / shares
        margin = ratios.new_zeros(len(examples)).index_add(0, row, margin.detach()) / shares
        return LossOutput(loss + self._anchor(inputs) * counts.clamp(max=1), margin)

    def _anchor(self, inputs: LossInputs) -> Tensor:
        """α·NLL of each example's best completion."""
        import torch

        settings = self.settings
        alphas = [
            settings.nll_on_corrections if e.origin == "correction" else settings.nll
            for e in inputs.examples
        ]
        labels = [[c.label or 0.0 for c in e.completions] for e in inputs.examples]
        best = torch.tensor([values.index(max(values)) for values in labels])
        at = torch.arange(len(labels)), best
        return inputs.policy.new_tensor(alphas) * nll_anchor(inputs.policy[at], inputs.lengths[at])

    def _wpo(self, inputs: LossInputs) -> Tensor:
        """The weight of each completion, ``[examples, n]``; 1 for those that live wrote."""
        import torch

        own = [[c.author == self.live for c in e.completions] for e in inputs.examples]
        collision = 0.0 if inputs.collision is None else inputs.collision
        weights = wpo_weight(inputs.policy, inputs.lengths, collision)
        return weights.masked_fill(torch.tensor(own, device=weights.device), 1.0)


def _comparisons(examples: Sequence[Example]) -> list[tuple[int, int, int]]:
    """Of each comparison: the numbers of its example, its better completion and its worse one."""
    labels = [[completion.label or 0.0 for completion in e.completions] for e in examples]
    return [
        (row, better, worse)
        for row, own in enumerate(labels)
        for better, high in enumerate(own)
        for worse, low in enumerate(own)
        if high > low
    ]


def nll_anchor(chosen: Tensor, lengths: Tensor) -> Tensor:
    """−log π_θ(y⁺) / |y⁺|, one number per example: keeps the chosen answers likely (2404.19733)."""
    return -chosen / lengths


def wpo_weight(logps: Tensor, lengths: Tensor, collision: Tensor | float = 0.0) -> Tensor:
    """How far each answer is the policy's own: a weight in (0, 1], detached (WPO: 2406.11827).

    exp of the mean over tokens of log π_θ(y_t), at most 1; ``logps`` are the sums and ``lengths``
    count the tokens. The paper's sampled alignment divides π_θ(y_t) by Σ_v π_θ(v)², which is what
    a token that the policy draws itself can expect, so its own answers weigh about 1:
    ``collision`` is the sum over tokens of log Σ_v π_θ(v)². Without it all answers weigh less, the
    less sure the model is.
    """
    return ((logps - collision) / lengths).exp().clamp(max=1).detach()
