"""Puts the written-out operations into a model, where they give what its own modules give.

A module is replaced only after both were tried on the same random input, so a normalisation that
adds one to its weight, a gate with another activation or an adapter with dropout stays as it is.
Only the module object's ``forward`` changes: parameters, names and what peft saves do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from agentpref.learn.ops.lora import lora_linear
from agentpref.learn.ops.pointwise import rms_norm, swiglu

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

_ROWS = 3


def fuse(model: PeftModel) -> int:
    """Replace what can be; return how many modules were."""
    return sum(_replace(module, forward) for module, forward in _candidates(model))


def _candidates(model: PeftModel) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    from peft.tuners.lora import Linear as LoraLinear

    for module in model.modules():
        if isinstance(module, LoraLinear) and isinstance(module.base_layer, torch.nn.Linear):
            yield module, partial(_lora_forward, module, module.forward)
        elif type(module).__name__.endswith("RMSNorm"):
            yield module, partial(_norm_forward, module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            yield module, partial(_gated_forward, module)


def _replace(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Replace a module's forward if the new one gives the same on a random input."""
    weight = next(module.parameters())
    wide = getattr(module, "in_features", None) or weight.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, wide, generator=generator).to(weight.device, _dtype(module))
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    with torch.no_grad():
        try:
            same = torch.allclose(forward(x), module(x), rtol=tolerance, atol=1e-5)
        except (RuntimeError, TypeError, AttributeError):
            same = False
    if same:
        module.forward = forward
    return same


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its frozen weights, not of its adapters."""
    return next(p.dtype for name, p in module.named_parameters() if "lora_" not in name)


def _lora_forward(
    module: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not active:
        return module.base_layer(x)  # type: ignore[no-any-return]
    if args or kwargs or module.merged or len(active) > 1 or module.lora_variant:
        return plain(x, *args, **kwargs)
    (name,) = active
    base = module.base_layer
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return lora_linear(x, base.weight, base.bias, down, up, module.scaling[name])


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return rms_norm(x, module.weight, eps)


def _gated_forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]
