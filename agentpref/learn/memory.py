"""How many tokens one pass may hold, whether layers are recomputed to make them fit, and in whose
memory the weights are.

What a pass keeps for its gradient is measured on one row, not guessed from a model's shape, and
held against what the machine has free. Layers are recomputed in the backward pass (gradient
checkpointing, 1604.06174: a third more work) only where a single row would not fit without. Knows
nothing of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from agentpref.learn.team import Team

_SHARE = 0.5
"""Of the free memory; the rest is for logits, gradients, the optimizer, and everybody else."""


class Room(NamedTuple):
    """What a pass may take: padded tokens, and whether layers are recomputed."""

    tokens: int
    recomputes: bool


def room(
    model: Any, states: Callable[[], Tensor], tokens: int, *, longest: int, free: int | None = None
) -> Room:
    """Find the room for passes of a model whose longest row has ``longest`` tokens.

    Args:
        model: the model; its layers are changed where they must be recomputed.
        states: a forward pass of one row with gradients on.
        tokens: how many padded tokens that row has.
        longest: tokens of the longest row that will come.
        free: bytes of memory to plan with, as the machine has them unless given.
    """
    most = tokens_per_pass(model)
    available = (free_bytes(model.device.type) if free is None else free) * _SHARE
    fits = int(available / (kept_bytes(states) / tokens))
    if fits >= longest:
        return Room(min(most, fits), recomputes=False)
    recompute_layers(model)
    fits = int(available / (kept_bytes(states) / tokens))
    return Room(max(1, min(most, fits)), recomputes=True)


def tokens_per_pass(model: Any) -> int:
    """Padded tokens beyond which passes are hardly faster; of wider numbers a CPU takes fewer."""
    if model.device.type != "cpu":
        return 16_384
    return 2048 if model.dtype.itemsize < 4 else 1024


def unmap(model: nn.Module) -> None:
    """Let a model on a CPU have its weights in memory of its own, not in a mapped file.

    A file that somebody writes to would change a run that has begun with it, or kill it. Weights
    that share their memory with others are nobody's file any more: they were laid out anew.
    """
    for parameter in model.parameters():
        shares = parameter.untyped_storage().nbytes() > parameter.nbytes
        if parameter.device.type == "cpu" and not shares:
            parameter.data = parameter.data.clone()


def kept_bytes(states: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a forward pass keeps for its gradient, frozen weights aside."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not _is_parameter(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = states()  # held until all is counted: what is freed would be counted twice
    del output
    return max(1, sum(kept.values()))


def free_bytes(device: str) -> int:
    """Bytes of memory that are free where a model stands."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def share_of_free_bytes(device: str, team: Team) -> int:
    """Bytes that this process may plan with: a GPU is its own, and a CPU's memory is all's."""
    return free_bytes(device) // (team.size if device == "cpu" else 1)


def agreed(model: Any, own: Room, team: Team) -> Room:
    """The room that every process of a team has; the model is changed where others recompute."""
    tokens, keeps = team.least([own.tokens, not own.recomputes])
    if not keeps and not own.recomputes:
        recompute_layers(model)
    return Room(int(tokens), recomputes=not keeps)


def recompute_layers(model: Any) -> None:
    """Let every decoder layer keep its input only, and run again in the backward pass."""
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, partial) or layer.forward.func is not _recomputed:
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No layer draws random numbers: dropout is off in eval mode, and adapters have none.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The decoder's layers: of its lists of modules the longest, and of these the outermost."""
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(stacks, key=len, default=[])  # type: ignore[arg-type]


def _is_parameter(tensor: Tensor) -> bool:
    base = tensor._base if tensor._base is not None else tensor
    return isinstance(base, torch.nn.Parameter)
