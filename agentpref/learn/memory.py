"""Plans memory: how many tokens a pass may hold, and whether it recomputes layers.

The plan measures what one row keeps for its gradient and compares that with the free memory. If a
single row does not fit, the backward pass recomputes layers (gradient checkpointing, 1604.06174),
which is a third more work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from agentpref.models.base import language_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from agentpref.learn.team import Team

_SHARE = 0.5
"""Share of the free memory to use; the rest is for logits, gradients, the optimizer and others."""


class Room(NamedTuple):
    """The limits of a pass: its padded tokens, and whether layers are recomputed."""

    tokens: int
    recomputes: bool


def room(
    model: Any, states: Callable[[], Tensor], tokens: int, *, longest: int, free: int | None = None
) -> Room:
    """Plan passes of a model; changes the model if its layers must be recomputed.

    Args:
        model: the model.
        states: runs a forward pass of one row with gradients.
        tokens: the padded tokens of that row.
        longest: the padded tokens of the longest row to come.
        free: bytes of memory to plan with; by default what the machine has free.
    """
    available = (free_bytes(model.device.type) if free is None else free) * _SHARE
    fits = int(available / (kept_bytes(states) / tokens))
    recomputes = fits < longest
    if recomputes:
        recompute_layers(model)
        fits = int(available / (kept_bytes(states) / tokens))
    return Room(max(1, min(tokens_per_pass(model), fits)), recomputes)


def tokens_per_pass(model: Any) -> int:
    """Padded tokens beyond which passes get hardly faster; on a CPU fewer in float32."""
    if model.device.type != "cpu":
        return 16_384
    return 2048 if model.dtype.itemsize < 4 else 1024


def kept_bytes(states: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a forward pass keeps for its gradient, without the parameters."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = states()  # keep it: memory that is freed and reused would be counted twice
    del output
    return max(1, sum(kept.values()))


def free_bytes(device: str) -> int:
    """Bytes of free memory on a kind of device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def share_of_free_bytes(device: str, team: Team) -> int:
    """Free bytes for this process: all of its GPU, or its share of the machine's memory."""
    return free_bytes(device) // (team.size if device == "cpu" else 1)


def agreed(model: Any, own: Room, team: Team) -> Room:
    """The plan that fits every process of a team; changes the model if another one recomputes."""
    tokens, keeps = team.least([own.tokens, not own.recomputes])
    if not keeps and not own.recomputes:
        recompute_layers(model)
    return Room(int(tokens), recomputes=not keeps)


def recompute_layers(model: Any) -> None:
    """Let every decoder layer keep only its input, and run again in the backward pass."""
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, partial) or layer.forward.func is not _recomputed:
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No layer draws random numbers: the model is in eval mode, and adapters have no dropout.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of the language model: the longest list of modules that is in no other list.

    A tower for images may have more layers, and a layer may have more experts.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    stacks = [m for m in language_model(causal).modules() if isinstance(m, torch.nn.ModuleList)]
    inner = {module for stack in stacks for layer in stack for module in layer.modules()}
    outer = [stack for stack in stacks if stack not in inner]
    return max(outer, key=len, default=[])  # type: ignore[arg-type]
