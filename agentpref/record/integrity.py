"""What the record can convict itself of.

Hashes messages again, asks whether the invariants hold, and reads the spill: all of it, or a random
sample in a time that does not depend on how much there is. Reports what does not hold and repairs
nothing: preferences are evidence, and evidence is not edited.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from agentpref.home import Home
from agentpref.record.invariants import INVARIANTS, KEYS, SAMPLED, WHOLE, Invariant
from agentpref.record.messages import kept, node_id
from agentpref.record.spill import is_whole
from agentpref.types import Progress

_TRIES = 10
"""Row numbers drawn for each row of a sample at most: those of removed rows lead nowhere."""

_STRIDE = 10_000
"""Messages hashed between two reports of progress."""


class Problem(NamedTuple):
    """One thing that does not hold: the table and key of the row, and what is wrong with it."""

    table: str
    key: str
    what: str


class Looked(NamedTuple):
    """How many rows of a table were looked at, and of how many: beside a sample, an estimate."""

    rows: int
    of: int


class Spilled(NamedTuple):
    """What is in the spill: entries that wait for the database, and lines that are none.

    A line is ``torn`` where a crash cut it off, before it was acknowledged: no fault. One that was
    written to its end and is not what was written is a problem.
    """

    waiting: int
    torn: int
    problems: list[Problem]


@dataclass(frozen=True, slots=True)
class Findings:
    """What does not hold, how many rows of each table were looked at, and what is in the spill."""

    problems: list[Problem]
    looked_at: dict[str, Looked]
    waiting: int
    torn: int


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
        sample: how many rows of each large table to look at, drawn evenly at random; by default all
            rows are looked at, and every page of the file.
        seed: makes the sample repeatable.
        progress: told of a full check, which takes minutes where there are millions of rows.
    """
    spilled = examine_spill(Home.of(connection))
    if sample is None:
        problems, looked_at = _all(connection, progress or _tell_nobody)
    else:
        problems, looked_at = _some(connection, sample, random.Random(seed))
    return Findings([*problems, *spilled.problems], looked_at, spilled.waiting, spilled.torn)


def examine_spill(home: Home) -> Spilled:
    """Read what waits in the spill of a home."""
    waiting = torn = 0
    problems = []
    for number, line in enumerate(_lines(home), start=1):
        if is_whole(line):
            waiting += 1
        elif line.endswith(b"\n") and _is_json(line.partition(b" ")[2]):
            problems.append(Problem("spill", f"line {number}", "it is not what was written"))
        elif line.strip():
            torn += 1
    return Spilled(waiting, torn, problems)


def _all(connection: sqlite3.Connection, tell: Progress) -> tuple[list[Problem], dict[str, Looked]]:
    tell("pages", 0, 1)
    pages = [finding for (finding,) in connection.execute("PRAGMA quick_check")]
    problems = [Problem("database", "", finding) for finding in pages if finding != "ok"]
    tell("pages", 1, 1)
    looked_at = {table: _counted(connection, table) for table in KEYS}
    for done, problem in enumerate(_spoilt(connection)):
        if done % _STRIDE == 0:
            tell("messages", done, looked_at["message"].of)
        problems += problem
    tell("messages", looked_at["message"].of, looked_at["message"].of)
    for done, invariant in enumerate(INVARIANTS):
        tell("references", done, len(INVARIANTS))
        problems += _broken(connection, invariant)
    tell("references", len(INVARIANTS), len(INVARIANTS))
    return problems, looked_at


def _some(
    connection: sqlite3.Connection, size: int, source: random.Random
) -> tuple[list[Problem], dict[str, Looked]]:
    looked_at = {table: _counted(connection, table) for table in WHOLE}
    rows: dict[str, list[int] | None] = dict.fromkeys(WHOLE)
    for table in SAMPLED:
        rows[table], looked_at[table] = _drawn(connection, table, size, source)
    problems = [one for problem in _spoilt(connection, rows["message"]) for one in problem]
    for invariant in INVARIANTS:
        if invariant.table in rows:
            problems += _broken(connection, invariant, rows[invariant.table])
    return problems, {table: looked_at[table] for table in KEYS if table in looked_at}


def _drawn(
    connection: sqlite3.Connection, table: str, size: int, source: random.Random
) -> tuple[list[int], Looked]:
    """Draw row numbers until enough of them are of a row: each row is as likely as any other."""
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
        query = f"SELECT rowid FROM {table} WHERE {_among(table)}"
        there = {number for (number,) in connection.execute(query, (_json(some),))}
        found += [number for number in some if number in there]
    return found[:size], Looked(min(len(found), size), round(span * len(found) / tried))


def _counted(connection: sqlite3.Connection, table: str) -> Looked:
    (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return Looked(count, count)


def _spoilt(
    connection: sqlite3.Connection, rows: list[int] | None = None
) -> Iterator[list[Problem]]:
    """Say of each message what is wrong with its text. Read as bytes: it may be no UTF-8 now."""
    parts = (f"CAST({name} AS BLOB)" for name in ("id", "parent", "body"))
    where, bound = _restriction("message", rows)
    for key, parent, body in connection.execute(
        f"SELECT {', '.join(parts)} FROM message WHERE {where}", bound
    ):
        if _is_as_recorded(_text(key), None if parent is None else _text(parent), body):
            yield []
        else:
            yield [Problem("message", _text(key), "its text is not what was recorded")]


def _broken(
    connection: sqlite3.Connection, invariant: Invariant, rows: list[int] | None = None
) -> Iterator[Problem]:
    table, what, broken, joins = invariant
    where, bound = _restriction(table, rows)
    query = f"SELECT CAST({KEYS[table]} AS BLOB) FROM {table} {joins} WHERE ({broken}) AND {where}"
    for (key,) in connection.execute(query, bound):
        yield Problem(table, _text(key), what)


def _restriction(table: str, rows: list[int] | None) -> tuple[str, tuple[str, ...]]:
    return ("true", ()) if rows is None else (_among(table), (_json(rows),))


def _among(table: str) -> str:
    return f"{table}.rowid IN (SELECT value FROM json_each(?))"


def _json(rows: list[int]) -> str:
    return orjson.dumps(rows).decode()


def _text(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def _lines(home: Home) -> Iterator[bytes]:
    try:
        file = home.spill.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from file


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_as_recorded(key: str, parent: str | None, text: bytes) -> bool:
    try:
        reread(key, parent, text)
    except ValueError:
        return False
    return True


def reread(key: str, parent: str | None, text: bytes) -> Any:
    """Read the body of a message, hash it again by what it says, and compare how it is written.

    No id knows the order of keys. All else of the text has one form; were it free, a key that
    somebody wrote in beside its namesake would be read by one parser and hashed by another.

    Raises:
        ValueError: it is not what the id stands for.
    """
    try:
        body = orjson.loads(text)
        if kept(body) == text and node_id(parent, body) == key:
            return body
    except (orjson.JSONDecodeError, TypeError):  # no JSON, or nested too deep to write again
        pass
    raise ValueError("its text is not what was recorded")


def _tell_nobody(stage: str, done: int, total: int) -> None:
    pass
