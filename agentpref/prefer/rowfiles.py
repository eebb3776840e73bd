"""Files of rows: JSON lines, a JSON list, CSV, or Parquet. Read in bounded memory, replaced whole.

The first bytes of a file or a stream tell what it is, and for CSV also the name; one that gzip
packed is unpacked while it is read. A row that cannot be read is yielded as an error, so that the
caller decides whether to continue. A file that cannot be read any further raises.

``jsonrows.py`` reads the rows of JSON, ``csvrows.py`` those of CSV.

Parquet goes through pyarrow. Messages differ in their keys, and a column has one type, so messages
and tools are stored as Arrow's JSON type (``arrow.json``), which ``datasets`` reads as values. A
table by somebody else often stores messages as structs, in which a missing key is a null. Such
nulls are left out, except for the ``content`` of a message.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

import orjson

from agentpref.errors import ExchangeError, MissingDependency
from agentpref.home import StrPath, enclosing_home, is_of_system, replacing
from agentpref.leftovers import clear_drafts
from agentpref.prefer import csvrows, jsonrows
from agentpref.prefer.jsonrows import Found, Meter, Parsed
from agentpref.printable import escaped
from agentpref.record.messages import plain

BATCH_ROWS = 1000
BATCH_BYTES = 16 * 1024 * 1024
"""The most rows, and about the most bytes, that are held in memory at a time."""

_GZIP = b"\x1f\x8b"
_UNPACK = {b"\x28\xb5\x2f\xfd": "zstd -d", b"PK\x03\x04": "unzip", b"BZh": "bunzip2"}
_UTF16_CURE = "convert the file, for example with `iconv -f UTF-16 -t UTF-8`"

_TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of the names of CSV files, and the delimiter where the first line does not tell."""

Decode: TypeAlias = Callable[[Any], Any]
T = TypeVar("T")


def name_of(source: StrPath | IO[bytes]) -> str:
    """What messages call a file or a stream."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", "the stream"))


def read_rows(
    source: StrPath | IO[bytes], wanted: Collection[str], meter: Meter
) -> Generator[Found, None, None]:
    """Yield the rows of a file or a stream of bytes, and keep ``meter`` up to date.

    Of a Parquet table only the ``wanted`` columns are read, or all if it has none of these.

    Raises:
        ExchangeError: it cannot be read; the message names it and the cure.
        MissingDependency: it is Parquet, and pyarrow is not installed.
    """
    name = name_of(source)
    try:
        with _opened(source) as file:
            if file.peek(jsonrows.CHUNK_BYTES).startswith(_GZIP):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from _rows(unpacked, Path(Path(name).stem), wanted, meter)
            else:
                with suppress(OSError):  # a stream in memory has no size to ask for
                    meter.total = os.fstat(file.fileno()).st_size
                yield from _rows(file, Path(name), wanted, meter)
    except ExchangeError as error:
        raise ExchangeError(f"{name}: {error}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ExchangeError(
            f"{name} cannot be unpacked to its end ({error}); fetch the file again"
        ) from error
    except OSError as error:
        if not is_of_system(error):
            raise
        raise ExchangeError(
            f"{name} cannot be read ({error.strerror}); name a file of JSON lines, of one "
            "JSON list, of CSV, or of Parquet that this user may read"
        ) from error


@contextmanager
def _opened(source: StrPath | IO[bytes]) -> Iterator[Any]:
    """Open a file, or buffer a stream, which stays open."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            yield file
    elif hasattr(source, "peek"):
        yield source
    else:
        stream: Any = source
        buffered = io.BufferedReader(stream)
        try:
            yield buffered
        finally:
            buffered.detach()


