"""Puts the handwritten operations into a model, where they give what its own modules give.

A module is replaced only after a trial on a random input, in the arithmetic of training and against
the module itself in float32. So a normalisation that adds one to its weight, a gate with another
activation, an attention with other rotary positions or an adapter with dropout keeps its own
forward. Only ``forward`` of the module object changes, so parameters, names and what peft saves
stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from agentpref.learn.kernels import attention
from agentpref.learn.kernels.blocks import grouping_kernel
from agentpref.learn.kernels.lora import Stack, layer_of, lora_linear, plain_adapter, swiglu_linear
from agentpref.learn.memory import decoder_layers
from agentpref.learn.precision import exact, mixed

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

_ROWS = 3
_PROMPT, _COMPLETIONS, _TOKENS = 5, 2, 3
"""Shape of the shared row for the trial of attention: its prompt, and tokens per completion."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_HEAD_NORMS = {"q_norm", "k_norm"}
_GATED = ("gate_proj", "up_proj")
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def fuse(model: PeftModel) -> int:
    """Replace the forward of all modules that allow it; return how many."""
    modules: list[Any] = list(model.modules())
    replace = partial(_replace, model)
    forward: Callable[..., Any]
    count = 0
    for module in filter(_is_lora_linear, modules):
        forward = partial(_lora_forward, module, module.forward)
        count += replace(module, forward, _random(module))
    for module in modules:
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"):
            count += replace(module, partial(_norm_forward, module), _random(module))
        elif isinstance(module, torch.nn.LayerNorm) and model.dtype != torch.float32:
            forward = partial(_layer_norm_forward, module, module.forward)
            count += replace(module, forward, _random(module))
        elif all(hasattr(module, name) for name in (*_GATED, "down_proj")):
            if stack := _stacked(module, _GATED):
                forward = partial(_gated_forward, module, module.forward, stack)
                count += replace(module, forward, _random(module), stack=stack)
        elif _is_plain_attention(module) and (stack := _stacked(module, _PROJECTIONS)):
            if not stack.serves():  # an adapter from elsewhere may leave some of them out
                continue
            forward = partial(_attention_forward, module, module.forward, stack)
            with torch.no_grad(), _shared_row(module, module) as (x, inputs):
                # Scores must differ, or an attention with other rotary positions passes too.
                x = x / stack(x).std()
                count += replace(module, forward, x, stack=stack, **inputs)
    return count + _fuse_last_layer(model)


def _fuse_last_layer(model: PeftModel) -> bool:
    """Let the last layer skip the prompt of a shared row, whose outputs are not used."""
    layer: Any = next(reversed(decoder_layers(model)), None)
    if layer is None or {name for name, _ in layer.named_children()} != _LAYER:
        return False
    if not _is_plain_attention(layer.self_attn):
        return False
    forward = partial(_last_layer_forward, layer, layer.forward)
    with _shared_row(layer, layer.self_attn) as (x, inputs):
        return _replace(model, layer, forward, x, skipped=_PROMPT, **inputs)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Give all modules their own forward back, for a block."""
    replaced = unfuse(model)
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward


def unfuse(model: nn.Module) -> list[tuple[Any, Callable[..., Any]]]:
    """Give all modules their own forward back; return those that had ours, with it."""
    replaced = [(m, m.forward) for m in model.modules() if _is_ours(vars(m).get("forward"))]
    for module, _ in replaced:
        del module.forward
    return replaced


def _is_ours(forward: object) -> bool:
    return isinstance(forward, partial) and forward.func.__module__ == __name__


def _replace(
    model: PeftModel,
    module: nn.Module,
    forward: Callable[..., Any],
    x: Tensor,
    *,
    skipped: int = 0,
    stack: Stack | None = None,
    **inputs: Any,
) -> bool:
    """Replace a module's forward if the new one gives what the module gives in float32.

    The first ``skipped`` columns may differ. The layers adopt the ``stack`` that replaces them.
    """
    with torch.no_grad():
        try:
            with mixed(model):
                found = forward(x, **inputs)
            with exact(model):
                expected = module.forward(x, **inputs)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return False
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    if skipped:
        found, expected = found[:, skipped:], expected[:, skipped:]
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    same = found.shape == expected.shape and bool(
        (found - expected).abs().max() <= tolerance * expected.abs().max()
    )
    if same:
        module.forward = forward
        if stack is not None:
            stack.adopt()
    return same


def _stacked(module: nn.Module, names: tuple[str, ...]) -> Stack | None:
    """Some of a module's layers as a stack, or ``None`` if they are not all alike LoRA layers."""
    layers = [getattr(module, name) for name in names]
    alike = len({layer.base_layer.bias is None for layer in layers if _is_lora_linear(layer)}) == 1
    return Stack(layers) if alike and all(map(_is_lora_linear, layers)) else None


def _is_lora_linear(module: object) -> bool:
    from peft.tuners.lora import Linear as LoraLinear

    return isinstance(module, LoraLinear) and isinstance(module.base_layer, torch.nn.Linear)


