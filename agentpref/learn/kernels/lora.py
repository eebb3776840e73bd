"""A linear layer and its low-rank adapter as one operation, and several such layers as one layer.

y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, with W and b frozen. The operation adds the adapter's part into y in
place, and its gradient into x's. That is four passes over large tensors fewer than the sum of two
layers, and keeps x once. After a gate it does not keep x at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from torch import Tensor


class Layer(NamedTuple):
    """A layer and its adapter: W ``[out, in]``, b ``[out]``, A ``[r, in]``, B ``[out, r]``, s."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float


def lora_linear(x: Tensor, layer: Layer) -> Tensor:
    """Apply the layer to x: ``[…, in]`` to ``[…, out]``."""
    y: Tensor = _LoraLinear.apply(x, False, *layer)  # type: ignore[no-untyped-call]
    return y


def swiglu_linear(gated: Tensor, layer: Layer) -> Tensor:
    """Apply the layer to silu(gate)·value (2002.05202): ``[…, 2·in]`` to ``[…, out]``.

    ``gated`` holds the gates, then the values. The backward pass recomputes their product from
    what it computes anyway.
    """
    y: Tensor = _LoraLinear.apply(gated, True, *layer)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gated: bool, *layer: Any) -> Tensor:
        weight, bias, down, up, scale = Layer(*layer)
        inner = x
        if gated:
            gate, value = x.chunk(2, -1)
            inner = silu(gate).mul_(value)
        flat = inner.reshape(-1, inner.shape[-1])
        low = flat @ down.to(flat.dtype).T
        y = linear(inner, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(low, up.to(flat.dtype).T, alpha=scale)
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.gated, ctx.scale = gated, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        low_grad = (flat @ up.to(flat.dtype)).mul_(ctx.scale)
        up_grad = (flat.T @ low).mul_(ctx.scale).to(up.dtype)
        inner, x_grad = x, None
        if ctx.needs_input_grad[0] or ctx.gated:
            x_grad = grad @ weight
            x_grad.view(-1, x_grad.shape[-1]).addmm_(low_grad, down.to(grad.dtype))
        if ctx.gated:
            inner, x_grad = _gate_backward(x, x_grad)
        down_grad = (low_grad.T @ inner.reshape(-1, inner.shape[-1])).to(down.dtype)
        return x_grad, None, None, None, down_grad, up_grad, None


def _gate_backward(gated: Tensor, grad: Any) -> tuple[Tensor, Tensor]:
    """silu(gate)·value, and the gradient of ``gated``; overwrites ``grad``, the product's own."""
    gate, value = gated.chunk(2, -1)
    open_gate, back = silu(gate), torch.empty_like(gated)
    gate_back, value_back = back.chunk(2, -1)
    torch.mul(open_gate, grad, out=value_back)
    torch.ops.aten.silu_backward(grad.mul_(value), gate, grad_input=gate_back)
    return open_gate.mul_(value), back


def plain_adapter(module: Any) -> str | None:
    """The one active adapter of peft's layer, ``""`` if there is none, ``None`` if it is special.

    Special are several adapters at once, a merged one, and variants such as DoRA.
    """
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not active:
        return ""
    plain = len(active) == 1 and not module.merged and not module.lora_variant
    return active[0] if plain else None


def layer_of(module: Any, name: str) -> Layer:
    """peft's layer with the adapter of this name."""
    base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    return Layer(base.weight, base.bias, down, up, module.scaling[name])


class Stack:
    """peft's linear layers ``[…, in]`` to ``[…, out]`` as one, ``[…, in]`` to ``[…, Σ out]``.

    The frozen weights are concatenated once, and :meth:`adopt` lets the layers use that memory, so
    that nothing is held twice. The adapters are small and change with training: each pass
    concatenates A and puts B into blocks.

    Args:
        modules: peft's LoRA layers around plain linear ones, all with a bias or all without.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        bases = [module.base_layer for module in modules]
        self._weight = torch.cat([base.weight.detach() for base in bases])
        self._bias = None
        if any(base.bias is not None for base in bases):
            self._bias = torch.cat([base.bias.detach() for base in bases])

    def adopt(self) -> None:
        """Let the layers use the stack's memory in place of their own."""
        bases = [module.base_layer for module in self._modules]
        sizes = [len(base.weight) for base in bases]
        for base, weight in zip(bases, torch.split(self._weight, sizes), strict=True):
            base.weight.data = weight
        if self._bias is not None:
            for base, bias in zip(bases, torch.split(self._bias, sizes), strict=True):
                base.bias.data = bias

    def serves(self) -> bool:
        """Whether all layers have the same plain adapter active, or none."""
        names = {plain_adapter(module) for module in self._modules}
        return len(names) == 1 and None not in names

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs side by side, in the dtype of their weights; see :meth:`serves`."""
        x = x.to(self._weight.dtype)
        name = plain_adapter(self._modules[0])
        if not name:
            return linear(x, self._weight, self._bias)
        down = torch.cat([module.lora_A[name].weight for module in self._modules])
        up = torch.block_diag(  # type: ignore[no-untyped-call]
            *(module.lora_B[name].weight * module.scaling[name] for module in self._modules)
        )
        return lora_linear(x, Layer(self._weight, self._bias, down, up, 1.0))
