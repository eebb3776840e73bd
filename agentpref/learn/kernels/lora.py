"""A linear layer and its low-rank adapter as one operation.

y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, with W and b frozen. Written out, the adapter is added into y, and its
gradient into x's, in place: four passes over large tensors fewer than the sum of two layers, and
x is kept once. Behind a gate x is not kept at all. Knows nothing of peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import silu

if TYPE_CHECKING:
    from torch import Tensor


class Layer(NamedTuple):
    """A layer and its adapter: W ``[out, in]``, b ``[out]``, A ``[r, in]``, B ``[out, r]``, s."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y of x, and x·Aᵀ, ``[N, r]``, which the backward pass asks for."""
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ self.down.to(flat.dtype).T
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        y.view(-1, y.shape[-1]).addmm_(low, self.up.to(flat.dtype).T, alpha=self.scale)
        return y, low

    def low_backward(self, grad: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x·Aᵀ and of B."""
        flat = grad.reshape(-1, grad.shape[-1])
        low_grad = (flat @ self.up.to(flat.dtype)).mul_(self.scale)
        return low_grad, (flat.T @ low).mul_(self.scale).to(self.up.dtype)

    def down_backward(self, low_grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of A."""
        return (low_grad.T @ x.reshape(-1, x.shape[-1])).to(self.down.dtype)

    def x_backward(self, grad: Tensor, low_grad: Tensor) -> Tensor:
        """The gradient of x."""
        x_grad = grad @ self.weight
        x_grad.view(-1, x_grad.shape[-1]).addmm_(low_grad, self.down.to(grad.dtype))
        return x_grad


def lora_linear(x: Tensor, layer: Layer) -> Tensor:
    """What the layer makes of x: ``[…, in]`` to ``[…, out]``."""
    y: Tensor = _LoraLinear.apply(x, *layer)  # type: ignore[no-untyped-call]
    return y


def swiglu_linear(gated: Tensor, layer: Layer) -> Tensor:
    """What the layer makes of silu(gate)·value (2002.05202): ``[…, 2·in]`` to ``[…, out]``.

    ``gated`` holds gates and then values. Their product is not kept: the backward pass makes it
    anew from what it computes anyway.
    """
    y: Tensor = _SwiGLULinear.apply(gated, *layer)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *layer: Any) -> Tensor:
        y, low = Layer(*layer).forward(x)
        _keep(ctx, x, low, Layer(*layer))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, layer = _kept(ctx)
        low_grad, up_grad = layer.low_backward(grad, low)
        down_grad = layer.down_backward(low_grad, x)
        x_grad = layer.x_backward(grad, low_grad) if ctx.needs_input_grad[0] else None
        return x_grad, None, None, down_grad, up_grad, None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gated: Tensor, *layer: Any) -> Tensor:
        gate, value = gated.chunk(2, -1)
        y, low = Layer(*layer).forward(silu(gate).mul_(value))
        _keep(ctx, gated, low, Layer(*layer))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gated, low, layer = _kept(ctx)
        gate, value = gated.chunk(2, -1)
        low_grad, up_grad = layer.low_backward(grad, low)
        x_grad = layer.x_backward(grad, low_grad)
        open_gate, back = silu(gate), torch.empty_like(gated)
        gate_back, value_back = back.chunk(2, -1)
        torch.mul(open_gate, x_grad, out=value_back)
        torch.ops.aten.silu_backward(x_grad.mul_(value), gate, grad_input=gate_back)
        down_grad = layer.down_backward(low_grad, open_gate.mul_(value))
        return back, None, None, down_grad, up_grad, None


def _keep(ctx: Any, x: Tensor, low: Tensor, layer: Layer) -> None:
    ctx.save_for_backward(x, low, layer.weight, layer.down, layer.up)
    ctx.scale = layer.scale


def _kept(ctx: Any) -> tuple[Tensor, Tensor, Layer]:
    x, low, weight, down, up = ctx.saved_tensors
    return x, low, Layer(weight, None, down, up, ctx.scale)
