"""Checks of an adapter's weights: the names, shapes and every single number.

They use the safetensors header and numpy, block by block, without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentpref.errors import InvalidAdapter, MissingDependency
from agentpref.models.base_files import read_header

Shape = tuple[int, ...]

# Bytes per number, and the exponent bits, which are all set in an infinity and in a NaN.
_DTYPES = {"F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
_MAX_DIMENSIONS = 8
_BLOCK = 1 << 22

# Layers that engines share with the embeddings, or pad.
_OUTPUTS = frozenset({"lm_head", "embed_out"})
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a safetensors file: ``begin`` and ``end`` are offsets into the file."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


def check_weights(
    file: Path, *, rank: int, targets: list[str], layers: Mapping[str, Shape] | None
) -> None:
    """Refuse weights that are not finite LoRA matrices for exactly the layers that they adapt.

    Args:
        file: the safetensors file.
        rank: the LoRA rank.
        targets: the adapted modules: whole names, or their last parts.
        layers: (out, in) of each linear layer of the base model, by module name, where known.

    Raises:
        InvalidAdapter: naming the tensor or the module.
        MissingDependency: numpy is not installed.
    """
    tensors = read_tensors(file)
    modules = _adapted_layers(tensors, rank, file)
    _check_targets(modules, targets, layers, file)
    for module, shape in modules.items():
        found = shape if layers is None else layers.get(module)
        if found is None:
            raise InvalidAdapter(f"{file}: {module} is not a linear layer of the base model")
        if tuple(found) != shape:
            raise InvalidAdapter(
                f"{file}: {module} adapts a layer of (out, in) = {shape}, but the base model's "
                f"is {tuple(found)}"
            )
    for tensor in tensors:
        _check_finite(file, tensor)


def read_tensors(file: Path) -> list[Tensor]:
    """Read the table of a safetensors file, and check that it describes exactly that file.

    Raises:
        InvalidAdapter: the file is truncated, padded, or not a safetensors file.
    """
    try:
        header = read_header(file)
    except ValueError as error:
        raise InvalidAdapter(
            f"{file} cannot be read as safetensors ({error}); save the adapter again"
        ) from error
    start = header.start
    tensors = [_tensor(name, entry, start, file) for name, entry in header.tensors.items()]
    tensors.sort(key=lambda tensor: tensor.begin)
    ends = [start, *(tensor.end for tensor in tensors)]
    size = file.stat().st_size
    if any(t.begin != end for t, end in zip(tensors, ends, strict=False)) or ends[-1] != size:
        raise InvalidAdapter(f"{file} is truncated or has gaps; copy or save the adapter again")
    return tensors


def shortened(text: str) -> str:
    """Cut a text that is too long for an error message."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def _tensor(name: str, entry: Any, start: int, file: Path) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or any(type(number) is not int for number in numbers):
            raise ValueError("a string and whole numbers are expected")
        if len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"more than {_MAX_DIMENSIONS} dimensions")
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidAdapter(
            f"{file}: the entry of {shortened(name)} is malformed; save it again"
        ) from error
    if dtype not in _DTYPES:
        allowed = ", ".join(sorted(_DTYPES))
        raise InvalidAdapter(f"{file}: {name} has dtype {dtype}, but must be one of {allowed}")
    if min(shape, default=1) < 1 or end - begin != math.prod(shape) * _DTYPES[dtype][0]:
        raise InvalidAdapter(
            f"{file}: {name} does not contain {tuple(shape)} numbers; save it again"
        )
    return Tensor(name, dtype, tuple(shape), start + begin, start + end)


def _adapted_layers(tensors: list[Tensor], rank: int, file: Path) -> dict[str, Shape]:
    """Match each A with its B; return (out, in) of the layer that each pair adapts."""
    sides: dict[str, dict[str, Shape]] = {}
    for tensor in tensors:
        match = _LORA.fullmatch(tensor.name)
        if match is None:
            raise InvalidAdapter(
                f"{file}: {shortened(tensor.name)} is not a LoRA matrix of a linear layer"
            )
        if match["module"].rpartition(".")[2] in _OUTPUTS:
            raise InvalidAdapter(
                f"{file}: {tensor.name} adapts the output layer, which engines share with the "
                f"embeddings; leave it out of target_modules"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.shape
    shapes: dict[str, Shape] = {}
    for module, pair in sides.items():
        for side in "AB":
            if side not in pair:
                raise InvalidAdapter(f"{file}: {module} has no lora_{side}; save the adapter again")
        a, b = pair["A"], pair["B"]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise InvalidAdapter(
                f"{file}: {module} has lora_A {a} and lora_B {b}, but rank {rank} asks for "
                f"({rank}, in) and (out, {rank})"
            )
        shapes[module] = (b[0], a[1])
    return shapes


def _check_targets(
    modules: Mapping[str, Shape],
    targets: list[str],
    layers: Mapping[str, Shape] | None,
    file: Path,
) -> None:
    """Require tensors for each layer that the settings adapt, and for no other layer."""

    def is_target(module: str) -> bool:
        return any(module == target or module.endswith("." + target) for target in targets)

    for target in targets:
        if not any(module == target or module.endswith("." + target) for module in modules):
            raise InvalidAdapter(f"{file}: no tensor adapts {target}, which the settings name")
    for module in modules:
        if not is_target(module):
            raise InvalidAdapter(f"{file}: {module} is adapted, but the settings do not name it")
    for layer in layers or ():
        if layer not in modules and is_target(layer):
            raise InvalidAdapter(f"{file}: {layer} has no tensors, though the settings name it")


def _check_finite(file: Path, tensor: Tensor) -> None:
    """Refuse a NaN or an infinity by its exponent bits: numpy has no bfloat16."""
    try:
        import numpy as np
    except ImportError as error:
        raise MissingDependency(
            "checking weights needs numpy; install it with: pip install 'agentpref[train]'"
        ) from error
    width, exponent = _DTYPES[tensor.dtype]
    with file.open("rb") as stream:
        stream.seek(tensor.begin)
        for begin in range(tensor.begin, tensor.end, _BLOCK):
            block = stream.read(min(_BLOCK, tensor.end - begin))
            bits = np.frombuffer(block, dtype=f"<u{width}")
            if ((bits & exponent) == exponent).any():
                raise InvalidAdapter(
                    f"{file}: {tensor.name} contains a number that is not finite; the training "
                    f"diverged"
                )
