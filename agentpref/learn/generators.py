"""A training run's own random number generators; the host's stay untouched.

The state of a generator is a tensor, saved under a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentpref.errors import UnusableState

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_PREFIX = "generator."


@contextmanager
def own(model: PeftModel, seed: int) -> Iterator[None]:
    """Seed generators for the block, and restore the host's at its end."""
    import torch

    with torch.random.fork_rng(devices=_gpus(model)):
        torch.manual_seed(seed)
        yield


def states(model: PeftModel) -> dict[str, Tensor]:
    """The states of all generators that training uses, by name."""
    import torch

    found = {f"{_PREFIX}cpu": torch.get_rng_state()}
    for gpu in _gpus(model):
        found[f"{_PREFIX}{gpu}"] = torch.cuda.get_rng_state(gpu)
    return found


def restore(model: PeftModel, saved: Mapping[str, Tensor]) -> None:
    """Set the generators to states from :func:`states`.

    Raises:
        UnusableState: a saved tensor is not the state of a generator.
    """
    import torch

    try:
        torch.set_rng_state(saved[f"{_PREFIX}cpu"])
        for gpu in _gpus(model):
            torch.cuda.set_rng_state(saved[f"{_PREFIX}{gpu}"], gpu)
    except RuntimeError as error:
        raise UnusableState(f"it is damaged ({error})") from error


def is_state(name: str) -> bool:
    """Whether a tensor of this name is the state of a generator."""
    return name.startswith(_PREFIX)


def _gpus(model: PeftModel) -> list[int]:
    """The number of the model's GPU, or nothing if it is on a CPU."""
    import torch

    device = model.device
    if device.type != "cuda":
        return []
    return [device.index if device.index is not None else torch.cuda.current_device()]
