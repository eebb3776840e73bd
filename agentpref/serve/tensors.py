"""The tensors of an adapter: read from its bytes, and checked number by number, without an engine.

What is wrong is raised as ``ValueError`` and names the tensor or the setting.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from agentpref.errors import MissingDependency
from agentpref.models.base_files import header_of

Shape = tuple[int, ...]

# Bytes per number, and the bits of the infinity, above which the NaNs are; the largest number.
_DTYPES = {"F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
_LARGEST = {"F32": 3.4028235e38, "F16": 65504.0, "BF16": 3.3895314e38}
_SCALINGS = (1e-6, 1e4)
_MAX_DIMENSIONS = 8
_BLOCK = 1 << 22


class Tensor(NamedTuple):
    """A tensor of a safetensors file: ``begin`` and ``end`` are offsets into the file."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


def read_tensors(data: bytes) -> list[Tensor]:
    """Read the table of a safetensors file's bytes, and check that it describes exactly them.

    Raises:
        ValueError: the file is truncated, padded, or not a safetensors file.
    """
    try:
        header = header_of(io.BytesIO(data), len(data))
    except ValueError as error:
        message = f"cannot be read as safetensors ({error}); save the adapter again"
        raise ValueError(message) from error
    end, tensors = header.start, []
    entries = [_tensor(name, entry, header.start) for name, entry in header.tensors.items()]
    for tensor in sorted(entries, key=lambda tensor: tensor.begin):
        if tensor.begin != end:
            break
        tensors.append(tensor)
        end = tensor.end
    if len(tensors) < len(entries) or end != len(data):
        raise ValueError("the file is truncated or has gaps; copy or save the adapter again")
    return tensors


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or any(type(number) is not int for number in numbers):
            raise ValueError("a string and whole numbers are expected")
        if len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"more than {_MAX_DIMENSIONS} dimensions")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the entry of {shortened(name)} is malformed; save it again") from error
    if dtype not in _DTYPES:
        allowed = ", ".join(sorted(_DTYPES))
        raise ValueError(f"{name} has dtype {dtype}, but must be one of {allowed}")
    if min(shape, default=1) < 1 or end - begin != math.prod(shape) * _DTYPES[dtype][0]:
        raise ValueError(f"{name} does not contain {tuple(shape)} numbers; save it again")
    return Tensor(name, dtype, tuple(shape), start + begin, start + end)


def largest_numbers(data: bytes, tensors: list[Tensor]) -> dict[str, float]:
    """Refuse a NaN or an infinity by its bits; return the largest magnitude in each tensor.

    Without its sign, a number's bits sort as numbers do, the infinity and the NaNs last. numpy has
    no bfloat16, which is the upper half of a float32.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise MissingDependency(
            "checking weights needs numpy; install it with: pip install 'agentpref[train]'"
        ) from error
    largest: dict[str, float] = {}
    for tensor in tensors:
        width, infinity = _DTYPES[tensor.dtype]
        most = 0
        for begin in range(tensor.begin, tensor.end, _BLOCK):  # blocks: the copies need memory
            count = min(_BLOCK, tensor.end - begin) // width
            bits = np.frombuffer(data, f"<u{width}", count, begin)
            most = max(most, int((bits & ((1 << 8 * width - 1) - 1)).max()))
        if most >= infinity:
            raise ValueError(
                f"{tensor.name} contains a number that is not finite; the training diverged"
            )
        number = most << 16 if tensor.dtype == "BF16" else most
        kind = np.float16 if tensor.dtype == "F16" else np.float32
        largest[tensor.name] = float(np.array(number, f"<u{kind().itemsize}").view(kind))
    return largest


def check_scaling(
    config: Mapping[str, Any], tensors: list[Tensor], largest: Mapping[str, float]
) -> None:
    """Refuse a scaling that no training has, or with which the matrices overflow.

    Engines multiply the matrix B by it, in the type of that matrix.
    """
    alpha, rank = config["lora_alpha"], config["r"]
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not _SCALINGS[0] <= scaling <= _SCALINGS[1]:
        raise ValueError(
            f"lora_alpha is {alpha:g}, so the scaling is {scaling:g}, but must be from "
            f"{_SCALINGS[0]:g} to {_SCALINGS[1]:,.0f}"
        )
    for tensor in tensors:
        if scaling * largest[tensor.name] > _LARGEST[tensor.dtype]:
            raise ValueError(
                f"lora_alpha is {alpha:g}, so the scaling is {scaling:g}, with which "
                f"{tensor.name} has numbers that {tensor.dtype} cannot hold; set it as trained"
            )


def shortened(text: str) -> str:
    """Cut a text that is too long for an error message."""
    return text if len(text) <= 200 else f"{text[:200]}…"
