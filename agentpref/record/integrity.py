"""Integrity checks of a home.

A check hashes the messages and the seals again, tests the columns of runs and judgements, follows
every reference and reads the spill. It reports what agentpref would not have written, and repairs
nothing. A full check also compares every index with its table, every table with its sum, every
score with its checksum, and the schema with that of this version. A sample takes the same time for
a home of any size, and compares no sums: it finds no rows that are gone at the end of a table.
"""

from __future__ import annotations

import codecs
import random
import sqlite3
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from agentpref.home import Home, reading
from agentpref.record.ingest.checks import message_fault, row_fault
from agentpref.record.invariants import INVARIANTS, KEYS, SAMPLED, WHOLE
from agentpref.record.messages import COMPARISON_COLUMNS, FEEDBACK_COLUMNS, RUN_COLUMNS
from agentpref.record.migrations import STEPS
from agentpref.record.seals import SEALED, last_seals, links, removed_faults
from agentpref.record.spill import is_whole
from agentpref.record.steps import MIGRATION
from agentpref.record.store import Store
from agentpref.record.sums import CHANGED, LISTED, SUMMED, checksum, difference
from agentpref.types import Progress

_TRIES = 10
"""How many row numbers are drawn for each row of a sample: removed rows leave gaps."""

_STRIDE = 10_000  # rows between two reports of progress


class Problem(NamedTuple):
    """What is wrong with a row, which its table and key name."""

    table: str
    key: str
    what: str


class Looked(NamedTuple):
    """How many rows of a table were checked, and of how many (an estimate beside a sample)."""

    rows: int
    of: int


class Spilled(NamedTuple):
    """The records in the spill that wait for the database, and its broken lines.

    A ``torn`` line was cut off, as a crash does before the line is acknowledged, which is no fault.
    A line that is anything else but what was written is a problem.
    """

    waiting: int
    torn: int
    problems: list[Problem]


@dataclass(frozen=True, slots=True)
class Findings:
    """The problems of a home, how many rows of each table were checked, and the spill.

    ``seals`` are the last seals by table, in hex: a note of them, kept elsewhere, shows whether a
    home was changed and sealed again.
    """

    problems: list[Problem]
    looked_at: dict[str, Looked]
    waiting: int
    torn: int
    seals: dict[str, str]


