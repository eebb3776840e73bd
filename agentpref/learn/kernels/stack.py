"""Linear layers with adapters that read the same input, worked as one layer.

Their frozen weights are laid one under the other, once, and each layer goes on with its part of
that memory, so nothing is held twice. Their adapters are put together anew for every pass, A under
A and B block by block: they are small, and training moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from agentpref.learn.kernels.lora import Layer, lora_linear

if TYPE_CHECKING:
    from torch import Tensor


def plain_adapter(module: Any) -> str | None:
    """The one adapter that is active on a layer, ``""`` without any, ``None`` if it is more."""
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
        """Let the layers use the stack's memory instead of their own."""
        bases = [module.base_layer for module in self._modules]
        sizes = [len(base.weight) for base in bases]
        for base, weight in zip(bases, torch.split(self._weight, sizes), strict=True):
            base.weight.data = weight
        if self._bias is not None:
            for base, bias in zip(bases, torch.split(self._bias, sizes), strict=True):
                base.bias.data = bias

    def serves(self) -> bool:
        """Whether one adapter, or none, is active on all of the layers."""
        names = {plain_adapter(module) for module in self._modules}
        return len(names) == 1 and None not in names

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs side by side; only where :meth:`serves` says so."""
        name = plain_adapter(self._modules[0])
        if not name:
            return linear(x, self._weight, self._bias)
        down = torch.cat([module.lora_A[name].weight for module in self._modules])
        up = torch.block_diag(  # type: ignore[no-untyped-call]
            *(module.lora_B[name].weight * module.scaling[name] for module in self._modules)
        )
        return lora_linear(x, Layer(self._weight, self._bias, down, up, 1.0))
