"""Attention over one prompt and two completions, with no work done twice or for nothing.

A row is ``[prompt | first | second]``, ``P + 2·C`` columns, each part padded on the right. Prompt
tokens look back at the prompt, completion tokens at the prompt and back at their own completion.
That is four causal or full blocks and no dense mask: what a completion sees in its prompt and what
it sees in itself are attended to apart and joined by their log-sum-exps, and each part's gradient
is exact given the joint ones (as in ring attention, 2310.01889).

On a CPU the blocks run in torch's fused kernel; elsewhere, two calls of torch's own attention do.
Knows nothing of models, but for the signature that transformers gives to attention functions.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from agentpref.learn.ops.rotary import Turn, rotate

if TYPE_CHECKING:
    from torch import Tensor

NAME = "agentpref_shared"
"""What the attention is registered as with transformers."""

_REFUSED = ("softcap", "position_bias", "s_aux", "cache")


class _Block(NamedTuple):
    """A rectangle of the attention matrix: rows of queries, rows of keys, and what hides keys."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None = None


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

    Several heads of queries may share one of keys and values. ``mask`` is ``[rows, 1, 1, P]``, to be added to the scores of prompt columns: 0, or the lowest
    number where there is padding.
    """
    if query.device.type != "cpu" or not grouping_kernel():
        groups = query.shape[1] // key.shape[1]
        key, value = _repeated(key, groups), _repeated(value, groups)
    if query.device.type != "cpu":
        return composed_attention(query, key, value, mask, scale)
    out: Tensor = _SharedAttention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out


def rotary_attention(
    projected: Tensor, turn: Turn, mask: Tensor, heads: tuple[int, int], scale: float
) -> Tensor:
    """The same on a CPU, from one projection and before its heads are turned by their positions.

    Args:
        projected: heads of queries, keys and values side by side, ``[rows, P + 2·C, (q + 2·k)·d]``.
        turn: the angles of all positions.
        mask: as above.
        heads: how many are of queries, q, and how many of keys, k, and as many of values.
        scale: what scores are multiplied with.

    Returns:
        The heads' outputs side by side, ``[rows, P + 2·C, q·d]``.
    """
    out: Tensor = _RotaryAttention.apply(projected, turn, mask, heads, scale)  # type: ignore[no-untyped-call]
    return out


@cache
def grouping_kernel() -> bool:
    """Whether torch's kernel lets query heads share key heads, in both passes: 2.13's does."""
    query, key = torch.linspace(-1, 1, 16).view(1, 2, 4, 2), torch.linspace(1, -1, 8).view(1, 1, 4, 2)
    block = _Block(slice(0, 4), slice(0, 4), causal=True)
    found = []
    for shared in (key, key.expand(1, 2, -1, -1)):
        inputs = _Inputs(query, shared, shared, 1.0)
        try:
            out, lse = inputs.attend(block)
            grads = inputs.attend_backward(block, torch.ones_like(out), out, lse)
        except RuntimeError:
            return False
        found.append([out, *(x.sum(1) for x in grads)])
    return all(map(torch.allclose, *found))


def composed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The same by torch's own attention, with a mask for the completions."""
    prompt, first, second = _parts(query.shape[2], mask.shape[-1])
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
        out, lse = _attend(_Inputs(query, key, value, scale), mask)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        wide = _Inputs(query.float(), key.float(), value.float(), ctx.scale)
        grads = tuple(torch.empty_like(x) for x in wide[:3])
        _attend_backward(wide, mask, grad, out, lse, grads)
        return (*(whole.to(grad.dtype) for whole in grads), None, None)