def examine(
    connection: sqlite3.Connection,
    *,
    sample: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Check the home of a connection.

    Args:
        connection: of ``database.connect``; nothing is written.
        sample: how many rows of each large table to check, drawn at random; by default all rows,
            and every page of the file.
        seed: makes the sample repeatable.
        progress: called with ``(stage, done, total)``; a full check takes minutes for millions of
            rows.
    """
    tell: Progress = progress or (lambda stage, done, total: None)
    waiting, torn, problems = examine_spill(Home.of(connection))
    with _any_text(connection):
        if sample is None:
            tell("pages", 0, 1)
            # Unlike quick_check, this also looks up every row in every index.
            pages = [finding for (finding,) in connection.execute("PRAGMA integrity_check")]
            problems += [Problem("database", "", finding) for finding in pages if finding != "ok"]
            tell("pages", 1, 1)
        rows: dict[str, list[int] | None] = {}
        looked_at: dict[str, Looked] = {}
        source = random.Random(seed)
        for table in KEYS:
            if sample is None or table in WHOLE:
                (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
                rows[table], looked_at[table] = None, Looked(count, count)
            elif table in SAMPLED:
                rows[table], looked_at[table] = _drawn(connection, table, sample, source)
        done, total = 0, sum(looked_at[table].rows for table in _FAULTS)
        for table in _FAULTS:
            for key, fault in _faults(connection, table, rows[table]):
                if done % _STRIDE == 0:
                    tell("rows", done, total)
                done += 1
                if fault is not None:
                    problems.append(Problem(table, _text(key), fault))
        tell("rows", total, total)
        invariants = [invariant for invariant in INVARIANTS if invariant.table in rows]
        for done, (table, what, broken, joins) in enumerate(invariants):
            tell("references", done, len(invariants))
            where, bound = _restriction(table, rows[table])
            query = f"SELECT {KEYS[table]} FROM {table} {joins} WHERE ({broken}) AND {where}"
            found = connection.execute(query, bound)
            problems += [Problem(table, _text(key), what) for (key,) in found]
        tell("references", len(invariants), len(invariants))
        named = {(problem.table, problem.key) for problem in problems}  # said already
        for done, table in enumerate(SEALED):
            tell("seals", done, len(SEALED))
            for link in links(connection, table, rows.get(table)):
                key, fault = _text(link.key), link.fault()
                if fault is not None and (table, key) not in named:
                    problems.append(Problem(table, key, fault))
        tell("seals", len(SEALED), len(SEALED))
        if sample is None:
            problems += _of_sums(connection, {problem.table for problem in problems}, tell)
            problems += [*_of_scores(connection), *_of_schema(connection)]
        seals = last_seals(connection)
    return Findings(problems, looked_at, waiting, torn, seals)


def examine_spill(home: Home) -> Spilled:
    """Check the spill of a home; raises ``NotKept`` if it cannot be read."""
    waiting = torn = 0
    problems = []
    with suppress(FileNotFoundError), reading(home.spill) as lines:
        for number, line in enumerate(lines, start=1):
            if is_whole(line):
                waiting += 1
            elif not line.endswith(b"\n") or _is_cut_off(line.rstrip(b"\n")):
                torn += bool(line.strip())
            else:
                problems.append(Problem("spill", f"line {number}", "it is not what was written"))
    return Spilled(waiting, torn, problems)


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is the beginning of one, to which the next record added its end of line."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(line.partition(b" ")[2])
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return not text or str(error).startswith("unexpected end of data")
    except UnicodeDecodeError:
        pass
    return False


@contextmanager
def _any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Read text that is not UTF-8 as bytes in a block; by default sqlite3 raises an error."""

    def text_or_bytes(raw: bytes) -> str | bytes:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    before, connection.text_factory = connection.text_factory, text_or_bytes
    try:
        yield
    finally:
        connection.text_factory = before


def _drawn(
    connection: sqlite3.Connection, table: str, size: int, source: random.Random
) -> tuple[list[int], Looked]:
    """Draw row numbers until enough of them exist: each row is as likely as any other."""
    first, last = connection.execute(
        f"SELECT (SELECT min(rowid) FROM {table}), (SELECT max(rowid) FROM {table})"
    ).fetchone()
    if first is None:
        return [], Looked(0, 0)
    span = last - first + 1
    numbers = source.sample(range(first, last + 1), min(span, size * _TRIES))
    found: list[int] = []
    tried = 0
    while len(found) < size and tried < len(numbers):
        some = numbers[tried : tried + size]
        tried += len(some)
        where, bound = _restriction(table, some)
        query = f"SELECT rowid FROM {table} WHERE {where}"
        there = {number for (number,) in connection.execute(query, bound)}
        found += [number for number in some if number in there]
    return found[:size], Looked(min(len(found), size), round(span * len(found) / tried))


def _restriction(table: str, rows: list[int] | None) -> tuple[str, tuple[str, ...]]:
    if rows is None:
        return "true", ()
    return f"{table}.rowid IN (SELECT value FROM json_each(?))", (orjson.dumps(rows).decode(),)


def _text(key: object) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else str(key)


def _of_sums(
    connection: sqlite3.Connection, named: Container[str], tell: Progress
) -> Iterator[Problem]:
    """Compare tables with their sums; a change is not said again of a table with a named row."""
    for done, (name, summed) in enumerate(SUMMED.items()):
        tell("sums", done, len(SUMMED))
        with Store(connection).one_state():  # others may be writing
            what = difference(connection, name)
        if what is not None and (what != CHANGED or summed.table not in named):
            marks = "its marks of taint, quarantine and pruning: " if name == "standing" else ""
            cure = "; the next update makes the list of examples anew" if name in LISTED else ""
            yield Problem(summed.table, "", f"{marks}{what}{cure}")
    if what := removed_faults(connection, "run"):
        yield Problem("run", "", what)
    tell("sums", len(SUMMED), len(SUMMED))


def _of_scores(connection: sqlite3.Connection) -> Iterator[Problem]:
    """Find scores that were changed; those that are gone only cost the time to compute them."""
    for *values, kept in connection.execute("SELECT policy, row, logp, tokens, checksum FROM logp"):
        if kept != checksum(values):
            what = "its score is not what was computed; the next update computes it anew"
            yield Problem("logp", _text(values[1]), what)


def _of_schema(connection: sqlite3.Connection) -> Iterator[Problem]:
    """Compare the list of steps, and what they make, with what this version applies."""
    applied = dict(connection.execute("SELECT version, name FROM migration"))
    for version in range(1, max(len(STEPS), len(applied)) + 1):
        is_known = version <= len(STEPS)
        if version not in applied or (is_known and applied[version] != STEPS[version - 1].name):
            yield Problem("migration", str(version), "it is not the step that was applied")
    if len(applied) > len(STEPS):
        return  # a newer agentpref may have changed what is compared below
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    breaking = max(step.version for step in STEPS if step.breaking)
    if found != breaking:
        what = f"the version that programs must know is {found}, not {breaking}"
        yield Problem("migration", "user_version", what)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as new:
        new.execute(MIGRATION)
        for step in STEPS:
            step.change(new)
        expected = dict(new.execute(_DEFINITIONS))
    there = dict(connection.execute(_DEFINITIONS))
    for name, definition in expected.items():
        if there.get(name) != definition:
            yield Problem("database", name, "it is missing, or not defined as agentpref defines it")


_DEFINITIONS = "SELECT type || ' ' || name, sql FROM sqlite_master"

_FAULTS = {
    "message": ("id", "parent", "iif(typeof(body) = 'text', CAST(body AS BLOB), NULL)"),
    "run": RUN_COLUMNS,
    "feedback": FEEDBACK_COLUMNS,
    "comparison": COMPARISON_COLUMNS,
}
"""The tables whose rows are checked by themselves, and the columns that are checked."""


def _faults(
    connection: sqlite3.Connection, table: str, rows: list[int] | None
) -> Iterator[tuple[object, str | None]]:
    """Yield for each row its key, and what is wrong with its columns."""
    columns = _FAULTS[table]
    where, bound = _restriction(table, rows)
    query = f"SELECT {KEYS[table]}, {', '.join(columns)} FROM {table} WHERE {where}"
    for key, *values in connection.execute(query, bound):
        if table == "message":
            yield key, message_fault(*values)
        else:
            yield key, row_fault(dict(zip(columns, values, strict=True)))
