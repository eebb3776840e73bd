"""The tensors of a safetensors file: their table, and whether all their numbers are finite.

Read with the header and numpy alone, block by block; no library of the format, and no torch. Knows
nothing of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentpref.errors import InvalidAdapter, MissingDependency
from agentpref.serve.strict import parse_object, shortened

Shape = tuple[int, ...]

# Bytes per number, and the exponent bits that are all set in an infinity and in a NaN.
_DTYPES = {"F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
_MAX_DIMENSIONS = 8
_BLOCK = 1 << 22
_MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header: ``begin`` and ``end`` are offsets into the file."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


def read_header(file: Path) -> list[Tensor]:
    """Read the table of a safetensors file, and check that it describes exactly that file.

    Raises:
        InvalidAdapter: for a file that is truncated, padded, or no safetensors at all.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise InvalidAdapter(f"{file} is no safetensors file; save the adapter again")
        data = stream.read(length)
    if not data.startswith(b"{"):
        raise InvalidAdapter(f"{file} is no safetensors file; save the adapter again")
    header = parse_object(data, file)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = [_tensor(name, entry, start, file) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.begin)
    ends = [start, *(tensor.end for tensor in tensors)]
    if any(t.begin != end for t, end in zip(tensors, ends, strict=False)) or ends[-1] != size:
        raise InvalidAdapter(f"{file} is truncated or has gaps; copy or save the adapter again")
    return tensors


def check_finite(file: Path, tensor: Tensor) -> None:
    """Refuse a tensor that holds a NaN or an infinity.

    Looks at the exponent bits themselves: no cast, and so no dtype that numpy lacks.

    Raises:
        InvalidAdapter: naming the tensor.
        MissingDependency: numpy is not installed.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise MissingDependency(
            "checking weights needs numpy; install it with: pip install 'agentpref[train]'"
        ) from error
    width, exponent = _DTYPES[tensor.dtype]
    for block in _blocks(file, tensor):
        bits = np.frombuffer(block, dtype=f"<u{width}")
        if ((bits & exponent) == exponent).any():
            raise InvalidAdapter(
                f"{file}: {tensor.name} holds a number that is not finite; the training diverged"
            )


def _blocks(file: Path, tensor: Tensor) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(tensor.begin)
        for begin in range(tensor.begin, tensor.end, _BLOCK):
            yield stream.read(min(_BLOCK, tensor.end - begin))


def _tensor(name: str, entry: Any, start: int, file: Path) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError) as error:
        raise _malformed(name, file) from error
    strange = not isinstance(dtype, str) or any(type(number) is not int for number in numbers)
    if strange or len(shape) > _MAX_DIMENSIONS:
        raise _malformed(name, file)
    if dtype not in _DTYPES:
        allowed = ", ".join(sorted(_DTYPES))
        raise InvalidAdapter(f"{file}: {name} has dtype {dtype}, but must be one of {allowed}")
    if min(shape, default=1) < 1 or end - begin != math.prod(shape) * _DTYPES[dtype][0]:
        raise InvalidAdapter(f"{file}: {name} does not hold {tuple(shape)} numbers; save it again")
    return Tensor(name, dtype, tuple(shape), start + begin, start + end)


def _malformed(name: str, file: Path) -> InvalidAdapter:
    return InvalidAdapter(f"{file}: the entry of {shortened(name)} is malformed; save it again")
