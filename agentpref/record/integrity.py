"""Integrity checks of a home.

A check hashes the messages and the seals again, tests the columns of runs and judgements, follows
every reference and reads the spill. It reports what agentpref would not have written, and repairs
nothing. A full check also compares every index with its table. A sample takes the same time for a
home of any size, and finds no rows that are gone at the end of a table.
"""

from __future__ import annotations

import codecs
import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple, get_args

import orjson

from agentpref.home import Home, reading
from agentpref.record.ingest.checks import message_fault, row_fault
from agentpref.record.messages import COMPARISON_COLUMNS, FEEDBACK_COLUMNS, RUN_COLUMNS
from agentpref.record.seals import SEALED, last_seals, links, lost_ends
from agentpref.record.spill import is_whole
from agentpref.record.updates import ORPHANED, Role
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
            problems += [Problem(table, "", _LOST_END) for table in lost_ends(connection)]
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


_LOST_END = "rows are gone at its end"

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


# What is true of every sound record. Each invariant looks at the rows of one table and follows
# their references by key, so that a sample can be checked as well as everything.


class Invariant(NamedTuple):
    """``what`` is wrong with a row of ``table`` if ``broken`` is true of it and its ``joins``."""

    table: str
    what: str
    broken: str
    joins: str = ""


KEYS = {
    "message": "message.id",
    "run": "run.run_id",
    "feedback": "feedback.feedback_id",
    "comparison": "comparison.comparison_id",
    "updates": "updates.update_id",
    "update_pair": "update_pair.update_id",
    "pair_source": "pair_source.source",
    "revision": "revision.revision_id",
    "serving": "serving.namespace",
    "serving_history": "serving_history.id",
}
"""What a row is called in a finding, by table."""

SAMPLED = ("message", "run", "feedback", "comparison", "updates", "revision")
"""Tables that grow with what is logged and learned."""

WHOLE = ("serving", "serving_history")
"""Tables so small that they are read as a whole beside a sample, too."""


def _of_the_forgotten(table: str) -> Invariant:
    return Invariant(
        table,
        "its user was forgotten later",
        f"{table}.created_at <= forgotten.at",
        f"CROSS JOIN forgotten ON forgotten.user_id = {table}.user_id",
    )


def _body(function: str, path: str) -> str:
    """SQL that reads the joined message's body; null if the body is not JSON."""
    text = "CAST(message.body AS TEXT)"
    return f"CASE WHEN json_valid({text}) THEN {function}({text}, '{path}') END"


_NO_ANSWER = "is missing, answers another prompt, or is not an assistant's message"
_ROLES = get_args(Role)


def _served(table: str, role: str) -> Invariant:
    return Invariant(
        table,
        f"its {role} is no revision of its namespace",
        f"{table}.{role} IS NOT NULL AND revision.namespace IS NOT {table}.namespace",
        f"LEFT JOIN revision ON revision_id = {table}.{role}",
    )


