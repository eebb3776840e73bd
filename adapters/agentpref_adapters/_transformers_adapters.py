"""The LoRA matrices of loaded revisions, and how they take part in one model's forward pass.

The model's layers stay its own: each linear layer has a hook that adds ``B A x · scale`` for the
rows whose revision adapts it. So rows of several revisions share a batch, nothing is ever switched,
and loading one is no more than reading its file. Knows nothing of requests and text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from agentpref.errors import GenerationFailed, SwapFailed
from agentpref.serve.manifest import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."


class Pair(NamedTuple):
    """The matrices of one layer: A (rank, in), and B transposed (rank, out), scaled already."""

    a: Tensor
    b: Tensor

    def add_to(self, output: Tensor, inputs: Tensor) -> Tensor:
        """Add ``B A x`` to what a layer gave for x, in place."""
        from torch.nn.functional import linear

        low = linear(inputs.reshape(-1, inputs.shape[-1]).to(self.a.dtype), self.a)
        rows = output.view(-1, output.shape[-1])
        if rows.dtype == self.b.dtype:
            rows.addmm_(low, self.b)
        else:
            rows.add_(low @ self.b)
        return output


@dataclass(frozen=True, eq=False)
class Adapter:
    """One revision in memory: the pair of each layer it adapts, by module name."""

    name: str
    pairs: Mapping[str, Pair]


class Share(NamedTuple):
    """A run of rows, from ``begin`` to before ``end``, that one adapter answers."""

    adapter: Adapter
    begin: int
    end: int


class Layers:
    """The linear layers of a model, ready for any adapter. Belongs to the thread that runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Put the hooks in; without an adapter they change nothing."""
        self._modules = dict(_linear_modules(model))
        self._shares: tuple[Share, ...] = ()
        self._size = (0, 0)
        self._hooks = ExitStack()
        for name, module in self._modules.items():
            self._hooks.callback(module.register_forward_hook(self._hook(name)).remove)

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of each layer that an adapter may adapt, by module name."""
        return {name: _shape(module) for name, module in self._modules.items()}

    def read(self, name: str, folder: Path) -> Adapter:
        """Read an adapter from its folder, onto the devices of the layers.

        May be called on any thread: the model is not touched.

        Raises:
            SwapFailed: it does not fit this model; its files were not checked before.
        """
        from safetensors.torch import load_file

        scale = _scale(orjson.loads((folder / CONFIG_FILE).read_bytes()))
        tensors = load_file(folder / WEIGHTS_FILE)
        adapted = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors}
        try:
            pairs = {module: self._pair(module, tensors, scale) for module in sorted(adapted)}
        except (KeyError, ValueError) as error:
            raise SwapFailed(
                f"{name} could not be loaded from {folder}, since it does not fit the model "
                f"({error}); train it on this one"
            ) from error
        return Adapter(name, pairs)

    @contextmanager
    def answering(self, shares: Sequence[Share], rows: int, width: int) -> Iterator[None]:
        """Run a forward pass over (rows, width) tokens; who is in no share is the base's."""
        self._shares, self._size = tuple(shares), (rows, width)
        try:
            yield
        finally:
            self._shares = ()

    def close(self) -> None:
        """Take the hooks out: the model is as it was."""
        self._hooks.close()

    def _pair(self, module: str, tensors: Mapping[str, Tensor], scale: float) -> Pair:
        layer = self._modules[module]
        a, b = (tensors[f"{_PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        wide, narrow = _shape(layer)
        if a.shape[1] != narrow or b.shape[0] != wide or a.shape[0] != b.shape[1]:
            raise ValueError(f"{module} is {(wide, narrow)}")
        device = next(layer.parameters()).device
        return Pair(a.float().to(device), (b.float() * scale).T.contiguous().to(device))

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for share in self._shares:
                pair = share.adapter.pairs.get(name)
                if pair is not None:
                    pair.add_to(self._part(output, share), self._part(inputs[0], share))

        return add

    def _part(self, values: Tensor, share: Share) -> Tensor:
        """What a layer got or gave for the rows of a share, out of that for all rows."""
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
    """Order rows so that those of one adapter stand together; give the order and the runs."""
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


def _linear_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _shape(module: Any) -> tuple[int, int]:
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]  # GPT-2's, stored the other way round


def _scale(config: Mapping[str, Any]) -> float:
    rank, alpha = config["r"], config["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
