"""Rotary positions, in half the passes over memory that their definition spells out.

The second half of a head is turned against its first, as Llama and most others do it; models that
turn neighbours are not served here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Turn(NamedTuple):
    """Cosines and sines of each position's angles, ``[rows, T, d]``; both halves are the same."""

    cos: Tensor
    sin: Tensor

    def back(self) -> Turn:
        """The turn that undoes this one, which is also its transpose."""
        return Turn(self.cos, -self.sin)


def rotate(x: Tensor, turn: Turn, out: Tensor | None = None) -> Tensor:
    """Turn heads, ``[rows, T, heads, d]``, by their positions (2104.09864, equation 34)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    sin = turn.sin[..., None, :half]
    turned = torch.mul(x, turn.cos[..., None, :], out=out)
    turned[..., :half].addcmul_(second, sin, value=-1)
    turned[..., half:].addcmul_(first, sin)
    return turned