class _RotaryAttention(torch.autograd.Function):
    """The same from a projection that holds query, key and value heads side by side."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, turn: Turn, mask: Tensor, heads: tuple[int, int], scale: float
    ) -> Tensor:
        parts = projected.unflatten(-1, (sum(heads) + heads[1], -1))
        turned = torch.empty_like(parts)
        rotate(parts[:, :, : sum(heads)], turn, out=turned[:, :, : sum(heads)])
        turned[:, :, sum(heads) :] = parts[:, :, sum(heads) :]
        out, lse = _attend(_Inputs(*_split(turned, heads), scale), mask)
        ctx.save_for_backward(turned, *turn, mask, out, lse)
        ctx.heads, ctx.scale = heads, scale
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        turned, cos, sin, mask, out, lse = ctx.saved_tensors
        heads, total = ctx.heads, sum(ctx.heads)
        grads = torch.empty_like(turned, dtype=torch.float32)
        wide = _Inputs(*_split(turned.float(), heads), ctx.scale)
        grad_out = grad.unflatten(-1, (heads[0], -1)).transpose(1, 2)
        _attend_backward(wide, mask, grad_out, out, lse, _split(grads, heads))
        back = torch.empty_like(turned)
        back[:, :, :total] = rotate(grads[:, :, :total], Turn(cos, sin).back())
        back[:, :, total:] = grads[:, :, total:]
        return back.flatten(2), None, None, None, None


class _Inputs(NamedTuple):
    """Queries, keys and values, ``[rows, heads, T, d]``, of which blocks are attended to."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def attend(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a block's queries, had they seen that block alone."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._of(block), 0.0, block.causal, attn_mask=block.mask, scale=self.scale
        )
        return out, lse

    def attend_backward(
        self, block: _Block, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a block's queries, keys and values, given all that its queries saw."""
        found: tuple[Tensor, Tensor, Tensor]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, :, block.queries],
            *self._of(block),
            out[:, :, block.queries],
            lse[:, :, block.queries],
            0.0,
            block.causal,
            attn_mask=block.mask,
            scale=self.scale,
        )
        return found

    def _of(self, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
        keys = block.keys
        return self.query[:, :, block.queries], self.key[:, :, keys], self.value[:, :, keys]


def _attend(inputs: _Inputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, which lie in memory as ``[rows, T, heads, d]``, and joint log-sum-exps."""
    query = inputs.query
    prompt, cross, first, second = _blocks(query.shape[2], mask)
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    out, lse = out.transpose(1, 2), query.new_empty(query.shape[:-1], dtype=torch.float32)
    out[:, :, prompt.queries], lse[:, :, prompt.queries] = inputs.attend(prompt)
    seen, seen_lse = inputs.attend(cross)
    width = first.keys.stop - first.keys.start
    for block, part in ((first, slice(0, width)), (second, slice(width, None))):
        own, own_lse = inputs.attend(block)
        lse[:, :, block.queries] = joint = torch.logaddexp(seen_lse[:, :, part], own_lse)
        share = (own_lse - joint).exp_()[..., None]
        out[:, :, block.queries] = torch.lerp(seen[:, :, part].float(), own.float(), share)
    return out, lse


def _attend_backward(
    inputs: _Inputs, mask: Tensor, grad: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Write the gradients of queries, keys and values into ``grads``; all is in float32 here.

    In bfloat16 the kernel's backward pass is up to eight times slower than in float32 (torch 2.13,
    32 wide heads); its forward pass is twice as fast.
    """
    grad, out, mask = grad.float(), out.float(), mask.float()
    prompt, cross, first, second = _blocks(inputs.query.shape[2], mask)
    for block in (prompt, first, second, cross):
        found = inputs.attend_backward(block, grad, out, lse)
        places = (block.queries, block.keys, block.keys)
        for whole, place, part in zip(grads, places, found, strict=True):
            if block is cross:
                whole[:, :, place] += part
            else:
                whole[:, :, place] = part


def _split(turned: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, T, all heads, d]`` to queries, keys and values of ``[rows, heads, T, d]``."""
    query, key, value = turned.transpose(1, 2).split((heads[0], heads[1], heads[1]), 1)
    return query, key, value


def _blocks(total: int, mask: Tensor) -> tuple[_Block, _Block, _Block, _Block]:
    """Prompt on prompt, completions on prompt, and each completion on itself."""
    prompt, first, second = _parts(total, mask.shape[-1])
    hidden = mask if bool((mask != 0).any()) else None
    both = slice(first.start, second.stop)
    return (
        _Block(prompt, prompt, causal=True),
        _Block(both, prompt, causal=False, mask=hidden),
        _Block(first, first, causal=True),
        _Block(second, second, causal=True),
    )


def _parts(total: int, prompt: int) -> tuple[slice, slice, slice]:
    width = (total - prompt) // 2
    return slice(0, prompt), slice(prompt, prompt + width), slice(prompt + width, total)


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Key or value heads, each repeated for the query heads that share it."""
    return heads if times == 1 else heads.repeat_interleave(times, 1)


def _refuse(options: dict[str, Any], total: int, prompt: int) -> None:
    """Refuse what these blocks would get wrong; a window that nothing exceeds changes nothing."""
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ValueError(f"shared attention has no {name}")
    window = options.get("sliding_window")
    longest = prompt + (total - prompt) // 2
    if window is not None and window < longest:
        raise ValueError(f"shared attention has no window of {window} tokens over {longest}")
    if options.get("dropout"):
        raise ValueError("shared attention has no dropout")
