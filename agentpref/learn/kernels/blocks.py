"""The blocks that attention of shared rows is made of, in torch's fused kernel for CPUs.

A row is ``[prompt | first | second]``: its prompt looks at itself, both completions at the prompt,
and each back at itself. A completion's two blocks are attended to apart and joined by their
log-sum-exps; each block's gradient is exact given the joint ones (as in ring attention,
2310.01889). Knows nothing of autograd and of models.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


LANES = 16
"""Prompts and completions are best padded to a multiple of this: with 255 keys the kernel's
forward pass takes half again as long as with 256 (bfloat16, torch 2.13)."""


_LONG, _WIDE = 512, 64
"""Keys, and their width, from which on the kernel's backward pass is faster in bfloat16."""


class Block(NamedTuple):
    """A rectangle of the attention matrix: rows of queries, rows of keys, and what hides keys."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None = None


class Inputs(NamedTuple):
    """Queries, keys and values, ``[rows, heads, T, d]``, of which blocks are attended to."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def attend(self, block: Block) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a block's queries, had they seen that block alone."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._of(block), 0.0, block.causal, attn_mask=block.mask, scale=self.scale
        )
        return out, lse

    def attend_backward(
        self, block: Block, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a block's queries, keys and values, given all that its queries saw."""
        query, key, value = self._of(block)
        seen = grad[:, :, block.queries], out[:, :, block.queries], lse[:, :, block.queries]
        kept, groups = key.shape[1], query.shape[1] // key.shape[1]
        if groups == 1 or len(key) * kept >= torch.get_num_threads():
            return _kernel_backward(block, (query, key, value), seen, self.scale)
        # The kernel deals out key heads to threads, of which some would have none.
        apart = query, repeated(key, groups), repeated(value, groups)
        by_query, by_key, by_value = _kernel_backward(block, apart, seen, self.scale)
        by_key, by_value = (
            torch.unflatten(x, 1, (kept, groups)).sum(2) for x in (by_key, by_value)
        )
        return by_query, by_key, by_value

    def _of(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        keys = block.keys
        return self.query[:, :, block.queries], self.key[:, :, keys], self.value[:, :, keys]


def _kernel_backward(
    block: Block,
    heads: tuple[Tensor, Tensor, Tensor],
    seen: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's own; ``seen`` are gradients, outputs and log-sum-exps of the queries."""
    grad, out, lse = seen
    found: tuple[Tensor, Tensor, Tensor]
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *heads, out, lse, 0.0, block.causal, attn_mask=block.mask, scale=scale
    )
    return found


def attend(inputs: Inputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, which lie in memory as ``[rows, T, heads, d]``, and joint log-sum-exps."""
    query = inputs.query
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    out, lse = out.transpose(1, 2), query.new_empty(query.shape[:-1], dtype=torch.float32)
    prompt, cross, first, second = _blocks(inputs, mask)
    if prompt is not None:
        out[:, :, prompt.queries], lse[:, :, prompt.queries] = inputs.attend(prompt)
    seen, seen_lse = inputs.attend(cross)
    width = first.keys.stop - first.keys.start
    for block, part in ((first, slice(0, width)), (second, slice(width, None))):
        own, own_lse = inputs.attend(block)
        lse[:, :, block.queries] = joint = torch.logaddexp(seen_lse[:, :, part], own_lse)
        share = (own_lse - joint).exp_()[..., None]
        out[:, :, block.queries] = torch.lerp(seen[:, :, part].float(), own.float(), share)
    return out, lse


def attend_backward(
    inputs: Inputs, mask: Tensor, grad: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Write the gradients of queries, keys and values into ``grads``, which are in float32.

    In bfloat16 the kernel's forward pass is twice as fast as in float32; its backward pass is up to
    eight times slower, but for wide heads and many keys (torch 2.13). So it is in float32, whatever
    the inputs are, except on long prompts.
    """
    wide = Inputs(inputs.query.float(), inputs.key.float(), inputs.value.float(), inputs.scale)
    wide_grad, wide_out = grad.float(), out.float()
    prompt, cross, first, second = _blocks(inputs, mask.float())
    if prompt is None:
        for whole in grads[1:]:
            whole[:, :, cross.keys] = 0
    for block in (prompt, first, second, cross):
        if block is None:
            continue
        if block is prompt and _is_long(inputs, block):
            found = inputs.attend_backward(block, grad, out, lse)
        else:
            found = wide.attend_backward(block, wide_grad, wide_out, lse)
        places = (block.queries, block.keys, block.keys)
        for whole, place, part in zip(grads, places, found, strict=True):
            if block is cross:
                whole[:, :, place] += part
            else:
                whole[:, :, place] = part


def _is_long(inputs: Inputs, block: Block) -> bool:
    keys, width = block.keys.stop - block.keys.start, inputs.key.shape[-1]
    return keys >= _LONG and width >= _WIDE


def _blocks(inputs: Inputs, mask: Tensor) -> tuple[Block | None, Block, Block, Block]:
    """Prompt on prompt, completions on prompt, and each completion on itself.

    There is no first one where the prompt's queries are left out.
    """
    total = inputs.key.shape[2]
    left_out = total - inputs.query.shape[2]
    prompt, first, second = parts(total, mask.shape[-1])
    hidden = mask if bool((mask != 0).any()) else None

    def asked(start: slice, stop: slice) -> slice:
        return slice(start.start - left_out, stop.stop - left_out)

    return (
        None if left_out else Block(prompt, prompt, causal=True),
        Block(asked(first, second), prompt, causal=False, mask=hidden),
        Block(asked(first, first), first, causal=True),
        Block(asked(second, second), second, causal=True),
    )


def parts(total: int, prompt: int) -> tuple[slice, slice, slice]:
    """Columns of the prompt and of both completions in a row of ``total``."""
    width = (total - prompt) // 2
    return slice(0, prompt), slice(prompt, prompt + width), slice(prompt + width, total)


def repeated(heads: Tensor, times: int) -> Tensor:
    """Key or value heads, each repeated for the query heads that share it."""
    return heads if times == 1 else heads.repeat_interleave(times, 1)


@cache
def grouping_kernel() -> bool:
    """Whether torch's kernel lets query heads share key heads, in both passes: 2.13's does."""
    query = torch.linspace(-1, 1, 16).view(1, 2, 4, 2)
    key = torch.linspace(1, -1, 8).view(1, 1, 4, 2)
    block = Block(slice(0, 4), slice(0, 4), causal=True)
    found = []
    for shared in (key, repeated(key, 2)):
        try:
            out, lse = Inputs(query, shared, shared, 1.0).attend(block)
            seen = torch.ones_like(out), out, lse
            grads = _kernel_backward(block, (query, shared, shared), seen, 1.0)
        except RuntimeError:
            return False
        found.append([out, *(x.sum(1) for x in grads)])
    return all(map(torch.allclose, *found))
