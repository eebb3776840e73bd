"""Caches of keys and values whose rows come and go.

Rows end at the same place, on the right, so that a cache is widened and narrowed on the left. This
is all of the serving side that knows how transformers lays a cache out. Caches that hold more than
plain keys and values, or forget some of them (sliding windows, linear attention), stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def is_plain(cache: Any) -> bool:
    """Whether a cache is nothing but (rows, heads, tokens, size) of keys and values per layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def width(cache: Any) -> int:
    """How many tokens a plain cache holds, padding included."""
    return int(cache.get_seq_length())


def join(cache: Any, other: Any) -> None:
    """Put the rows of another plain cache below those of the first, both ending on the right."""
    import torch

    wide = max(width(cache), width(other))
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        ours.keys = torch.cat([_widened(ours.keys, wide), _widened(theirs.keys, wide)])
        ours.values = torch.cat([_widened(ours.values, wide), _widened(theirs.values, wide)])


def keep(cache: Any, rows: Tensor, begin: int) -> None:
    """Let go of all rows but some, and of the tokens before ``begin``."""
    for layer in cache.layers:
        on_device = rows.to(layer.keys.device)
        layer.keys = layer.keys[:, :, begin:].index_select(0, on_device)
        layer.values = layer.values[:, :, begin:].index_select(0, on_device)


def _widened(states: Tensor, wide: int) -> Tensor:
    from torch.nn.functional import pad

    missing = wide - states.shape[-2]
    return pad(states, (0, 0, missing, 0)) if missing else states
