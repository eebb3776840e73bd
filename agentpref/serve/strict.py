"""JSON of strangers: an object that means the same to every reader, or none.

Parsers differ in what they take and in which of two equal keys they keep, so that one program could
check what another does not read. Knows nothing of adapters.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from agentpref.errors import InvalidAdapter


def parse_object(data: bytes, file: Path) -> dict[str, Any]:
    """Read a JSON object strictly; ``file`` is for the words of a refusal.

    Raises:
        InvalidAdapter: it is no object, no strict JSON, or has a key twice, at whichever depth.
    """
    try:
        value = orjson.loads(data)
        json.loads(data, object_pairs_hook=partial(_unique, file), parse_int=len, parse_float=len)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise InvalidAdapter(f"{file} is not readable ({error}); save the adapter again") from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{file} holds no JSON object; save the adapter again")
    return value


def shortened(text: str) -> str:
    """Cut what is too long for an error message."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise InvalidAdapter(f"{file} says {shortened(key)} twice; save the adapter again")
        seen.add(key)
