"""The LoRA matrices of loaded revisions, and how they take part in one model's forward pass.

The model's layers stay its own: each linear layer has a hook that adds ``B A x · scale`` for the
rows whose revision adapts it, with peft's arithmetic in peft's order. So rows of several revisions
share a batch, nothing is ever switched, and loading one is no more than reading its file. Knows
nothing of requests and text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    """The matrices of one layer, (rank, in) and (out, rank), and the scale of their product."""

    a: Tensor
    b: Tensor
    scale: float

    def of(self, inputs: Tensor) -> Tensor:
        """What the pair adds to the layer's output."""
        from torch.nn.functional import linear

        return linear(linear(inputs.to(self.a.dtype), self.a), self.b) * self.scale


@dataclass(frozen=True, eq=False)
class Adapter:
    """One revision in memory: the pair of each layer it adapts, by module name."""

    name: str
    pairs: Mapping[str, Pair]


class _Share(NamedTuple):
    """The rows of the batch at hand that one adapter answers; ``None`` for all of them."""

    adapter: Adapter
    rows: Tensor | None


class Layers:
    """The linear layers of a model, ready for any adapter. Belongs to the thread that runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Put the hooks in; without an adapter they change nothing."""
        self._modules = dict(_linear_modules(model))
        self._shares: tuple[_Share, ...] = ()
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
    def answering(self, adapters: Sequence[Adapter | None], width: int) -> Iterator[None]:
        """Run a forward pass over (rows, width) tokens, each row with its adapter or the base."""
        self._size = (len(adapters), width)
        self._shares = tuple(_shares(adapters))
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
        return Pair(a.float().to(device), b.float().to(device), scale)

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for share in self._shares:
                pair = share.adapter.pairs.get(name)
                if pair is not None:
                    output = self._added(pair, inputs[0], output, share.rows)
            return output

        return add

    def _added(self, pair: Pair, inputs: Tensor, output: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return (output + pair.of(inputs)).to(output.dtype)
        by_row, rows = self._by_row(output), rows.to(output.device)
        changed = by_row.index_select(0, rows) + pair.of(self._by_row(inputs).index_select(0, rows))
        return by_row.index_copy(0, rows, changed.to(output.dtype)).view_as(output)

    def _by_row(self, values: Tensor) -> Tensor:
        """Give back the rows' dimension to what a layer got as one long list of tokens."""
        rows, width = self._size
        if values.ndim > 2 and len(values) == rows:
            return values
        if values.ndim == 2 and len(values) == rows * width:
            return values.unflatten(0, (rows, width))
        raise GenerationFailed(
            f"a layer was given {tuple(values.shape)} for {rows} rows of {width} tokens, so its "
            f"rows cannot be told apart; serve this model with one revision at a time"
        )


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


def _shares(adapters: Sequence[Adapter | None]) -> Iterator[_Share]:
    import torch

    rows: dict[Adapter, list[int]] = {}
    for row, adapter in enumerate(adapters):
        if adapter is not None:
            rows.setdefault(adapter, []).append(row)
    for adapter, own in rows.items():
        if len(own) == len(adapters):
            yield _Share(adapter, None)
        else:
            device = next(iter(adapter.pairs.values())).a.device
            yield _Share(adapter, torch.tensor(own, device=device))
