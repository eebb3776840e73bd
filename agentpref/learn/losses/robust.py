"""Robust DPO: unbiased under label noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentpref.errors import ConfigError
from agentpref.learn.losses.pairwise import PairwiseLoss

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.config import UpdateConfig
    from agentpref.types import Example


class Robust(PairwiseLoss):
    """Robust DPO (2403.00409).

    Raises:
        ConfigError: an example has a noise rate of ½ or more.
    """

    reads = PairwiseLoss.reads | {"noise"}

    def __init__(self, config: UpdateConfig, examples: Sequence[Example], live: str) -> None:
        super().__init__(config, examples, live)
        for example in examples:
            if not example.lone and self.noise(example) >= 0.5:
                raise ConfigError(
                    f"example {example.example_id} has a noise rate of {self.noise(example)}, at "
                    "which loss.kind 'robust' divides by zero: set loss.noise, below 0.5, for all "
                    "pairs, or loss.kind to 'sigmoid'"
                )

    def preference(self, chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
        """See :func:`robust_loss`."""
        return robust_loss(chosen - rejected, beta=self.settings.beta, noise=noise)


def robust_loss(margin: Tensor, *, beta: float, noise: Tensor | float) -> Tensor:
    """[(1 − ε)·ℓ(βh) − ε·ℓ(−βh)] / (1 − 2ε), one number per pair.

    Robust DPO (2403.00409): where labels are flipped with probability ``noise`` = ε,
    its expectation over the flips is the loss of the true labels. That needs ε < ½, and the nearer
    ε is to ½ the more it varies from one pair to the next. It may be negative.
    """
    from torch.nn.functional import logsigmoid

    z = beta * margin
    return (noise * logsigmoid(-z) - (1 - noise) * logsigmoid(z)) / (1 - 2 * noise)
