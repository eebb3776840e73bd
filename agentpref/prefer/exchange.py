"""Preference data in files: TRL's JSONL formats in, and out again.

An import makes of each line two runs and a comparison, or one run and a thumb, under ids that come
from their content: a file that is imported twice adds nothing the second time. It streams, with one
transaction for every :data:`BATCH_LINES` lines, so that memory is bounded and a bad line undoes its
own batch alone. An export writes a file whole or not at all.

Knows nothing of what a row looks like (that is ``rows.py``), nor of which rows make pairs.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
import sqlite3
import time
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

import orjson

from agentpref.errors import ExchangeError
from agentpref.prefer.rows import (
    Format,
    PreferenceRow,
    Row,
    UnpairedRow,
    preference_row,
    read_row,
    unpaired_row,
)
from agentpref.record.database import connect, transaction, translated
from agentpref.record.home import Home, StrPath
from agentpref.record.ids import new_id
from agentpref.record.messages import MAX_MESSAGE_BYTES, child_id, plain
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Message, Pair, Run, Source, Thumb

BATCH_LINES = 1000
"""Lines that are imported in one transaction."""

MAX_LINE_BYTES = 4 * MAX_MESSAGE_BYTES
"""The longest line that is read: a prompt and two answers of the largest size fit."""

Outcome = Literal["added", "known", "bad"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Imported:
    """How far an import is, or how it ended.

    ``added`` and ``known`` count lines that were new and that the home had already; ``bad`` counts
    those that were skipped. ``bytes_read`` and ``bytes_total`` measure the file.
    """

    added: int
    known: int
    bad: int
    bytes_read: int
    bytes_total: int


def import_file(
    home: Home,
    path: StrPath,
    *,
    namespace: str = "default",
    format: Format | None = None,
    tag: str | None = None,
    source: Source = "human",
    user_id: str | None = None,
    skip_bad: bool = False,
    on_progress: Callable[[Imported], None] | None = None,
) -> Imported:
    """Read a JSONL file of preferences, paired or not, into a home.

    Args:
        home: the home to write to.
        path: a file in TRL's preference or unpaired-preference format, in text or in messages.
        namespace: where the runs are filed.
        format: ``"preference"`` or ``"unpaired"``; by default the keys of each line tell.
        tag: the domain tag of every row; by default a row's own ``tag`` column.
        source: who judged: ``"human"``, ``"model"`` or ``"code"``.
        user_id: the person or the judge, where it was one.
        skip_bad: count lines that cannot be read, rather than stop at the first.
        on_progress: called after every batch.

    Raises:
        ExchangeError: an argument is unknown, the file cannot be read or holds no row, or a line is
            not what its format promises; the message names file, line and cure.
    """
    _require_one_of("format", format, (None, *get_args(Format)))
    _require_one_of("source", source, get_args(Source))
    filing = _Filing(namespace, tag, source, user_id, time.time(), Path(path).name)
    counts: Counter[Outcome] = Counter()
    with closing(connect(home)) as connection, translated(home), _open(path) as file:
        for batch in _batches(_rows(file, path, format, skip_bad)):
            with transaction(connection):
                counts.update(_add(row, filing, number, connection) for number, row in batch)
            if on_progress is not None:
                on_progress(_progress(counts, file))
        if not counts:
            raise ExchangeError(
                f"{path} holds no rows; name a file with a JSON object on each line"
            )
        return _progress(counts, file)


def export_pairs(pairs: Iterable[Pair], target: StrPath | IO[bytes]) -> int:
    """Write pairs as TRL's conversational preference format, and return how many there were.

    A path is replaced in one step when all is written; a binary stream is written to as it is.

    Raises:
        ExchangeError: the file cannot be written; what was there before is unchanged.
    """
    return _write(map(preference_row, pairs), target)


def export_thumbs(thumbs: Iterable[Thumb], target: StrPath | IO[bytes]) -> int:
    """Write thumbs as TRL's conversational unpaired-preference format; see :func:`export_pairs`."""
    return _write(map(unpaired_row, thumbs), target)


@dataclass(frozen=True, slots=True)
class _Filing:
    """What all rows of one import have in common."""

    namespace: str
    tag: str | None
    source: Source
    user_id: str | None
    started_at: float
    file_name: str


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ExchangeError(f"{name} is {value!r}; pass one of {', '.join(map(repr, allowed))}")


