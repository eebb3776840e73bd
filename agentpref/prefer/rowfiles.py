"""Files of rows: JSON lines, one JSON list, or Parquet. Read in bounded memory, replaced whole.

The first bytes of a file tell what it is. A row that cannot be read is yielded as an error, so that
the caller decides whether to continue. A file that cannot be read any further raises.

Parquet goes through pyarrow. Messages differ in their keys, and a column has one type, so messages
and tools are stored as Arrow's JSON type (``arrow.json``), which ``datasets`` reads as values. A
table by somebody else often stores messages as structs, in which a missing key is a null. Such
nulls are left out, except for the ``content`` of a message.
"""

from __future__ import annotations

import json
import os
import reprlib
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

import ijson
import orjson

from agentpref.errors import ExchangeError, MissingDependency
from agentpref.home import StrPath, replacing
from agentpref.record.messages import MAX_MESSAGE_BYTES, plain

MAX_ROW_BYTES = 4 * MAX_MESSAGE_BYTES
"""The longest row that is read: a prompt and two answers of the largest size fit."""
MAX_DEPTH = 300
"""The depth to which items of a JSON list are built: deeper than orjson writes."""
BATCH_ROWS = 1000
BATCH_BYTES = 16 * 1024 * 1024
"""The most rows, and about the most bytes, that are held in memory at a time."""
CHUNK_BYTES = 1 << 16

_UNPACK = {b"\x1f\x8b": "zcat", b"\x28\xb5\x2f\xfd": "zstdcat", b"PK\x03\x04": "unzip -p"}
_DEEPER = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_JSON_CURE = "write one JSON object on each line, or one list of objects"
_UTF8_CURE = "convert the file, for example with `iconv -f LATIN1 -t UTF-8`"

Parsed: TypeAlias = "dict[str, Any] | ExchangeError"
Found: TypeAlias = tuple[str, Parsed]
"""The place of a row (``"line 3"`` or ``"row 3"``), and the row or why it cannot be read."""
Decode: TypeAlias = Callable[[Any], Any]
T = TypeVar("T")


@dataclass
class Meter:
    """How many bytes of a file have been read, and how many it has (0 for a pipe)."""

    read: int = 0
    total: int = 0


def read_rows(path: StrPath, wanted: Collection[str], meter: Meter) -> Generator[Found, None, None]:
    """Yield the rows of a file and keep ``meter`` up to date.

    Of a Parquet table only the ``wanted`` columns are read, or all if it has none of these.

    Raises:
        ExchangeError: the file cannot be read; the message names it and the cure.
        MissingDependency: the file is Parquet, and pyarrow is not installed.
    """
    try:
        with open(path, "rb") as file:
            meter.total = os.fstat(file.fileno()).st_size
            if file.peek(CHUNK_BYTES).startswith(BOM_UTF8):
                meter.read += len(file.read(len(BOM_UTF8)))
            start = file.peek(CHUNK_BYTES).lstrip()
            for magic, unpack in _UNPACK.items():
                if start.startswith(magic):
                    raise ExchangeError(
                        f"it is compressed; unpack it: `agentpref import <({unpack} {path})`"
                    )
            if start.startswith(b"PAR1") or Path(path).suffix == ".parquet":
                yield from _table_rows(file, wanted, meter)
            elif start.startswith(b"["):
                yield from _list_rows(file, meter)
            else:
                yield from _lines(file, meter)
    except ExchangeError as error:
        raise ExchangeError(f"{path}: {error}") from error
    except OSError as error:
        raise ExchangeError(
            f"{path} cannot be read ({error.strerror or error}); name a file of JSON lines, of one "
            "JSON list, or of Parquet that this user may read"
        ) from error