# fmt: off
INVARIANTS = (
    Invariant("message", "its parent is missing",
        "message.parent IS NOT NULL AND above.id IS NULL",
        "LEFT JOIN message AS above ON above.id = message.parent"),
    Invariant("run", "its prompt is missing or has no message",
        "message.id IS NULL OR message.parent IS NULL AND"
        f" {_body('json_type', '$.tools')} IS NOT NULL AND {_body('json_type', '$.role')} IS NULL",
        "LEFT JOIN message ON message.id = prompt"),
    Invariant("run", f"its output {_NO_ANSWER}",
        f"message.parent IS NOT prompt OR {_body('json_extract', '$.role')} <> 'assistant'",
        "LEFT JOIN message ON message.id = output"),
    _of_the_forgotten("run"),
    Invariant("feedback", "its run is missing",
        "run.run_id IS NULL",
        "LEFT JOIN run ON run.run_id = feedback.run_id"),
    Invariant("feedback", f"its correction {_NO_ANSWER}",
        "correction IS NOT NULL AND (message.parent IS NOT prompt"
        f" OR {_body('json_extract', '$.role')} <> 'assistant')",
        "JOIN run ON run.run_id = feedback.run_id LEFT JOIN message ON message.id = correction"),
    _of_the_forgotten("feedback"),
    Invariant("comparison",
        "one of its runs is missing, or they are of different prompts or namespaces",
        "a.prompt IS NULL OR b.prompt IS NULL OR a.prompt <> b.prompt"
        " OR a.namespace <> b.namespace",
        "LEFT JOIN run AS a ON a.run_id = run_a LEFT JOIN run AS b ON b.run_id = run_b"),
    _of_the_forgotten("comparison"),
    Invariant("updates", "its candidate is missing, or has another parent or namespace",
        "candidate IS NOT NULL AND (revision.namespace IS NOT updates.namespace"
        " OR revision.parent IS NOT updates.parent)",
        "LEFT JOIN revision ON revision_id = candidate"),
    Invariant("updates", "its parent is no revision of its namespace",
        "updates.parent IS NOT NULL AND revision.namespace IS NOT updates.namespace",
        "LEFT JOIN revision ON revision_id = updates.parent"),
    Invariant("updates", "it promoted no candidate", "verdict = 'promoted' AND candidate IS NULL"),
    Invariant("updates", "its report is not JSON", "NOT json_valid(coalesce(report, 'null'))"),
    Invariant("update_pair", "its update is missing",
        "updates.update_id IS NULL",
        "LEFT JOIN updates ON updates.update_id = update_pair.update_id"),
    Invariant("update_pair", f"its role is none of {', '.join(_ROLES)}", f"role NOT IN {_ROLES}"),
    # Nothing more about a pair's source: it may have been forgotten since, or have expired.
    Invariant("pair_source", "no update used its pair",
        "pair_id NOT IN (SELECT pair_id FROM update_pair)"),
    Invariant("revision", "its parent is missing, younger, or of another namespace",
        "revision.parent IS NOT NULL"
        " AND (above.namespace IS NOT revision.namespace OR above.seq >= revision.seq)",
        "LEFT JOIN revision AS above ON above.revision_id = revision.parent"),
    Invariant("revision", "its parent is tainted and it is not",
        "revision.tainted_at IS NULL AND above.tainted_at IS NOT NULL",
        "JOIN revision AS above ON above.revision_id = revision.parent"),
    Invariant("revision", "its update is not in the ledger, so what it learned is unknown",
        ORPHANED),
    Invariant("revision", "its manifest is not JSON, or names another parent",
        "NOT json_valid(manifest) OR (json_type(manifest, '$.parent') IS NOT NULL"
        " AND json_extract(manifest, '$.parent') IS NOT parent)"),
    _served("serving", "live"),
    _served("serving", "canary"),
    Invariant("serving", "it names a revision that was pruned",
        "revision.pruned_at IS NOT NULL",
        "JOIN revision ON revision_id IN (serving.live, serving.canary)"),
    Invariant("serving", "it is not what its history ends with",
        "last.live IS NOT serving.live OR last.canary IS NOT serving.canary"
        " OR last.weight IS NOT serving.weight OR last.generation IS NOT serving.generation",
        "LEFT JOIN (SELECT namespace, max(id) AS id FROM serving_history GROUP BY namespace)"
        " AS newest ON newest.namespace = serving.namespace"
        " LEFT JOIN serving_history AS last ON last.id = newest.id"),
    Invariant("serving_history", "its generation is not above the one before it",
        "serving_history.generation <= before.generation",
        "JOIN (SELECT id, lag(generation) OVER (PARTITION BY namespace ORDER BY id) AS generation"
        " FROM serving_history) AS before ON before.id = serving_history.id"),
    _served("serving_history", "live"),
    _served("serving_history", "canary"),
)
# fmt: on