def _rows(
    file: Any, path: Path, wanted: Collection[str], meter: Meter
) -> Generator[Found, None, None]:
    """Yield the rows of an open file, whose first bytes and name tell what it is."""
    if file.peek(jsonrows.CHUNK_BYTES).startswith(BOM_UTF8):
        meter.read += len(file.read(len(BOM_UTF8)))
    start = file.peek(jsonrows.CHUNK_BYTES).lstrip()
    for magic, unpack in _UNPACK.items():
        if start.startswith(magic):
            raise ExchangeError(f"it is compressed; unpack it first, with `{unpack}`")
    if start.startswith(b"PAR1") or path.suffix == ".parquet":
        yield from _table_rows(file, wanted, meter)
    elif start.startswith((BOM_UTF16_LE, BOM_UTF16_BE, b"{\0", b"[\0", b"\0{", b"\0[")):
        raise ExchangeError(f"it is UTF-16, not UTF-8; {_UTF16_CURE}")
    elif delimiter := csvrows.delimiter_of(start, wanted) or _TABLES.get(path.suffix):
        yield from csvrows.rows(file, wanted, meter, delimiter)
    elif start.startswith(b"["):
        yield from jsonrows.items(file, wanted, meter)
    elif jsonrows.is_spread(start):
        yield from jsonrows.items(file, wanted, meter, listed=False)
    else:
        yield from jsonrows.lines(file, wanted, meter)


def write_rows(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Any], target: StrPath | IO[bytes]
) -> int:
    """Write rows to a stream or, in one step, to a path, and return how many there were.

    A path that ends in ``.parquet`` becomes a table of the ``columns`` of a
    :class:`~agentpref.prefer.formats.Format`; all else is JSON lines, which gzip packs if the path
    ends in ``.gz``.

    Raises:
        ExchangeError: the file cannot be written, is in a home, or is no plain file.
        MissingDependency: Parquet is wanted, and pyarrow is not installed.
    """
    if not isinstance(target, (str, os.PathLike)):
        return _write_lines(rows, target)
    path = Path(target)
    if (inside := enclosing_home(path)) is not None:
        raise ExchangeError(f"{path} is inside the home {inside}; name a file elsewhere")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ExchangeError(
            f"{path} is no plain file, and would be replaced; name a file, or none for standard "
            "output"
        )
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending in _TABLES or path.name.endswith(".parquet.gz"):
        raise ExchangeError(
            f"{path} would hold JSON lines, not what its name says; name a file that ends in "
            ".jsonl, .jsonl.gz or .parquet"
        )
    try:
        clear_drafts(path.parent, path.name)  # of an export that was killed
        with replacing(path) as draft, open(draft, "wb") as file:
            if path.suffix == ".parquet":
                return _write_table(rows, columns, file)
            if path.suffix != ".gz":
                return _write_lines(rows, file)
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                return _write_lines(rows, packed)
    except OSError as error:
        if not is_of_system(error):
            raise
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


def _write_lines(rows: Iterable[Mapping[str, Any]], file: IO[bytes] | gzip.GzipFile) -> int:
    lines = (escaped(orjson.dumps(row, default=plain).decode()) + "\n" for row in rows)
    return sum(1 for line in lines if file.write(line.encode()))


def _table_rows(file: IO[bytes], wanted: Collection[str], meter: Meter) -> Iterator[Found]:
    if not file.seekable():
        raise ExchangeError("it is Parquet, which is not read in order; save it as a file first")
    pa, number = _pyarrow(), 0
    try:
        # Without these settings, pyarrow reads whole columns ahead.
        table = pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=jsonrows.CHUNK_BYTES)
        data = table.metadata
        rows = max(1, data.num_rows)
        total = sum(data.row_group(index).total_byte_size for index in range(data.num_row_groups))
        size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, total // rows)))
        names = [name for name in table.schema_arrow.names if name in wanted]
        held = {field.name for field in table.schema_arrow if field.type != pa.null()}
        meter.unread.update(_rows_with(data, held - {*names} if names else set()))
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


def _rows_with(data: Any, names: Collection[str]) -> Counter[str]:
    """Count the rows in which columns of a table hold something, by what the file says of itself.

    A column of structs or lists, of which it says nothing, counts in every row.
    """
    counts: Counter[str] = Counter()
    for group in map(data.row_group, range(data.num_row_groups)):
        of_group = {}
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            told = column.statistics if column.path_in_schema == name else None
            if name in names:
                nulls = told.null_count if told is not None and told.has_null_count else 0
                of_group[name] = group.num_rows - nulls
        counts.update(of_group)
    return +counts


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
