"""SLiC's hinge loss on log-ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.learn.losses.pairwise import PairwiseLoss

if TYPE_CHECKING:
    from torch import Tensor


class Hinge(PairwiseLoss):
    """The calibration loss of SLiC-HF (2305.10425), on log-ratios as in RSO (2309.06657)."""

    def preference(self, chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
        """See :func:`hinge_loss`."""
        return hinge_loss(chosen - rejected, beta=self.settings.beta)


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 − βh), one number per pair. A pair whose margin has reached 1/β pulls no more."""
    return (1 - beta * margin).clamp(min=0)
