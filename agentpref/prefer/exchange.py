"""Preference data in files, in and out.

An import makes of each row two runs and a comparison, or one run and a thumb, under ids that come
from their content: a file that is imported twice adds nothing the second time. What a row says
decides, not how it is filed: one that is known keeps the tag that it first came with. It streams,
with one transaction for every :data:`BATCH_ROWS` rows, so that memory is bounded and a bad row
undoes its own batch alone. An export writes a file whole or not at all.

Knows nothing of what a row looks like (that is ``formats/``), nor of how a file holds rows (that is
``files.py``), nor of which runs make pairs.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, get_args

import orjson

from agentpref.errors import ExchangeError, RedactionFailed
from agentpref.home import Home, StrPath
from agentpref.prefer import parquet
from agentpref.prefer.files import Found, Meter, read_rows, replacing
from agentpref.prefer.filing import Entry, Filing, entry_of
from agentpref.prefer.formats.table import (
    COLUMNS,
    READ_KEYS,
    Format,
    PairFormat,
    read_row,
    write_pair,
    write_thumb,
)
from agentpref.prefer.rows import Row, redacted_row
from agentpref.record.database import connect, transaction, translated
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.ingest.redaction import Redact
from agentpref.record.messages import plain
from agentpref.record.store import Store
from agentpref.types import Comparison, Pair, Source, Thumb

BATCH_ROWS = 1000
BATCH_BYTES = 16 * 1024 * 1024
"""What is imported in one transaction: so many rows, of about so many bytes at most."""

_ROOM = ("PRAGMA cache_size = -65536", "PRAGMA wal_autocheckpoint = 8000")
"""Ids that are hashes fall all over the indices: 64 MB of their pages stay in memory, and as many
in the write-ahead log. A large import takes six tenths of the time that it would take without."""

Outcome = Literal["added", "known", "bad"]


@dataclass(frozen=True, slots=True)
class Imported:
    """How far an import is, or how it ended.

    ``added`` and ``known`` count rows that were new and that the home had already; ``bad`` counts
    those that were skipped. ``bytes_read`` and ``bytes_total`` measure the file (0 for a pipe).
    """

    added: int
    known: int
    bad: int
    bytes_read: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class Exported:
    """How many rows were written, and how many the format could not hold and were skipped."""

    rows: int
    bad: int = 0


def import_file(
    home: Home,
    path: StrPath,
    *,
    namespace: str = "default",
    format: Format | None = None,
    tag: str | None = None,
    source: Source = "human",
    user_id: str | None = None,
    redact: Redact | None = None,
    skip_bad: bool = False,
    on_progress: Callable[[Imported], None] | None = None,
) -> Imported:
    """Read a file of preferences, paired or not, into a home.

    Args:
        home: the home to write to.
        path: JSON lines, one JSON list, or Parquet; each row in one of the formats of
            :mod:`agentpref.prefer.formats`.
        namespace: where the runs are filed.
        format: the format of every row; by default its keys tell.
        tag: the domain tag of every row; by default a row's own ``tag`` column.
        source: who judged: ``"human"``, ``"model"`` or ``"code"``.
        user_id: the person or the judge, where it was one; stored as a keyed hash.
        redact: given each text that is to be stored, gives the text that is.
        skip_bad: count rows that cannot be read, rather than stop at the first.
        on_progress: called after every batch.

    Raises:
        ExchangeError: an argument is unknown, the file cannot be read or holds no row, or a row is
            not what its format promises; the message names file, line and cure.
        RedactionFailed: ``redact`` raised, or gave no text.
        MissingDependency: the file is Parquet, and pyarrow is not installed.
    """
    _require_one_of("format", format, (None, *get_args(Format)))
    _require_one_of("source", source, get_args(Source))
    _require_printable(namespace=namespace, tag=tag)
    meter, counts = Meter(), Counter[Outcome]()
    with (
        closing(connect(home)) as connection,
        translated(home),
        closing(read_rows(path, READ_KEYS, meter)) as found,
    ):
        for setting in _ROOM:
            connection.execute(setting)
        user = None if user_id is None else Pseudonyms.of(home).name(user_id)
        filing = Filing(namespace, tag, source, user, time.time(), _name(path))
        rows = _checked(found, path, format, redact, skip_bad)
        entries = (None if row is None else entry_of(row, filing, n) for n, row in rows)
        for batch in _batches(entries):
            with transaction(connection):
                counts.update(_add(batch, connection))
            if on_progress is not None:
                on_progress(_progress(counts, meter))
    if not counts:
        raise ExchangeError(f"{path} holds no rows; name a file with a JSON object on each line")
    return _progress(counts, meter)


def export_pairs(
    pairs: Iterable[Pair],
    target: StrPath | IO[bytes],
    *,
    format: PairFormat = "preference",
    skip_bad: bool = False,
) -> Exported:
    """Write pairs, of which an import makes the same pairs again.

    A path is replaced in one step when all is written, with Parquet where it ends in ``.parquet``;
    a binary stream is written to as it is. All else is JSON lines.

    Raises:
        ExchangeError: the format is unknown or cannot hold a pair, which is named, or the file
            cannot be written; what was there before is unchanged.
        MissingDependency: Parquet is wanted, and pyarrow is not installed.
    """
    _require_one_of("format", format, get_args(PairFormat))
    bad: list[str] = []
    rows = _held(pairs, format, bad if skip_bad else None)
    return Exported(_write(rows, COLUMNS[format], target), len(bad))


def export_thumbs(thumbs: Iterable[Thumb], target: StrPath | IO[bytes]) -> Exported:
    """Write thumbs as TRL's unpaired format, which holds all of them; see :func:`export_pairs`."""
    return Exported(_write(map(write_thumb, thumbs), COLUMNS["unpaired"], target))


