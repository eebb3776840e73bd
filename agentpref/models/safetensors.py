"""The header of a safetensors file: eight bytes of length, then a JSON object.

Reading it this way needs neither torch nor the safetensors library, and costs the same for a file
of any size. The JSON is read strictly, since parsers differ in what they accept and in which of two
equal keys they keep: one program could check what another does not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import orjson

_MAX_HEADER = 64 << 20


class Header(NamedTuple):
    """What a file contains.

    ``tensors`` maps a name to its ``dtype``, ``shape`` and ``data_offsets``, which are unchecked
    and count from byte ``start`` of the file. ``metadata`` maps strings to strings.
    """

    start: int
    tensors: dict[str, Any]
    metadata: dict[str, Any]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: the file does not begin with such a header.
        OSError: the file cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError("not a safetensors file")
        data = stream.read(length)
    if not data.startswith(b"{"):
        raise ValueError("not a safetensors file")
    tensors = parse_object(data)
    metadata = tensors.pop("__metadata__", {})
    return Header(8 + length, tensors, metadata)


def parse_object(data: bytes) -> dict[str, Any]:
    """Read a JSON object that every parser reads alike.

    Raises:
        ValueError: it is not strict JSON, not an object, or has a key twice at some depth.
    """
    try:
        value = orjson.loads(data)
        json.loads(data, object_pairs_hook=_require_unique, parse_int=len, parse_float=len)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _require_unique(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"has the key {key[:200]!r} twice")
        seen.add(key)
