"""A linear layer and its low-rank adapter as one operation.

y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, with W and b frozen. Written out, the adapter is added into y, and its
gradient into x's, in place: four passes over large tensors fewer than the sum of two layers, and
x is kept once. Knows nothing of peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """``[…, in]`` to ``[…, out]``, with A = ``down`` ``[r, in]`` and B = ``up`` ``[out, r]``."""
    y: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ down.to(flat.dtype).T
        y = torch.nn.functional.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(low, up.to(flat.dtype).T, alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        low_grad = (flat @ up.to(flat.dtype)).mul_(ctx.scale)
        up_grad = (flat.T @ low).mul_(ctx.scale).to(up.dtype)
        down_grad = (low_grad.T @ x).to(down.dtype)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
            x_grad.view(-1, x_grad.shape[-1]).addmm_(low_grad, down.to(flat.dtype))
        return x_grad, None, None, down_grad, up_grad, None
