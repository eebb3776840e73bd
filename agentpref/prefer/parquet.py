"""Rows in Parquet, read and written in bounded memory through pyarrow, where it is installed.

A table has one type for each column, which messages have not. What has a fixed form is written as
such; a message or a tool as Arrow's own JSON type (``arrow.json``), which ``datasets`` reads as the
values that they were. So nothing is changed on the way, a null included. In tables that others
wrote, a struct has all its keys in every row, filled up with nulls: those are left out, but for an
absent ``content`` of a message, which stays ``None``. Within JSON, nulls are what somebody wrote.

Knows nothing of formats: which columns there are, and what is in them, it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import orjson

from agentpref.errors import ExchangeError, MissingDependency
from agentpref.record.messages import plain

MAGIC = b"PAR1"
"""What a Parquet file begins with."""

BATCH_ROWS = 1000
BATCH_BYTES = 16 * 1024 * 1024
"""How much is held at a time, read or written: so many rows, of about so many bytes at most."""

Decode = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of an open file, and how many there are; one that cannot be read is an error."""

    count: int
    rows: Iterator[dict[str, Any] | ExchangeError]


def read(file: IO[bytes], wanted: Collection[str]) -> Table:
    """Open a table, and read of it the columns that are ``wanted``; where it has none, all.

    Raises:
        ExchangeError: here or while reading, the file is no whole Parquet file.
        MissingDependency: pyarrow is not installed.
    """
    pa = _pyarrow()
    with _translated(pa):
        # Without these settings, whole columns are read ahead.
        table = pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)
        names = table.schema_arrow.names
    return Table(table.metadata.num_rows, _rows(pa, table, [*filter(wanted.__contains__, names)]))


def write(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Any], file: IO[bytes]) -> int:
    """Write rows and return how many there were.

    Args:
        rows: what stands under each column; a key that is absent is null.
        columns: what each column holds: ``"text"``, ``"flag"``, ``"json"``, a list of one of these,
            or a mapping of names to these.
        file: open for writing bytes.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    pa = _pyarrow()
    stored, told = (_schema(pa, columns, json) for json in (pa.string(), pa.json_()))
    written = 0
    with pa.parquet.ParquetWriter(file, told) as writer:
        for batch in _batches(_encode(row, columns) for row in rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=stored).cast(told))
            written += len(batch)
    return written


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(
            "Parquet is read and written through pyarrow, which is not installed; install it with "
            "`pip install 'agentpref[parquet]'`, or use JSON lines"
        ) from error
    if not hasattr(pyarrow, "json_"):
        raise MissingDependency(
            f"pyarrow {pyarrow.__version__} is too old, it has no JSON type; upgrade it with "
            "`pip install --upgrade 'agentpref[parquet]'`"
        )
    return pyarrow


@contextmanager
def _translated(pa: Any) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ExchangeError(
            f"it cannot be read as Parquet ({error}); fetch or write the file again"
        ) from error


def _rows(pa: Any, table: Any, names: list[str]) -> Iterator[dict[str, Any] | ExchangeError]:
    with _translated(pa):
        decode = _decoder(pa, pa.struct([*table.schema_arrow]))
        size = _batch_rows(table.metadata)
        for batch in table.iter_batches(batch_size=size, columns=names or None):
            yield from _batch(pa, batch, decode)


def _batch_rows(metadata: Any) -> int:
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    row_bytes: int = sum(group.total_byte_size for group in groups) // max(1, metadata.num_rows)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))


def _batch(pa: Any, batch: Any, decode: Decode) -> Iterator[dict[str, Any] | ExchangeError]:
    """Read rows together, or one by one where something in one of them cannot be read."""
    try:
        yield from [decode(row) for row in batch.to_pylist()]
    except (pa.ArrowException, ValueError) as error:
        if batch.num_rows > 1:
            for index in range(batch.num_rows):
                yield from _batch(pa, batch.slice(index, 1), decode)
        else:
            yield ExchangeError(f"a value cannot be read ({error}); write the row again")


def _decoder(pa: Any, kind: Any) -> Decode:
    """Make the function that turns what ``to_pylist`` gives for a type into JSON values."""
    types = pa.types
    if isinstance(kind, pa.JsonType):
        return _unless_none(orjson.loads)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _decoder(pa, kind.value_type)
        return _unless_none(lambda values: [inner(value) for value in values])
    if types.is_struct(kind):
        fields = {field.name: _decoder(pa, field.type) for field in kind}
        return _unless_none(lambda row: _unpadded(row, fields))
    return lambda value: value


def _unless_none(decode: Decode) -> Decode:
    return lambda value: None if value is None else decode(value)


def _unpadded(row: Mapping[str, Any], fields: Mapping[str, Decode]) -> dict[str, Any]:
    values = {name: fields[name](value) for name, value in row.items()}
    kept = "content" if "role" in fields else None
    return {name: value for name, value in values.items() if value is not None or name == kept}


def _schema(pa: Any, columns: Mapping[str, Any], json: Any) -> Any:
    """Make the schema of a table; JSON is of the type ``json``."""
    kinds = {"text": pa.string(), "flag": pa.bool_(), "json": json}

    def kind(column: Any) -> Any:
        if isinstance(column, str):
            return kinds[column]
        if isinstance(column, list):
            return pa.list_(kind(column[0]))
        return pa.struct([(name, kind(inner)) for name, inner in column.items()])

    return pa.schema([(name, kind(column)) for name, column in columns.items()])


def _encode(value: Any, column: Any) -> Any:
    if value is None or column in ("text", "flag"):
        return value
    if column == "json":
        return orjson.dumps(value, default=plain).decode()
    if isinstance(column, list):
        return [_encode(item, column[0]) for item in value]
    return {name: _encode(value.get(name), inner) for name, inner in column.items()}


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(orjson.dumps(row))
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