_Batch: TypeAlias = "list[Entry | None]"
"""Entries in their order; ``None`` stands for a bad row that is skipped."""


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ExchangeError(f"{name} is {value!r}; pass one of {', '.join(map(repr, allowed))}")


def _require_printable(**texts: str | None) -> None:
    for name, text in texts.items():
        if text is not None and not (text and text.isprintable()):
            raise ExchangeError(f"{name} is {text!r}; pass printable text")


def _name(path: StrPath) -> str:
    """The file's name as text that can be stored, whatever bytes it is made of."""
    return os.fsencode(Path(path).name).decode(errors="replace")


def _progress(counts: Counter[Outcome], meter: Meter) -> Imported:
    return Imported(counts["added"], counts["known"], counts["bad"], meter.read, meter.total)


def _checked(
    found: Iterable[Found],
    path: StrPath,
    format: Format | None,
    redact: Redact | None,
    skip_bad: bool,
) -> Iterator[tuple[int, Row | None]]:
    """Yield each row's number, and what it says: ``None`` for a bad one that is skipped."""
    for number, place, fields in found:
        try:
            row = _read(fields, format, redact)
        except ExchangeError as error:
            if not skip_bad:
                raise ExchangeError(f"{path}, {place}: {error}") from error
            row = None
        except RedactionFailed as error:
            raise RedactionFailed(f"{path}, {place}: {error}") from error
        yield number, row


def _read(
    fields: dict[str, Any] | ExchangeError, format: Format | None, redact: Redact | None
) -> Row:
    if isinstance(fields, ExchangeError):
        raise fields
    row = read_row(fields, format)
    return row if redact is None else redacted_row(row, redact)


def _batches(entries: Iterable[Entry | None]) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += 0 if entry is None else entry.size
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add(batch: _Batch, connection: sqlite3.Connection) -> Iterator[Outcome]:
    """Write a batch; an entry is known where its verdict is, since that names its runs."""
    store = Store(connection)
    for refusal in store.add_runs([run for entry in batch if entry for run in entry.runs]):
        if refusal is not None:
            raise refusal
    for entry in batch:
        before = connection.total_changes
        if entry is None:
            yield "bad"
            continue
        if isinstance(entry.verdict, Comparison):
            store.add_comparison(entry.verdict)
        else:
            store.add_feedback(entry.verdict)
        yield "added" if connection.total_changes > before else "known"


def _held(
    pairs: Iterable[Pair], format: PairFormat, bad: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the pairs that the format can hold."""
    for number, pair in enumerate(pairs, start=1):
        row = _row(pair, number, format, bad)
        if row is not None:
            yield row


def _row(
    pair: Pair, number: int, format: PairFormat, bad: list[str] | None
) -> dict[str, Any] | None:
    """Write a pair; one that the format cannot hold is noted where ``bad`` is a list."""
    try:
        return write_pair(pair, format)
    except ExchangeError as error:
        if bad is None:
            raise ExchangeError(f"row {number} (pair {pair.pair_id}): {error}") from error
        bad.append(pair.pair_id)
        return None


def _write(
    rows: Iterable[dict[str, Any]], columns: Mapping[str, Any], target: StrPath | IO[bytes]
) -> int:
    if not isinstance(target, (str, os.PathLike)):
        return _write_lines(rows, target)
    path = Path(target)
    with replacing(path) as file:
        if path.suffix == ".parquet":
            return parquet.write(rows, columns, file)
        return _write_lines(rows, file)


def _write_lines(rows: Iterable[dict[str, Any]], file: IO[bytes]) -> int:
    written = 0
    for row in rows:
        file.write(orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE))
        written += 1
    return written