def _progress(counts: Counter[Outcome], file: IO[bytes]) -> Imported:
    size = os.fstat(file.fileno()).st_size
    return Imported(counts["added"], counts["known"], counts["bad"], file.tell(), size)


def _open(path: StrPath) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ExchangeError(
            f"{path} cannot be read ({error.strerror}); name a JSONL file that this user may read"
        ) from error


def _batches(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Part items into lazy batches; each must be used up before the next is asked for."""
    rest = iter(items)
    for first in rest:
        yield chain([first], islice(rest, BATCH_LINES - 1))


def _rows(
    file: IO[bytes], path: StrPath, format: Format | None, skip_bad: bool
) -> Iterator[tuple[int, Row | None]]:
    """Yield each line's number and its row: ``None`` for a bad line that is skipped."""
    for number, line in _lines(file):
        try:
            row = read_row(_parse(line), format)
        except ExchangeError as error:
            if not skip_bad:
                raise ExchangeError(f"{path}, line {number}: {error}") from error
            row = None
        yield number, row


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers; cut off what is too long."""
    for number in count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        line = line.removeprefix(BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ExchangeError(
            f"the line is longer than {MAX_LINE_BYTES:,} bytes; check that the file has one row on "
            "each line, or cut the row's texts"
        )
    try:
        row = orjson.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ExchangeError(
            f"byte {error.start} is not UTF-8 ({line[error.start]:#04x}); convert the file, for "
            "example with `iconv -f LATIN1 -t UTF-8`"
        ) from error
    except orjson.JSONDecodeError as error:
        raise ExchangeError(
            f"it is no JSON ({error}); write one JSON object on each line"
        ) from error
    if not isinstance(row, dict):
        raise ExchangeError(
            f"it is {reprlib.repr(row)}, no JSON object; write one object on each line (a .json "
            "file that holds one list must be made JSONL first)"
        )
    return row


def _add(row: Row | None, filing: _Filing, number: int, connection: sqlite3.Connection) -> Outcome:
    """Write one row; its time is the import's plus its place, so that later lines are newer."""
    if row is None:
        return "bad"
    at = filing.started_at + number * 1e-6
    before = connection.total_changes
    if isinstance(row, PreferenceRow):
        _add_preference(row, filing, at, Store(connection))
    else:
        _add_thumb(row, filing, at, Store(connection))
    return "added" if connection.total_changes > before else "known"


def _add_preference(row: PreferenceRow, filing: _Filing, at: float, store: Store) -> None:
    runs = [_run(row, answer, filing, at) for answer in (row.chosen, row.rejected)]
    for run in runs:
        store.add_run(run)
    ids = [run.run_id for run in runs]
    comparison = Comparison(
        comparison_id=_content_id("comparison", *ids, filing.source, filing.user_id),
        created_at=at,
        run_a=ids[0],
        run_b=ids[1],
        winner="a",
        source=filing.source,
        user_id=filing.user_id,
    )
    store.add_comparison(comparison)


def _add_thumb(row: UnpairedRow, filing: _Filing, at: float, store: Store) -> None:
    run = _run(row, row.completion, filing, at)
    store.add_run(run)
    verdict = (run.run_id, row.desirable, filing.source, filing.user_id)
    thumb = Feedback(
        feedback_id=_content_id("thumb", *verdict),
        run_id=run.run_id,
        created_at=at,
        key="thumbs",
        score=float(row.desirable),
        source=filing.source,
        user_id=filing.user_id,
    )
    store.add_feedback(thumb)


def _run(row: Row, answer: Message, filing: _Filing, at: float) -> Run:
    tag = filing.tag or row.tag
    return Run(
        run_id=_content_id("run", filing.namespace, child_id(row.prompt.id, answer)),
        namespace=filing.namespace,
        created_at=at,
        prompt=row.prompt,
        output=answer,
        tags=(tag,) if tag else (),
        metadata={"imported_from": filing.file_name},
    )


def _content_id(*parts: object) -> str:
    """Name a row by what it says, so that the same line is the same row."""
    return "import-" + hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()


def _write(rows: Iterable[dict[str, Any]], target: StrPath | IO[bytes]) -> int:
    lines = (orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    if isinstance(target, (str, os.PathLike)):
        with _replacing(Path(target)) as file:
            return _write_lines(lines, file)
    return _write_lines(lines, target)


def _write_lines(lines: Iterable[bytes], file: IO[bytes]) -> int:
    written = 0
    for line in lines:
        file.write(line)
        written += 1
    return written


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write beside a file and take its place when all is on the disk, or leave no trace."""
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