def write_rows(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Any], target: StrPath | IO[bytes]
) -> int:
    """Write rows to a stream or, in one step, to a path, and return how many there were.

    A path that ends in ``.parquet`` becomes a table of the ``columns`` of a
    :class:`~agentpref.prefer.formats.Format`; all else is JSON lines.

    Raises:
        ExchangeError: the file cannot be written.
        MissingDependency: Parquet is wanted, and pyarrow is not installed.
    """
    if not isinstance(target, (str, os.PathLike)):
        return _write_lines(rows, target)
    path = Path(target)
    try:
        with replacing(path) as draft, open(draft, "xb") as file:
            if path.suffix == ".parquet":
                return _write_table(rows, columns, file)
            return _write_lines(rows, file)
    except OSError as error:
        raise ExchangeError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that this user "
            "may write, with room for it"
        ) from error


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Group items, each of ``size`` bytes, into lists that fit in memory."""
    batch: list[T] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if len(batch) >= BATCH_ROWS or held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _lines(file: IO[bytes], meter: Meter) -> Iterator[Found]:
    """Yield the lines that are not blank. A line that is too long comes in pieces."""
    number, inside = 1, False
    for piece in iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""):
        meter.read += len(piece)
        if piece.strip() and not inside:
            yield f"line {number}", _parsed_line(piece)
        inside = not piece.endswith(b"\n")
        number += not inside


def _parsed_line(line: bytes) -> Parsed:
    if len(line) > MAX_ROW_BYTES:
        return _too_long("it")
    try:
        return _object(orjson.loads(line.decode()))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not UTF-8 ({line[error.start]:#04x})"
        return ExchangeError(f"{where}; {_UTF8_CURE}")
    except orjson.JSONDecodeError as error:
        return ExchangeError(f"it is not JSON ({error}); {_JSON_CURE}")


def _list_rows(file: IO[bytes], meter: Meter) -> Iterator[Found]:
    """Yield the items of one JSON list; ijson cannot go on if it breaks off or text follows."""
    number, row_start, depth, item = 1, meter.read, -1, ijson.ObjectBuilder()

    def chunks() -> Iterator[bytes]:
        while chunk := file.read(CHUNK_BYTES):
            if meter.read - row_start > MAX_ROW_BYTES:
                raise _too_long(f"row {number}")
            meter.read += len(chunk)
            yield chunk

    try:
        for event, scalar in ijson.basic_parse(ijson.from_iter(chunks())):
            above, depth = depth, depth + _DEEPER.get(event, 0)
            if min(above, depth) >= 0 and max(above, depth) <= MAX_DEPTH:
                item.event(event, scalar)
            if depth == 0 <= above:  # the item is complete
                yield f"row {number}", _plain_json(item.value)
                number, row_start, item = number + 1, meter.read, ijson.ObjectBuilder()
    except (ijson.JSONError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = str(error).removeprefix("b'").split("\n")[0].split("\\n")[0]
        raise ExchangeError(
            f"from row {number} on it cannot be read as JSON ({what}); correct it there, or fetch "
            f"the file again if it was cut off; if it is not UTF-8, {_UTF8_CURE}"
        ) from error


def _plain_json(value: Any) -> Parsed:
    """Make of what ijson built what orjson would read: floats for decimals, bounded depth."""
    try:
        return _object(orjson.loads(orjson.dumps(value, default=_finite)))
    except TypeError as error:
        return ExchangeError(f"it holds a value that cannot be stored ({error}); {_JSON_CURE}")


def _finite(number: Decimal) -> float:
    if not isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


def _object(value: Any) -> Parsed:
    if isinstance(value, dict):
        return value
    return ExchangeError(f"it is {reprlib.repr(value)}, not a JSON object; {_JSON_CURE}")


def _too_long(what: str) -> ExchangeError:
    return ExchangeError(
        f"{what} is longer than {MAX_ROW_BYTES:,} bytes; check that the file has one row on each "
        "line, or is one list, or cut the row's texts"
    )


def _write_lines(rows: Iterable[Mapping[str, Any]], file: IO[bytes]) -> int:
    lines = (orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    return sum(1 for line in lines if file.write(line))


def _table_rows(file: IO[bytes], wanted: Collection[str], meter: Meter) -> Iterator[Found]:
    pa, number = _pyarrow(), 0
    try:
        # Without these settings, pyarrow reads whole columns ahead.
        table = pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK_BYTES)
        data = table.metadata
        rows = max(1, data.num_rows)
        total = sum(data.row_group(index).total_byte_size for index in range(data.num_row_groups))
        size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, total // rows)))
        names = [name for name in table.schema_arrow.names if name in wanted]
        decode = _decoder(pa, pa.struct([*table.schema_arrow]))
        for batch in table.iter_batches(batch_size=size, columns=names or None):
            for row in _decoded_rows(batch, decode, (pa.ArrowException, ValueError)):
                number += 1
                meter.read = meter.total * number // rows
                yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ExchangeError(
            f"it cannot be read as Parquet ({error}); fetch or write the file again"
        ) from error


def _decoded_rows(batch: Any, decode: Decode, errors: tuple[type[Exception], ...]) -> list[Parsed]:
    """Decode rows together, or one by one if a value in one of them cannot be read."""
    try:
        return [decode(row) for row in batch.to_pylist()]
    except errors as error:
        if batch.num_rows == 1:
            return [ExchangeError(f"a value cannot be read ({error}); write the row again")]
    singles = (batch.slice(index, 1) for index in range(batch.num_rows))
    return [row for single in singles for row in _decoded_rows(single, decode, errors)]


def _decoder(pa: Any, kind: Any) -> Decode:
    """Make a function that parses JSON text and leaves out the nulls that fill up structs.

    It takes a value of the type ``kind`` as ``to_pylist`` gives it.
    """
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else orjson.loads(text)
    if isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        inner = _decoder(pa, kind.value_type)
        return lambda items: items and [inner(item) for item in items]
    if not isinstance(kind, pa.StructType):
        return lambda value: value
    fields = {field.name: _decoder(pa, field.type) for field in kind}
    keep = "content" if "role" in fields else None

    def without_padding(row: Any) -> Any:
        if row is None:
            return None
        items = ((name, fields[name](item)) for name, item in row.items())
        return {name: item for name, item in items if item is not None or name == keep}

    return without_padding


def _write_table(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Any], file: IO[bytes]
) -> int:
    pa, written = _pyarrow(), 0
    as_text, as_json = (pa.schema([*_arrow(pa, columns, js)]) for js in (pa.string(), pa.json_()))
    encoded = (_encoded(row, columns) for row in rows)
    with pa.parquet.ParquetWriter(file, as_json) as writer:
        for batch in batches(encoded, lambda row: len(orjson.dumps(row))):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=as_text).cast(as_json))
            written += len(batch)
    return written


def _arrow(pa: Any, column: Any, json_type: Any) -> Any:
    """Make the Arrow type of a column of a format; JSON is of the type ``json_type``."""
    if isinstance(column, str):
        return {"text": pa.string(), "flag": pa.bool_(), "json": json_type}[column]
    if isinstance(column, list):
        return pa.list_(_arrow(pa, column[0], json_type))
    return pa.struct([(name, _arrow(pa, inner, json_type)) for name, inner in column.items()])


def _encoded(value: Any, column: Any) -> Any:
    if value is None or column in ("text", "flag"):
        return value
    if column == "json":
        return orjson.dumps(value, default=plain).decode()
    if isinstance(column, list):
        return [_encoded(item, column[0]) for item in value]
    return {name: _encoded(value.get(name), inner) for name, inner in column.items()}


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
        from pyarrow import json_  # noqa: F401  new in version 19
    except ImportError as error:
        raise MissingDependency(
            f"Parquet needs pyarrow of version 19 or newer ({error}); install it with `pip install "
            "--upgrade 'agentpref[parquet]'`, or use JSON lines"
        ) from error
    return pyarrow
