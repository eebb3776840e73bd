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

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

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
    if not _is_shared(query, attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    _refuse(options, query.shape[2], attention_mask.shape[-1])
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    key, value = _repeated(key, groups), _repeated(value, groups)
    out = shared_attention(query, key, value, attention_mask, scale)
    return out.transpose(1, 2), None


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of shared rows, ``[rows, heads, P + 2·C, d]`` in and out.

    ``mask`` is ``[rows, 1, 1, P]``, to be added to the scores of prompt columns: 0, or the lowest
    number where there is padding.
    """
    if query.device.type != "cpu":
        return composed_attention(query, key, value, mask, scale)
    out: Tensor = _SharedAttention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out


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
    """The blocks in the CPU's kernel; their gradients, given joint outputs and log-sum-exps.

    In float32 within, whatever comes: the kernel is no faster in bfloat16 (torch 2.13), and less
    exact.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        wide = _Inputs(query.float(), key.float(), value.float(), scale)
        prompt, cross, first, second = _blocks(query.shape[2], mask.float())
        out, lse = torch.empty_like(wide.query), wide.query.new_empty(query.shape[:-1])
        out[:, :, prompt.queries], lse[:, :, prompt.queries] = wide.attend(prompt)
        seen, seen_lse = wide.attend(cross)
        width = first.keys.stop - first.keys.start
        for block, part in ((first, slice(0, width)), (second, slice(width, None))):
            own, own_lse = wide.attend(block)
            lse[:, :, block.queries] = joint = torch.logaddexp(seen_lse[:, :, part], own_lse)
            share = (own_lse - joint).exp_()[..., None]
            out[:, :, block.queries] = torch.lerp(seen[:, :, part], own, share)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = (x.float() for x in ctx.saved_tensors)
        prompt, cross, first, second = _blocks(query.shape[2], mask)
        wide = _Inputs(query, key, value, ctx.scale)
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        for block in (prompt, first, second, cross):
            found = wide.attend_backward(block, grad.float(), out, lse)
            places = (block.queries, block.keys, block.keys)
            for whole, place, part in zip(grads, places, found, strict=True):
                if block is cross:
                    whole[:, :, place] += part
                else:
                    whole[:, :, place] = part
        return (*(whole.to(grad.dtype) for whole in grads), None, None)


class _Inputs(NamedTuple):
    """Queries, keys and values in float32, of which blocks are attended to."""

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


def _is_shared(query: Tensor, mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 1 < query.shape[2]


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
