"""IPO, on means over tokens (``ipo``) or on sums (``ipo_sum``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.learn.losses.pairwise import PairwiseLoss

if TYPE_CHECKING:
    from torch import Tensor


class IPOSum(PairwiseLoss):
    """IPO as the paper writes it (2310.12036): h is a difference of sums over tokens."""

    def preference(self, chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
        """See :func:`ipo_loss`."""
        return ipo_loss(chosen - rejected, beta=self.settings.beta)


class IPO(IPOSum):
    """IPO as its authors trained it, and as TRL does: h is a difference of means over tokens."""

    per_token = True


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """(h − 1/(2β))², one number per pair (IPO: 2310.12036, equation 17; its τ is our β).

    The margin is driven to 1/(2β) and no further, however sure the label.
    """
    return (margin - 1 / (2 * beta)) ** 2
