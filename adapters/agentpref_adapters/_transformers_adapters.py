"""The LoRA matrices of loaded revisions, and how they take part in a model's forward pass.

A hook on each linear layer adds ``B A x · scale`` to the rows whose revision adapts that layer. So
rows of several revisions share a batch, the model itself never changes, and loading a revision is
reading its file into memory of the process's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.errors import GenerationFailed
from agentpref.models.adapter_files import AdapterFiles

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."


class LoraWeights(NamedTuple):
    """The matrices of one layer: A (rank, in), and B transposed and scaled (rank, out).

    They are in float32 on any base: products as small as these take no longer so, on a CPU.
    """

    a: Tensor
    b: Tensor

    def add_to(self, output: Tensor, inputs: Tensor) -> None:
        """Add ``B A x`` to a layer's output for x, in place."""
        from torch.nn.functional import linear

        low = linear(inputs.reshape(-1, inputs.shape[-1]).to(self.a.dtype), self.a)
        rows = output.view(-1, output.shape[-1])
        if rows.dtype == self.b.dtype:
            rows.addmm_(low, self.b)
        else:
            rows.add_(low @ self.b)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A revision in memory: the weights of each layer it adapts, by module name."""

    name: str
    weights: Mapping[str, LoraWeights]


class Share(NamedTuple):
    """The rows from ``begin`` to before ``end``, which one adapter answers."""

    adapter: Adapter
    begin: int
    end: int


class Layers:
    """The linear layers of a model, with hooks that apply adapters. For one thread at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Add the hooks; without an adapter they change nothing."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        self._modules: dict[str, nn.Module] = {}
        self._shares: tuple[Share, ...] = ()
        self._size = (0, 0)
        self._hooks = ExitStack()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                self._modules[name] = module
                self._hooks.callback(module.register_forward_hook(self._hook(name)).remove)

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of each layer that an adapter may adapt, by module name."""
        return {name: _shape(module) for name, module in self._modules.items()}

    def read(self, name: str, files: AdapterFiles) -> Adapter:
        """Make an adapter of the bytes of its files, on the devices of the layers; on any thread.

        Raises ``KeyError`` or ``ValueError`` if it does not fit this model.
        """
        config, tensors = files.settings(), files.tensors()
        rank = config["r"]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapted = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors}
        weights = {module: self._weights(module, tensors, scale) for module in sorted(adapted)}
        return Adapter(name, weights)

    @contextmanager
    def answering(self, shares: Sequence[Share], rows: int, width: int) -> Iterator[None]:
        """Apply adapters to a forward pass over (rows, width) tokens; other rows are the base's."""
        self._shares, self._size = tuple(shares), (rows, width)
        try:
            yield
        finally:
            self._shares = ()

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _weights(self, module: str, tensors: Mapping[str, Tensor], scale: float) -> LoraWeights:
        layer = self._modules[module]
        a, b = (tensors[f"{_PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        wide, narrow = _shape(layer)
        if a.shape[1] != narrow or b.shape[0] != wide or a.shape[0] != b.shape[1]:
            raise ValueError(f"{module} is {(wide, narrow)}")
        device = next(layer.parameters()).device
        return LoraWeights(a.float().to(device), (b.float() * scale).T.contiguous().to(device))

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for share in self._shares:
                weights = share.adapter.weights.get(name)
                if weights is not None:
                    weights.add_to(self._part(output, share), self._part(inputs[0], share))

        return add

    def _part(self, values: Tensor, share: Share) -> Tensor:
        """A layer's input or output for the rows of a share."""
        rows, width = self._size
        if share.begin == 0 and share.end == rows:
            return values
        if values.ndim > 2 and values.shape[:2] == (rows, width):
            return values[share.begin : share.end]
        if values.ndim == 2 and len(values) == rows * width:  # one long list of tokens
            return values[share.begin * width : share.end * width]
        raise GenerationFailed(
            f"a layer was given {tuple(values.shape)} for {rows} rows of {width} tokens, so its "
            f"rows cannot be told apart; serve this model with one revision at a time"
        )


def shares_of(adapters: Sequence[Adapter | None]) -> tuple[list[int], list[Share]]:
    """Order rows so that those of one adapter are neighbours; return the order and the shares."""
    first: dict[Adapter | None, int] = {}
    for adapter in adapters:
        first.setdefault(adapter, len(first))
    order = sorted(range(len(adapters)), key=lambda row: first[adapters[row]])
    shares, begin = [], 0
    for adapter, rows in groupby(adapters[row] for row in order):
        end = begin + len(list(rows))
        if adapter is not None:
            shares.append(Share(adapter, begin, end))
        begin = end
    return order, shares


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer. GPT-2's Conv1D stores its weight transposed."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]
