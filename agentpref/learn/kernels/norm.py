"""Normalisation with fewer passes over memory than its definition spells out.

One operation to autograd, which keeps its input only. Knows nothing of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w·x/√(mean(x²) + ε) over the last dimension (1910.07467), in float32 within; w is frozen."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        unit: Tensor = wide * scale
        return unit.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        inner = (grad * weight).float()
        along = torch.linalg.vecdot(inner, unit)[..., None].div_(x.shape[-1])
        return inner.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), None, None
