"""Attention over one prompt and its n completions, which computes no hidden or repeated score.

A row is ``[prompt | c1 | … | cn]``, ``P + n·C`` columns, each part padded on the right. Prompt
tokens look back at the prompt; completion tokens at the prompt and back at their own completion.
These are causal or full blocks, so no dense mask is needed. The mask, ``[rows, n, 1, P]``, tells
the attention n and P; its values hide the prompt's padding. On a CPU the blocks run in torch's
fused kernel (``blocks.py``), elsewhere in torch's scaled dot-product attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from torch import Tensor

NAME = "agentpref_shared"
"""The name under which transformers knows the attention."""

_REFUSED = ("softcap", "position_bias", "s_aux", "cache")


def register() -> None:
    """Register the attention with transformers as :data:`NAME`."""
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

    A mask of ``[rows, n, 1, P]`` marks shared rows; transformers passes 4-D masks on as they are.
    With any other mask this is torch's own attention.

    Raises:
        ValueError: the model needs an option that shared rows do not support.
    """
    if not is_shared(query.shape[2], attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    _refuse(options, query.shape[2], attention_mask)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    # Beside values from a product in bfloat16, rotated queries and keys are in float32.
    query, key, mask = (x.to(value.dtype) for x in (query, key, attention_mask))
    out = shared_attention(query, key, value, mask, scale)
    return out.transpose(1, 2), None


def is_shared(total: int, mask: Tensor | None) -> bool:
    """Whether a mask says that rows of ``total`` columns are shared ones."""
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 1 < total


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of shared rows, ``[rows, heads, P + n·C, d]`` in and out.

    Several query heads may share one key and value head. ``mask``, ``[rows, n, 1, P]``, is added to
    the scores of prompt columns: 0, or the lowest number where there is padding.
    """
    if query.device.type != "cpu" or not grouping_kernel():
        groups = query.shape[1] // key.shape[1]
        key, value = repeated(key, groups), repeated(value, groups)
    if query.device.type != "cpu":
        return composed_attention(query, key, value, mask, scale)
    out: Tensor = _SharedAttention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out


def composed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The same with torch's own attention, and a dense mask for each completion's columns."""
    prompt, *completions = parts(query.shape[2], mask)
    width = completions[0].stop - completions[0].start
    causal = torch.full((width, width), torch.finfo(query.dtype).min).triu(1)
    seen = torch.cat(
        [mask[:, :1].expand(-1, 1, width, -1), causal.to(query).expand(len(query), 1, -1, -1)], -1
    )
    asked, keys, values = (x[:, :, prompt] for x in (query, key, value))
    outs = [scaled_dot_product_attention(asked, keys, values, is_causal=True, scale=scale)]
    for part in completions:
        keys, values = (torch.cat([x[:, :, prompt], x[:, :, part]], 2) for x in (key, value))
        outs.append(
            scaled_dot_product_attention(
                query[:, :, part], keys, values, attn_mask=seen, scale=scale
            )
        )
    return torch.cat(outs, 2)


class Turn(NamedTuple):
    """Cosines and sines of each position's angles, ``[rows, T, d]``, in two equal halves."""

    cos: Tensor
    sin: Tensor

    def back(self) -> Turn:
        """The inverse turn, which is also its transpose."""
        return Turn(self.cos, -self.sin)


def rotate(x: Tensor, turn: Turn, out: Tensor | None = None) -> Tensor:
    """Rotate heads, ``[rows, T, heads, d]``, by their positions (2104.09864, equation 34).

    As in Llama, the first half of a head pairs with its second half, not neighbour with neighbour.
    This takes half the passes over memory that the definition spells out.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    sin = turn.sin[..., None, :half]
    turned = torch.mul(x, turn.cos[..., None, :], out=out)
    turned[..., :half].addcmul_(second, sin, value=-1)
    turned[..., half:].addcmul_(first, sin)
    return turned


def rotary_attention(
    projected: Tensor,
    turn: Turn,
    mask: Tensor,
    heads: tuple[int, int],
    scale: float,
    *,
    completions_only: bool = False,
) -> Tensor:
    """Attention of shared rows on a CPU, from one projection and with rotary positions.

    Args:
        projected: heads of queries, keys and values side by side, ``[rows, P + n·C, (q + 2·k)·d]``.
        turn: the angles of all positions, in the dtype of ``projected`` or wider.
        mask: ``[rows, n, 1, P]``, as for :func:`shared_attention`.
        heads: q, the number of query heads, and k, the number of key and of value heads.
        scale: the factor of the scores.
        completions_only: whether to leave out the prompt's outputs.

    Returns:
        The heads' outputs side by side, ``[rows, P + n·C or n·C, q·d]``.
    """
    skipped = mask.shape[-1] if completions_only else 0
    out: Tensor = _RotaryAttention.apply(projected, turn, mask, heads, scale, skipped)  # type: ignore[no-untyped-call]
    return out


class _SharedAttention(torch.autograd.Function):
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
        asked, places = (x[:, :, : sum(heads)] for x in (heads_apart, turned))
        if asked.dtype == turn.cos.dtype:
            rotate(asked, turn, out=places)
        else:  # in float32, and rounded once
            places.copy_(rotate(asked.to(turn.cos.dtype), turn))
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
    """Split ``[rows, T, all heads, d]`` into queries, keys and values, ``[rows, heads, T, d]``.

    The queries of the first ``skipped`` columns are left out.
    """
    query, key, value = torch.split(turned.transpose(1, 2), [heads[0], heads[1], heads[1]], 1)
    return query[:, :, skipped:], key, value


def _refuse(options: dict[str, Any], total: int, mask: Tensor) -> None:
    """Refuse options that these blocks do not support, except a window longer than all rows.

    Up to ``LANES - 1`` columns of a prompt and of a completion may be padding, so only a lower
    bound of the rows' lengths is known here.
    """
    count, prompt = mask.shape[1], mask.shape[-1]
    longest = prompt + (total - prompt) // count - 2 * (LANES - 1)
    unsupported = [name for name in _REFUSED if options.get(name) is not None]
    if options.get("dropout"):
        unsupported.append("dropout")
    window = options.get("sliding_window")
    if window is not None and window < longest:
        unsupported.append(f"a window of {window} tokens over rows of {longest} or more")
    if unsupported:
        raise ValueError(f"shared attention does not support {', '.join(unsupported)}")
