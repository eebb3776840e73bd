"""Files of rows: JSON lines, one JSON list, or Parquet; read in bounded memory, replaced whole.

What a file is, its first bytes say. A row that cannot be read is yielded as the error that it is,
so that whoever asked decides whether to go on; only a file that cannot be read any further raises.

Knows nothing of what a row means, nor how Parquet stores one (that is ``parquet.py``).
"""

from __future__ import annotations

import os
import reprlib
from codecs import BOM_UTF8
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import orjson

from agentpref.errors import ExchangeError
from agentpref.home import StrPath
from agentpref.prefer import parquet
from agentpref.prefer.jsonlist import Text, items
from agentpref.record.messages import MAX_MESSAGE_BYTES, new_id

MAX_ROW_BYTES = 4 * MAX_MESSAGE_BYTES
"""The longest row that is read: a prompt and two answers of the largest size fit."""

CHUNK_BYTES = 1 << 16

Parsed: TypeAlias = "dict[str, Any] | ExchangeError"


class Found(NamedTuple):
    """A row of a file, or why it is none; ``place`` says where: ``"line 3"`` or ``"row 3"``."""

    number: int
    place: str
    row: Parsed


@dataclass
class Meter:
    """How many bytes of a file have been read, and how many it has (0 for a pipe)."""

    read: int = 0
    total: int = 0


def read_rows(path: StrPath, wanted: Collection[str], meter: Meter) -> Generator[Found, None, None]:
    """Yield a file's rows, of a table only the ``wanted`` columns, and keep ``meter`` up to date.

    Raises:
        ExchangeError: the file cannot be read; the message names it and the cure.
        MissingDependency: it is Parquet, and pyarrow is not installed.
    """
    try:
        with open(path, "rb") as file:
            meter.total = os.fstat(file.fileno()).st_size
            start = file.peek(CHUNK_BYTES).removeprefix(BOM_UTF8).lstrip()
            if start.startswith(parquet.MAGIC) or Path(path).suffix == ".parquet":
                yield from _table_rows(file, wanted, meter)
            else:
                is_list = start.startswith(b"[")
                texts = enumerate(_items(file, meter), 1) if is_list else _lines(file, meter)
                word = "row" if is_list else "line"
                yield from (Found(n, f"{word} {n}", _parsed(text)) for n, text in texts)
    except ExchangeError as error:
        raise ExchangeError(f"{path}: {error}") from error
    except OSError as error:
        raise ExchangeError(
            f"{path} cannot be read ({error.strerror or error}); name a file of JSON lines, of one "
            "JSON list, or of Parquet that this user may read"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write beside a file and take its place when all is on the disk, or leave no trace.

    Raises:
        ExchangeError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{new_id()}")
    try:
        with open(draft, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise ExchangeError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that this user "
            "may write, with room for it"
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _table_rows(file: IO[bytes], wanted: Collection[str], meter: Meter) -> Iterator[Found]:
    table = parquet.read(file, wanted)
    for number, row in enumerate(table.rows, start=1):
        meter.read = meter.total * number // table.count
        yield Found(number, f"row {number}", row)


def _items(file: IO[bytes], meter: Meter) -> Iterator[Text]:
    def chunks() -> Iterator[bytes]:
        while chunk := file.read(CHUNK_BYTES):
            meter.read += len(chunk)
            yield chunk

    return items(chunks(), MAX_ROW_BYTES)


def _lines(file: IO[bytes], meter: Meter) -> Iterator[tuple[int, Text]]:
    """Yield the lines that are not blank, with their numbers."""
    for number in count(1):
        line = file.readline(MAX_ROW_BYTES + 1)
        rest = line
        meter.read += len(line)
        while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW_BYTES + 1)
            meter.read += len(rest)
        if not line:
            return
        line = line.removeprefix(BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line


def _parsed(text: Text) -> Parsed:
    try:
        return _object(text)
    except ExchangeError as error:
        return error


def _object(text: Text) -> dict[str, Any]:
    if isinstance(text, ExchangeError):
        raise text
    if len(text) > MAX_ROW_BYTES:
        raise ExchangeError(
            f"it is longer than {MAX_ROW_BYTES:,} bytes; check that the file has one row on each "
            "line, or is one list, or cut the row's texts"
        )
    try:
        row = orjson.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ExchangeError(
            f"byte {error.start} is not UTF-8 ({text[error.start]:#04x}); convert the file, for "
            "example with `iconv -f LATIN1 -t UTF-8`"
        ) from error
    except orjson.JSONDecodeError as error:
        raise ExchangeError(f"it is no JSON ({error}); {_CURE}") from error
    if not isinstance(row, dict):
        raise ExchangeError(f"it is {reprlib.repr(row)}, no JSON object; {_CURE}")
    return row


_CURE = "write one JSON object on each line, or one list of objects"
