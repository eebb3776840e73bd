"""Attention of shared rows, as calls of torch's fused kernel for CPUs.

A row is ``[prompt | c1 | … | cn]``. The prompt attends to itself, all completions to the prompt (in
one call), and each completion to itself. A completion's two blocks are computed apart and joined by
their log-sum-exps; each block's gradient is exact given the joint ones (as in ring attention,
2310.01889).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


LANES = 16
"""Multiples of this many columns suit the kernel. With 255 keys its forward pass takes 1.5 times as
long as with 256 (bfloat16, torch 2.13)."""

_LONG, _WIDE = 512, 64
"""The kernel's backward pass is faster in bfloat16 from this many keys of this width on."""


class Block(NamedTuple):
    """A rectangle of the attention matrix: its queries, its keys, and what hides keys."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None = None


class Inputs(NamedTuple):
    """Queries, keys and values of whole rows, ``[rows, heads, T, d]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def attend(self, block: Block) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a block's queries over that block alone."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._of(block), 0.0, block.causal, attn_mask=block.mask, scale=self.scale
        )
        return out, lse

    def attend_backward(
        self, block: Block, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a block's queries, keys and values, given joint outputs and log-sum-exps."""
        query, key, value = self._of(block)
        seen = grad[:, :, block.queries], out[:, :, block.queries], lse[:, :, block.queries]
        kept, groups = key.shape[1], query.shape[1] // key.shape[1]
        if groups == 1 or len(key) * kept >= torch.get_num_threads():
            return _kernel_backward(block, (query, key, value), seen, self.scale)
        # The kernel gives each thread whole key heads, so some threads would have none.
        apart = query, repeated(key, groups), repeated(value, groups)
        by_query, *others = _kernel_backward(block, apart, seen, self.scale)
        by_key, by_value = (torch.unflatten(x, 1, (kept, groups)).sum(2) for x in others)
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
    """Outputs, which lie in memory as ``[rows, T, heads, d]``, and joint log-sum-exps.

    ``mask`` is ``[rows, n, 1, P]``, and added to the scores of prompt columns. Where the inputs
    lack the prompt's queries, the outputs lack them too.
    """
    query = inputs.query
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    out, lse = out.transpose(1, 2), query.new_empty(query.shape[:-1], dtype=torch.float32)
    prompt, cross, own = _blocks(inputs, mask)
    if prompt is not None:
        out[:, :, prompt.queries], lse[:, :, prompt.queries] = inputs.attend(prompt)
    seen, seen_lse = inputs.attend(cross)
    widths = [block.keys.stop - block.keys.start for block in own]
    of_parts = zip(own, *(torch.split(x, widths, 2) for x in (seen, seen_lse)), strict=True)
    for block, seen_part, seen_part_lse in of_parts:
        own_out, own_lse = inputs.attend(block)
        lse[:, :, block.queries] = joint = torch.logaddexp(seen_part_lse, own_lse)
        share = (own_lse - joint).exp_()[..., None]
        out[:, :, block.queries] = torch.lerp(seen_part.float(), own_out.float(), share)
    return out, lse


def attend_backward(
    inputs: Inputs, mask: Tensor, grad: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Write the gradients of queries, keys and values into ``grads``, which are in float32.

    In bfloat16 the kernel's forward pass is twice as fast as in float32, but its backward pass is
    up to eight times slower, except with wide heads and many keys (torch 2.13). So the backward
    pass runs in float32, except for long prompts.
    """
    wide = Inputs(inputs.query.float(), inputs.key.float(), inputs.value.float(), inputs.scale)
    wide_grad, wide_out = grad.float(), out.float()
    prompt, cross, own = _blocks(inputs, mask.float())
    if prompt is None:
        for whole in grads[1:]:
            whole[:, :, cross.keys] = 0
    for block in (prompt, *own, cross):
        if block is None:
            continue
        if block is prompt and block.keys.stop >= _LONG and inputs.key.shape[-1] >= _WIDE:
            found = inputs.attend_backward(block, grad, out, lse)
        else:
            found = wide.attend_backward(block, wide_grad, wide_out, lse)
        places = (block.queries, block.keys, block.keys)
        for whole, place, part in zip(grads, places, found, strict=True):
            if block is cross:
                whole[:, :, place] += part
            else:
                whole[:, :, place] = part


def _blocks(inputs: Inputs, mask: Tensor) -> tuple[Block | None, Block, list[Block]]:
    """Prompt on prompt, all completions on the prompt, and each completion on itself.

    The first is ``None`` where the inputs lack the prompt's queries.
    """
    total = inputs.key.shape[2]
    skipped = total - inputs.query.shape[2]
    prompt, *completions = parts(total, mask)
    hidden = mask[:, :1]

    def queries(columns: slice) -> slice:
        return slice(columns.start - skipped, columns.stop - skipped)

    return (
        None if skipped else Block(prompt, prompt, causal=True),
        Block(
            queries(slice(prompt.stop, total)),
            prompt,
            causal=False,
            mask=hidden if bool((hidden != 0).any()) else None,
        ),
        [Block(queries(part), part, causal=True) for part in completions],
    )


def parts(total: int, mask: Tensor) -> list[slice]:
    """Columns of the prompt and of each completion in rows of ``total`` columns."""
    count, prompt = mask.shape[1], mask.shape[-1]
    width = (total - prompt) // count
    starts = [prompt + number * width for number in range(count)]
    return [slice(0, prompt), *(slice(start, start + width) for start in starts)]


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
