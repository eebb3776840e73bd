"""Segments: what a home has logged, as files that never change, each named by its content.

A segment is JSON lines in gzip: a head, which has the fingerprints of the keys that its users are
named with, and rows as :mod:`agentpref.record.rows` writes them. ``rows-<time>-<hash>.jsonl.gz``
holds what was logged, and its time is that of its newest row. ``forgotten-<time>-<hash>.jsonl.gz``
holds tombstones. The hash is of the unpacked text, so the same rows have the same name, and a file
that was damaged or changed does not have its own.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from agentpref.errors import ExchangeError
from agentpref.record.messages import plain

MAX_BYTES = 1024 * 1024 * 1024
"""The most bytes of a segment, unpacked, that are read."""

FULL_BYTES = 64 * 1024 * 1024
"""From how many bytes on further rows go to the next segment."""

ROWS, FORGOTTEN = "rows", "forgotten"
VERSION = 1

_NAME = re.compile(rf"({ROWS}|{FORGOTTEN})-(\d{{8}}T\d{{6}})-([0-9a-f]{{32}})\.jsonl\.gz")


class Segment(NamedTuple):
    """A segment as it is read: the keys of its users, and its rows."""

    name: str
    keys: tuple[str, ...]
    rows: list[Any]


def is_segment(name: str) -> bool:
    """Whether a file is named as a segment is."""
    return _NAME.fullmatch(name) is not None


def is_of(name: str, kind: str) -> bool:
    """Whether a name is that of a segment of this kind."""
    return is_segment(name) and name.startswith(f"{kind}-")


def packed(
    kind: str, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, bytes]]:
    """Write rows as segments, with their names; the same rows give the same segments."""
    head = orjson.dumps({"type": "segment", "version": VERSION, "keys": [*keys]}) + b"\n"
    lines, size, newest = [head], 0, 0.0
    for row in rows:
        line = orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE)
        if size and size + len(line) > FULL_BYTES:
            yield _packed(kind, lines, newest)
            lines, size, newest = [head], 0, 0.0
        lines.append(line)
        size += len(line)
        newest = max(newest, row.get("created_at", row.get("at", 0.0)))
    if size:
        yield _packed(kind, lines, newest)


def _packed(kind: str, lines: Sequence[bytes], newest: float) -> tuple[str, bytes]:
    content = b"".join(lines)
    at = time.strftime("%Y%m%dT%H%M%S", time.gmtime(min(max(newest, 0.0), 253402300799.0)))
    name = f"{kind}-{at}-{_hash(content)}.jsonl.gz"
    return name, gzip.compress(content, 6, mtime=0)


def unpacked(name: str, data: bytes) -> Segment:
    """Read a segment.

    Raises:
        ExchangeError: it is not as it was written, or not as agentpref writes one.
    """
    named = _NAME.fullmatch(name)
    if named is None:
        raise ExchangeError(f"{name!a} is not the name of a segment")
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ExchangeError(f"it is no whole gzip file ({error})") from error
    if len(content) > MAX_BYTES:
        raise ExchangeError(f"it has more than {MAX_BYTES:,} bytes unpacked")
    if _hash(content) != named[3]:
        raise ExchangeError("its content is not what its name says: it was damaged or changed")
    try:
        head, *rows = [orjson.loads(line) for line in content.splitlines()]
        version, keys = head["version"], head["keys"]
        is_ours = head["type"] == "segment" and all(isinstance(key, str) for key in keys)
    except (ValueError, TypeError, KeyError) as error:
        raise ExchangeError("it is not JSON lines as agentpref writes them") from error
    if not is_ours or version != VERSION:
        raise ExchangeError(f"its version is {version!a}, and this agentpref reads {VERSION}")
    return Segment(name, tuple(keys), rows)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
