"""Attention over one prompt and two completions, with no work done twice or for nothing.

A row is ``[prompt | first | second]``, ``P + 2·C`` columns, each part padded on the right. Prompt
tokens look back at the prompt, completion tokens at the prompt and back at their own completion.
That is four causal or full blocks and no dense mask. On a CPU they run in torch's fused kernel
(``ops.blocks``); elsewhere, calls of torch's own attention do.
Knows nothing of models, but for the signature that transformers gives to attention functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from agentpref.learn.kernels.blocks import (
    LANES,
    Inputs,
    attend,
    attend_backward,
    grouping_kernel,
    parts,
    repeated,
)
from agentpref.learn.kernels.rotary import Turn, rotate

if TYPE_CHECKING:
    from torch import Tensor

NAME = "agentpref_shared"
"""What the attention is registered as with transformers."""

_REFUSED = ("softcap", "position_bias", "s_aux", "cache")


def register() -> None:
    """Make the attention known to transformers, under :data:`NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: ``[rows, heads, T, d]`` to ``[rows, T, heads, d]``.

    A mask of ``[rows, 1, 1, P]`` says that rows are shared ones with prompts of P columns; with any
    other, this is torch's own attention.

    Raises:
        ValueError: the model asks for something that shared rows cannot have.
    """
    if not is_shared(query.shape[2], attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    _refuse(options, query.shape[2], attention_mask.shape[-1])
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    out = shared_attention(query, key, value, attention_mask, scale)
    return out.transpose(1, 2), None


def is_shared(total: int, mask: Tensor | None) -> bool:
    """Whether a mask says that rows of ``total`` columns are shared ones."""
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 1 < total


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of shared rows, ``[rows, heads, P + 2·C, d]`` in and out.

    Several heads of queries may share one of keys and values. ``mask`` is ``[rows, 1, 1, P]``, to
    be added to the scores of prompt columns: 0, or the lowest number where there is padding.
    """
    if query.device.type != "cpu" or not grouping_kernel():
        groups = query.shape[1] // key.shape[1]
        key, value = repeated(key, groups), repeated(value, groups)
    if query.device.type != "cpu":
        return composed_attention(query, key, value, mask, scale)
    out: Tensor = _SharedAttention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out


def rotary_attention(
    projected: Tensor,
    turn: Turn,
    mask: Tensor,
    heads: tuple[int, int],
    scale: float,
    *,
    answers_only: bool = False,
) -> Tensor:
    """The same on a CPU, from one projection and before its heads are turned by their positions.

    Args:
        projected: heads of queries, keys and values side by side, ``[rows, P + 2·C, (q + 2·k)·d]``.
        turn: the angles of all positions.
        mask: as above.
        heads: how many are of queries, q, and how many of keys, k, and as many of values.
        scale: what scores are multiplied with.
        answers_only: whether the prompt's outputs are left out.

    Returns:
        The heads' outputs side by side, ``[rows, P + 2·C or 2·C, q·d]``.
    """
    skipped = mask.shape[-1] if answers_only else 0
    out: Tensor = _RotaryAttention.apply(projected, turn, mask, heads, scale, skipped)  # type: ignore[no-untyped-call]
    return out


def composed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The same by torch's own attention, with a mask for the completions."""
    prompt, first, second = parts(query.shape[2], mask.shape[-1])
    width = first.stop - first.start
    causal = torch.full((width, width), torch.finfo(query.dtype).min).triu(1)
    seen = torch.cat(
        [
            mask.expand(-1, 1, width, -1),
            causal.to(query).expand(len(query), 1, -1, -1),
        ],
        -1,
    )
    asked, keys, values = (x[:, :, prompt] for x in (query, key, value))
    outs = [scaled_dot_product_attention(asked, keys, values, is_causal=True, scale=scale)]
    for part in (first, second):
        keys, values = (torch.cat([x[:, :, prompt], x[:, :, part]], 2) for x in (key, value))
        outs.append(
            scaled_dot_product_attention(
                query[:, :, part], keys, values, attn_mask=seen, scale=scale
            )
        )
    return torch.cat(outs, 2)


class _SharedAttention(torch.autograd.Function):
    """The blocks in the CPU's kernel; their gradients, given joint outputs and log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        out, lse = attend(Inputs(query, key, value, scale), mask)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        inputs = Inputs(query, key, value, ctx.scale)
        grads = tuple(torch.empty_like(x, dtype=torch.float32) for x in inputs[:3])
        attend_backward(inputs, mask, grad, out, lse, grads)
        return (*(whole.to(grad.dtype) for whole in grads), None, None)


class _RotaryAttention(torch.autograd.Function):
    """The same from a projection that holds query, key and value heads side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        turn: Turn,
        mask: Tensor,
        heads: tuple[int, int],
        scale: float,
        skipped: int,
    ) -> Tensor:
        heads_apart = torch.unflatten(projected, -1, (sum(heads) + heads[1], -1))
        turned = torch.empty_like(heads_apart)
        rotate(heads_apart[:, :, : sum(heads)], turn, out=turned[:, :, : sum(heads)])
        turned[:, :, sum(heads) :] = heads_apart[:, :, sum(heads) :]
        out, lse = attend(Inputs(*_split(turned, heads, skipped), scale), mask)
        ctx.save_for_backward(turned, *turn, mask, out, lse)
        ctx.heads, ctx.scale, ctx.skipped = heads, scale, skipped
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        turned, cos, sin, mask, out, lse = ctx.saved_tensors
        heads, total = ctx.heads, sum(ctx.heads)
        inputs = Inputs(*_split(turned, heads, ctx.skipped), ctx.scale)
        grads = torch.empty_like(turned, dtype=torch.float32)
        grads[:, : ctx.skipped, : heads[0]] = 0
        grad_out = torch.unflatten(grad, -1, (heads[0], -1)).transpose(1, 2)
        attend_backward(inputs, mask, grad_out, out, lse, _split(grads, heads, ctx.skipped))
        back = torch.empty_like(turned)
        back[:, :, :total] = rotate(grads[:, :, :total], Turn(cos, sin).back())
        back[:, :, total:] = grads[:, :, total:]
        return back.flatten(2), None, None, None, None, None


def _split(turned: Tensor, heads: tuple[int, int], skipped: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, T, all heads, d]`` to queries, keys and values of ``[rows, heads, T, d]``.

    The queries of the first ``skipped`` columns are left out.
    """
    query, key, value = torch.split(turned.transpose(1, 2), [heads[0], heads[1], heads[1]], 1)
    return query[:, :, skipped:], key, value


def _refuse(options: dict[str, Any], total: int, prompt: int) -> None:
    """Refuse what these blocks would get wrong; a window that nothing exceeds changes nothing.

    Padding may be all but one column of the last lanes of a prompt and of a completion, so what is
    known here is how long rows are at least.
    """
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ValueError(f"shared attention has no {name}")
    window = options.get("sliding_window")
    longest = prompt + (total - prompt) // 2 - 2 * (LANES - 1)
    if window is not None and window < longest:
        raise ValueError(
            f"shared attention has no window of {window} tokens over {longest} or more"
        )
    if options.get("dropout"):
        raise ValueError("shared attention has no dropout")
