"""APO-zero: raises the chosen answer and lowers the rejected one, each against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.learn.losses.pairwise import PairwiseLoss

if TYPE_CHECKING:
    from torch import Tensor


class APOZero(PairwiseLoss):
    """APO-zero (2408.06266)."""

    def preference(self, chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
        """See :func:`apo_zero_loss`."""
        return apo_zero_loss(chosen, rejected, beta=self.settings.beta)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """1 − σ(β·chosen) + σ(β·rejected), one number per pair, of the two answers' log-ratios.

    APO-zero (2408.06266, equation 7): anchored at the reference, it makes the chosen answer
    likelier *and* the rejected one less likely, where DPO asks only for the gap to grow.
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()
