"""Import and export of files: preference data, and what other products logged.

A row becomes runs and what was said of them: two answers make two runs and a comparison, a single
answer makes a run and a thumb. Their ids are hashes of their content, so that a row adds nothing
the second time, whichever file and format it comes in. A known row keeps its first tag. Runs and
scores of other products keep their own times, threads and authors; ``intake.py`` adds them.

An import streams: it commits every :data:`~agentpref.prefer.rowfiles.BATCH_ROWS` rows, so that
memory is bounded and a bad row undoes only its own batch. An export writes the whole file or
nothing. ``formats/`` defines the rows, ``rowreader.py`` detects them, and ``rowfiles.py`` reads the
files that hold them.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import IO, Any, NamedTuple

from agentpref import plugins
from agentpref.errors import AgentprefError, ConfigError, ExchangeError, RedactionFailed
from agentpref.home import Home, StrPath
from agentpref.prefer.examples import ExampleSet, build_examples
from agentpref.prefer.formats import Format, PreferenceRecord
from agentpref.prefer.intake import Intake, LoggedRows, add_logged, content_id
from agentpref.prefer.jsonrows import Found, Meter, Parsed
from agentpref.prefer.logged import LogFormat
from agentpref.prefer.rowfiles import batches, name_of, read_rows, write_rows
from agentpref.prefer.rowreader import LoggedRow, RowReader
from agentpref.record.database import connect, transaction, translated
from agentpref.record.ingest.redaction import Redact
from agentpref.record.keys import registered
from agentpref.record.messages import Linker, RunRow, canonical, run_row
from agentpref.record.scales import UNIT
from agentpref.record.store import Store
from agentpref.types import SOURCES, Comparison, Example, Feedback, Run, Source

_BAD_ROWS_NAMED = 10


@dataclass(frozen=True, slots=True)
class Imported:
    """How far an import is, or how it ended.

    ``added`` and ``known`` count the rows that were new and those that the home had; ``bad`` counts
    the rows that were skipped. ``bytes_read`` and ``bytes_total`` measure the file (0: not known).
    ``ignored`` names the columns that the format of a row does not read, and counts the rows with
    something in them; ``input.user`` is one inside another. ``left_out`` counts the rows of a log
    that are neither a run nor a score of one, by what they are. A row is a line or an item, or, of
    a log, what it holds one of: a span, an observation, a score.
    """

    added: int
    known: int
    bad: int
    bytes_read: int
    bytes_total: int
    ignored: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    why_bad: tuple[str, ...] = ()
    """Places and faults of the first bad rows."""


@dataclass(frozen=True, slots=True)
class Exported:
    """How many rows were written, and how many examples the format could not hold."""

    rows: int
    bad: int = 0


@dataclass(frozen=True, slots=True)
class ImportContext:
    """What all rows of one import share. ``user_id`` is a pseudonym already."""

    namespace: str
    tag: str | None
    source: Source
    user_id: str | None
    started_at: float
    file_name: str


class RecordedRow(NamedTuple):
    """What one row adds to the home: its runs, and the judgements on them. A bad row adds none."""

    runs: Sequence[RunRow] = ()
    judgements: Sequence[Comparison | Feedback] = ()


def import_file(
    home: Home,
    path: StrPath | IO[bytes],
    *,
    namespace: str = "default",
    format: str | None = None,
    tag: str | None = None,
    source: Source | None = None,
    user_id: str | None = None,
    redact: Redact | None = None,
    skip_bad: bool = False,
    on_progress: Callable[[Imported], None] | None = None,
) -> Imported:
    """Read a file of preference data, or of the runs and scores of another product, into a home.

    Args:
        home: the home to write to.
        path: JSON lines, one JSON list or CSV, perhaps packed by gzip, or Parquet; also a stream of
            bytes, such as ``sys.stdin.buffer``.
        namespace: the namespace of the runs.
        format: the registered format of all rows; by default the keys of each row tell.
        tag: the domain tag of all rows; by default each row's own.
        source: who judged: ``"human"``, ``"model"`` or ``"code"``; by default what each row says,
            else ``"human"``.
        user_id: the person or the judge, by default whom each row names; stored as a keyed hash.
        redact: takes each text before it is stored, and returns the text to store.
        skip_bad: count bad rows and continue; by default the first one ends the import.
        on_progress: called after every batch.

    Raises:
        ConfigError: no format is registered under that name.
        ExchangeError: an argument is invalid, the file cannot be read to its end or has no row, or
            a row is not what its format requires; the message names file, line and cure.
        RedactionFailed: ``redact`` raised, or returned something other than text.
        MissingDependency: the file is Parquet, and pyarrow is not installed.
    """
    reader = RowReader(format)
    if source is not None and source not in SOURCES:
        known = ", ".join(map(repr, SOURCES))
        raise ExchangeError(f"source is {source!r}; pass one of {known}")
    for name, text in (("namespace", namespace), ("tag", tag)):
        if text is not None and not (text and text.isprintable()):
            raise ExchangeError(f"{name} is {text!r}; pass printable text")
    meter, counts, name = Meter(), Counter[str](), name_of(path)
    left_out = Counter[str]()
    why_bad: list[str] = []

    def so_far() -> Imported:
        ignored = dict(sorted((meter.unread + reader.ignored).items()))
        rows = (counts["added"], counts["known"], counts["bad"])
        left = dict(sorted(left_out.items()))
        return Imported(*rows, meter.read, meter.total, ignored, left, tuple(why_bad))

    def refuse(place: str, error: AgentprefError) -> None:
        if not skip_bad or isinstance(error, RedactionFailed):
            kind = RedactionFailed if isinstance(error, RedactionFailed) else ExchangeError
            raise kind(f"{name}, {place}: {error}") from error
        if len(why_bad) < _BAD_ROWS_NAMED:
            why_bad.append(f"{place}: {error}")

    def recorded_rows(
        found: Iterable[Found], context: ImportContext, intake: Intake
    ) -> Iterator[RecordedRow | LoggedRows]:
        for number, (place, record) in enumerate(_records(reader, found), start=1):
            row: RecordedRow | LoggedRows = RecordedRow()
            try:
                if isinstance(record, ExchangeError):
                    raise record
                if isinstance(record, PreferenceRecord):
                    record = record if redact is None else record.redacted(redact)
                    row = recorded_row(record, context, number)
                else:
                    row = intake.rows(place, *record)
            except (ExchangeError, RedactionFailed) as error:
                refuse(place, error)
            yield row

    def size(row: RecordedRow | LoggedRows) -> int:
        return sum(len(node.body) for run in row.runs for node in run.nodes)

    def add(batch: Sequence[RecordedRow | LoggedRows], connection: sqlite3.Connection) -> None:
        counts.update(_add([row for row in batch if isinstance(row, RecordedRow)], connection))
        logged = [row for row in batch if isinstance(row, LoggedRows)]
        for became, row, error in add_logged(logged, connection, namespace):
            if error is not None:
                refuse(row.place, error)
            counts[became] += 1
            left_out.update(row.left_out)

    with (
        closing(connect(home)) as connection,
        translated(home),
        closing(read_rows(path, reader.keys, meter)) as found,
    ):
        # Ids are hashes, so a batch touches pages all over the indices. With 64 MB of pages in
        # memory, and in the write-ahead log, a large import takes 40 % less time.
        connection.execute("PRAGMA cache_size = -65536")
        connection.execute("PRAGMA wal_autocheckpoint = 8000")
        names = functools.cache(lambda: registered(connection))  # made where a row names a user
        pseudonym = None if user_id is None else names().name(user_id)
        file_name = os.fsencode(Path(name).name).decode(errors="replace")  # may be any bytes
        by = source or "human"
        context = ImportContext(namespace, tag, by, pseudonym, time.time(), file_name)
        intake = Intake(namespace, tag, source, user_id, names, redact, file_name, Linker())
        for batch in batches(recorded_rows(found, context, intake), size):
            with transaction(connection):
                add(batch, connection)
            if on_progress is not None:
                on_progress(so_far())
    if not counts:
        raise ExchangeError(f"{name} holds no rows; name a file with a JSON object on each line")
    return so_far()


def file_examples(
    path: StrPath | IO[bytes], *, namespace: str = "default", format: str | None = None
) -> ExampleSet:
    """Build the examples that a file of preference data would make, and import nothing.

    It reads what :func:`import_file` reads. Rows about one prompt settle as they would in a home:
    the newer one wins, opposed thumbs make a pair. All examples are held out, and are in memory.

    Raises:
        ConfigError: no format is registered under that name.
        ExchangeError: the file cannot be read to its end or has no row, or a row is not what its
            format requires; the message names file, line and cure.
        MissingDependency: the file is Parquet, and pyarrow is not installed.
    """
    reader, meter, name = RowReader(format), Meter(), name_of(path)
    context = ImportContext(namespace, None, "human", None, time.time(), Path(name).name)
    runs: dict[str, Run] = {}
    feedback: list[Feedback] = []
    comparisons: list[Comparison] = []
    with closing(read_rows(path, reader.keys, meter)) as found:
        for number, (place, fields) in enumerate(found, start=1):
            try:
                record = _record(reader, fields)
                row = recorded_row(record, context, number)
            except ExchangeError as error:
                raise ExchangeError(f"{name}, {place}: {error}") from error
            tag, prompt = record.tag, record.prompt
            for made, message in zip(row.runs, record.completions, strict=True):
                asked = replace(prompt, id=made.prompt)
                params = {"chat_template_kwargs": prompt.chat_template_kwargs}
                run = Run(made.run_id, namespace, made.created_at, asked, message, params=params,
                          tags=(tag,) if tag else ())  # fmt: skip
                runs.setdefault(run.run_id, run)
            for judgement in row.judgements:
                if isinstance(judgement, Comparison):
                    comparisons.append(judgement)
                else:
                    feedback.append(judgement)
    if not runs:
        raise ExchangeError(f"{name} holds no rows; name a file with a JSON object on each line")
    return build_examples(runs.values(), feedback, comparisons, held_out=1.0)


def _records(
    reader: RowReader, found: Iterable[Found]
) -> Iterator[tuple[str, PreferenceRecord | LoggedRow | ExchangeError]]:
    """Read the rows of a file, each with its place."""
    for place, fields in found:
        if isinstance(fields, ExchangeError):
            yield place, fields
            continue
        for inside, record in reader.records(fields):
            yield f"{place}, {inside}" if inside else place, record


def _record(reader: RowReader, fields: Parsed) -> PreferenceRecord:
    """Read the fields of a row, unless they could not be read as such."""
    if isinstance(fields, ExchangeError):
        raise fields
    return reader.read(fields)


def export_file(
    examples: Iterable[Example],
    target: StrPath | IO[bytes],
    *,
    format: str = "preference",
    skip_bad: bool = False,
) -> Exported:
    """Write examples to a file, from which an import makes the same examples again.

    A path is replaced in one step when everything is written, and becomes Parquet if it ends in
    ``.parquet``. All else, and a binary stream, is JSON lines, which gzip packs if the path ends in
    ``.gz``. With ``skip_bad``, examples that the
    format cannot hold are counted; by default the first one ends the export.

    Raises:
        ConfigError: no format is registered under that name.
        ExchangeError: the format cannot hold an example, which is named, or the file cannot be
            written; the old file is unchanged.
        MissingDependency: Parquet is wanted, and pyarrow is not installed.
    """
    chosen: Format = writable(format)
    bad = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal bad
        for number, example in enumerate(examples, start=1):
            record = record_of(example)
            try:
                yield chosen.write(record)
            except ExchangeError as error:
                if not skip_bad:
                    where = f"row {number} (example {example.example_id})"
                    raise ExchangeError(f"{where}: {error}") from error
                bad += 1

    written = write_rows(rows(), chosen.columns, target)
    return Exported(written, bad)


def writable(format: str) -> Format:
    """Load the format of an export.

    Raises:
        ConfigError: no format is registered under that name, or it is only read.
    """
    chosen: Format | LogFormat = plugins.load(plugins.FORMATS, format)
    if isinstance(chosen, LogFormat):
        raise ConfigError(
            f"format is {format!r}, which is only read; export as 'preference', or name another "
            "format of preference data"
        )
    return chosen


def record_of(example: Example) -> PreferenceRecord:
    """Take the part of an example that formats hold."""
    return PreferenceRecord(
        example.prompt,
        tuple(completion.message for completion in example.completions),
        tuple(completion.label or 0 for completion in example.completions),
        example.tag,
    )


def recorded_row(record: PreferenceRecord, context: ImportContext, number: int) -> RecordedRow:
    """Make the runs and judgements of a record.

    A single completion makes a thumb. Of several, each two whose labels differ make a comparison.
    The time is the start of the import plus ``number`` microseconds: later rows are newer.
    """
    at = context.started_at + number * 1e-6
    tag = context.tag or record.tag
    linker = Linker()
    nodes = linker.chain(record.prompt.messages, record.prompt.tools)
    prompt_id = nodes[-1].id
    runs: list[RunRow] = []
    arguments = record.prompt.chat_template_kwargs
    params = {"chat_template_kwargs": arguments} if arguments else {}
    asked = [canonical(params).decode()] if params else []
    for message in record.completions:
        node = linker.answer(prompt_id, message)
        run = Run(
            run_id=content_id("run", context.namespace, node.id, *asked),
            namespace=context.namespace,
            created_at=at,
            prompt=record.prompt,
            output=message,
            params=params,
            tags=(tag,) if tag else (),
            metadata={"imported_from": context.file_name},
        )
        runs.append(run_row(run, (*nodes, node)))
        nodes = []  # the first run brings the prompt for all
    by = context.source, context.user_id
    if len(runs) == 1:
        run_id, liked = runs[0].run_id, record.labels[0] > 0
        thumb_id = content_id("thumb", run_id, liked, *by)
        thumb = Feedback(thumb_id, run_id, at, "thumbs", float(liked), None, None, *by, scale=UNIT)
        return RecordedRow(runs, [thumb])
    judged = zip(record.labels, (run.run_id for run in runs), strict=True)
    comparisons = [
        Comparison(content_id("comparison", better, worse, *by), at, better, worse, "a", *by)
        for (high, better), (low, worse) in permutations(judged, 2)
        if high > low
    ]
    return RecordedRow(runs, comparisons)


def _add(batch: Sequence[RecordedRow], connection: sqlite3.Connection) -> Iterator[str]:
    """Write a batch. A row is known if the home has its judgements, which name its runs."""
    store = Store(connection)
    for refusal in store.add_runs([run for row in batch for run in row.runs]):
        if refusal is not None:
            raise refusal
    for row in batch:
        before = connection.total_changes
        for judgement in row.judgements:
            if isinstance(judgement, Comparison):
                store.add_comparison(judgement)
            else:
                store.add_feedback(judgement)
        changed = connection.total_changes > before
        yield "added" if changed else "known" if row.runs else "bad"
