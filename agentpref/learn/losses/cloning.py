"""Cloning: the log-likelihood of logged answers, each by its weight.

It trains the decisions of logged conversations, which a method of offline reinforcement learning
has weighed (``agentpref.offline``). A weight holds the length, too: it is the same for each token,
so that a long answer and a short one at the same state are imitated in the proportion of their
weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.learn.losses import Loss, LossInputs, LossOutput

if TYPE_CHECKING:
    from torch import Tensor


class Cloning(Loss):
    """w·(−log π_θ(y)) of each decision; the margin is its log-probability."""

    lone = True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss."""
        weight = inputs.policy.new_tensor([example.weight for example in inputs.examples])
        loss: Tensor = -weight * inputs.policy[:, 0]
        return LossOutput(loss, inputs.policy[:, 0].detach())
