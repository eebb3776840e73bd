"""DPO with the conservative term for noisy labels: ``sigmoid``, the default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.learn.losses.pairwise import PairwiseLoss

if TYPE_CHECKING:
    from torch import Tensor


class Sigmoid(PairwiseLoss):
    """DPO (2305.18290) with ε from each example, or ``loss.noise`` for all (cDPO)."""

    reads = PairwiseLoss.reads | {"noise"}

    def preference(self, chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
        """See :func:`dpo_loss`."""
        return dpo_loss(chosen - rejected, beta=self.settings.beta, noise=noise)


def dpo_loss(margin: Tensor, *, beta: float, noise: Tensor | float = 0.0) -> Tensor:
    """(1 − ε)·ℓ(βh) + ε·ℓ(−βh) with ℓ(z) = −log σ(z), one number per pair.

    DPO (2305.18290, equation 7) with the conservative term for labels that are flipped with
    probability ``noise`` = ε (cDPO). At ε = ½ no label is believed; at h = 0 the loss is log 2.
    """
    from torch.nn.functional import logsigmoid

    z = beta * margin
    return -(1 - noise) * logsigmoid(z) - noise * logsigmoid(-z)