def _is_plain_attention(module: Any) -> bool:
    """Whether a module is an attention of projections and norms only, on a CPU."""
    names = {name for name, _ in module.named_children()}
    return (
        names - _HEAD_NORMS == {*_PROJECTIONS, "o_proj"}
        and getattr(module, "head_dim", 1) % 2 == 0
        and hasattr(module, "config")
        and getattr(module.config, "sliding_window", None) is None
        and module.o_proj.weight.device.type == "cpu"
        and grouping_kernel()
    )


def _random(module: nn.Module, *rows: int) -> Tensor:
    """A random input in float32, as modules get it in training."""
    frozen = next(p for name, p in module.named_parameters() if "lora_" not in name)
    wide = getattr(module, "in_features", None) or frozen.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*(rows or (_ROWS,)), wide, generator=generator)
    return x.to(frozen.device)


@contextmanager
def _shared_row(module: nn.Module, reader: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """A random shared row for a module, with its angles and its mask.

    Meanwhile the attention ``reader`` uses ours in its own forward, so that it can read the row.
    """
    x = _random(module, 1, _PROMPT + _COMPLETIONS * _TOKENS)
    angles = torch.linspace(0, 3, x.shape[1] * reader.head_dim // 2).view(1, x.shape[1], -1)
    both = torch.cat([angles, angles], -1)
    turn = both.cos().to(x.dtype), both.sin().to(x.dtype)
    mask = x.new_zeros(1, _COMPLETIONS, 1, _PROMPT)
    attention.register()
    before = reader.config._attn_implementation
    reader.config._attn_implementation = attention.NAME
    try:
        yield x, {"position_embeddings": turn, "attention_mask": mask}
    finally:
        reader.config._attn_implementation = before


def _lora_forward(
    module: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    name = plain_adapter(module)
    if name == "":
        return module.base_layer(x)  # type: ignore[no-any-return]
    if args or kwargs or name is None:
        return plain(x, *args, **kwargs)
    layer = layer_of(module, name)
    return lora_linear(x.to(layer.weight.dtype), layer)


def _layer_norm_forward(module: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The norm in float32 of what is wider than its weights: on a CPU torch takes no such pair."""
    if x.dtype == module.weight.dtype:
        return plain(x)
    weight, bias = module.weight.float(), None if module.bias is None else module.bias.float()
    return torch.nn.functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return rms_norm(x, module.weight, eps)


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


def _gated_forward(module: Any, plain: Callable[..., Tensor], stack: Stack, x: Tensor) -> Tensor:
    if not stack.serves():
        return plain(x)
    gated, last = stack(x), module.down_proj
    name = plain_adapter(last) if _is_lora_linear(last) else None
    if name:
        return swiglu_linear(gated, layer_of(last, name))
    gate, value = gated.chunk(2, -1)
    return last(torch.nn.functional.silu(gate) * value)  # type: ignore[no-any-return]


def _attention_forward(
    module: Any,
    plain: Callable[..., Any],
    stack: Stack,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *,
    completions_only: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Our attention for shared rows; the module's own for all others."""
    shared = attention.is_shared(hidden_states.shape[1], attention_mask)
    if attention_mask is None or position_embeddings is None or not shared or not stack.serves():
        kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        out, weights = plain(hidden_states, **kwargs)
        if completions_only and attention_mask is not None:
            out = out[:, attention_mask.shape[-1] :]
        return out, weights
    heads = [layer.out_features // module.head_dim for layer in (module.q_proj, module.k_proj)]
    out = attention.rotary_attention(
        _with_heads_normed(module, stack(hidden_states), heads),
        attention.Turn(*position_embeddings),
        attention_mask,
        (heads[0], heads[1]),
        module.scaling,
        completions_only=completions_only,
    )
    return module.o_proj(out), None


def _with_heads_normed(module: Any, projected: Tensor, heads: list[int]) -> Tensor:
    """Apply the norms of query and key heads, if the module has them (as Qwen3's)."""
    if not hasattr(module, "q_norm"):
        return projected
    sizes = [heads[0], heads[1], heads[1]]
    apart = torch.unflatten(projected, -1, (sum(sizes), -1))
    query, key, value = torch.split(apart, sizes, 2)
    return torch.cat([module.q_norm(query), module.k_norm(key), value], 2).flatten(2)


def _last_layer_forward(
    layer: Any,
    plain: Callable[..., Tensor],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The layer's own forward; of shared rows, the prompt's columns come out as zeros."""
    if attention_mask is None or not attention.is_shared(hidden_states.shape[1], attention_mask):
        return plain(hidden_states, attention_mask=attention_mask, **kwargs)
    prompt = attention_mask.shape[-1]
    seen, _ = layer.self_attn(
        layer.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        completions_only=True,
        **kwargs,
    )
    x = hidden_states[:, prompt:] + seen
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return torch.nn.functional.pad(x, (0, 0, prompt, 0))
