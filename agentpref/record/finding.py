"""Finds runs: by an id as other programs write it, by a trace, and by what a person remembers.

Ids are understood in every spelling in which they may have been logged: UUIDs in any case, with or
without dashes, and the ids of LangChain's messages, which name the run that wrote them. A trace
stands for its last answer. Judgements of a trace are resolved where they are stored, because only
there everything that was recorded before them is known.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from agentpref.errors import UnknownRun, shown_id
from agentpref.record.messages import as_json
from agentpref.types import Message, Run

_OF_MESSAGE = re.compile(
    r"(?:lc_)?run--?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:-(\d+))?", re.IGNORECASE
)
"""The id of a message of LangChain: its run, and which of several answers it is."""

_UUID = re.compile(r"[0-9a-f]{8}(-?)[0-9a-f]{4}(?:\1[0-9a-f]{4}){2}\1[0-9a-f]{12}", re.IGNORECASE)
_FURTHER = re.compile(r"(.+):\d+")
_IN_PATTERN = 1_000  # characters of a text that SQLite looks for; it takes patterns of 50 kB
_HAS_TEXT = "body LIKE :text ESCAPE '!'"
_NEAR = 10_000  # runs in which a text is looked up one by one
_SEPARATOR = "\n"  # in no id and no namespace, which are printable


def of_trace(namespace: str, trace_id: str) -> str:
    """Name the last answer of a trace, where a judgement names its run."""
    return f"{_SEPARATOR}{namespace}{_SEPARATOR}{trace_id}"


def named_trace(name: str) -> str | None:
    """The trace that :func:`of_trace` named, of whatever namespace; None for the id of a run."""
    return name.split(_SEPARATOR)[2] if name.startswith(_SEPARATOR) else None


def spellings(name: str) -> list[str]:
    """Every way in which the run or trace of this name may have been logged, the given one first.

    >>> spellings("lc_run--019d25f6-c4a8-7000-8000-0123456789ab-1")[1]
    '019d25f6-c4a8-7000-8000-0123456789ab:1'
    """
    found = [name := _storable(name)]
    of_message = _OF_MESSAGE.fullmatch(name)
    uuid, index = (of_message[1], of_message[2] or "0") if of_message else (name, "0")
    if _UUID.fullmatch(uuid):
        plain = uuid.replace("-", "").lower()
        dashed = "-".join((plain[:8], plain[8:12], plain[12:16], plain[16:20], plain[20:]))
        further = f":{index}" if int(index) else ""
        for text in (dashed, plain):
            found += [text + further, text.upper() + further]
    return [*dict.fromkeys(found)]


def find(connection: sqlite3.Connection, name: str, at: float) -> str:
    """Find the id of a run by an id in any spelling, or of the last answer of a trace.

    Args:
        connection: the home's database.
        name: the id, or what :func:`of_trace` returns.
        at: answers of a trace that were recorded later than this time count only if it has no
            earlier ones.

    Raises:
        UnknownRun: there is none.
    """
    if name.startswith(_SEPARATOR):
        _, namespace, trace_id = name.split(_SEPARATOR)
        return _last_answer(connection, namespace, trace_id, at)
    found = _first(connection, name)
    if found is None:
        raise unknown_run(name)
    return found


def find_prefix(connection: sqlite3.Connection, name: str) -> str:
    """Find the id of a run as :func:`find` does, or by a beginning that no other run's id has.

    Raises:
        UnknownRun: there is none, or more than one begins so.
    """
    name = _storable(name)
    found = _first(connection, name)
    if found is not None:
        return found
    query = "SELECT run_id FROM run WHERE run_id >= ?1 AND run_id < ?1 || char(1114111) LIMIT 2"
    some = [run_id for (run_id,) in connection.execute(query, (name,))] if name else []
    if len(some) > 1:
        raise UnknownRun(f"the ids of several runs begin with {shown_id(name)}; write more of it")
    if not some:
        raise UnknownRun(
            f"no run {shown_id(name)} is in this home, and none whose id begins so; "
            "`agentpref runs` lists them"
        )
    return str(some[0])


def shortest(connection: sqlite3.Connection, run_id: str, least: int = 8) -> str:
    """The shortest beginning of a run's id that no other run's id has."""
    beside = (
        "SELECT max(run_id) FROM run WHERE run_id < ?",
        "SELECT min(run_id) FROM run WHERE run_id > ?",
    )
    for query in beside:
        (other,) = connection.execute(query, (run_id,)).fetchone()
        while other is not None and least < len(run_id) and other.startswith(run_id[:least]):
            least += 1
    return run_id[:least]


def unknown_run(name: str) -> UnknownRun:
    """Say that no run has this id."""
    return UnknownRun(
        f"no run {shown_id(name)} is in this home; give the id that the log returned for the run, "
        "and the home that it was logged to (what could not be kept is counted as dropped)"
    )


def _first(connection: sqlite3.Connection, name: str) -> str | None:
    query = "SELECT run_id FROM run WHERE run_id = ?"
    for spelling in spellings(name):
        if connection.execute(query, (spelling,)).fetchone() is not None:
            return spelling
    return None


def _last_answer(connection: sqlite3.Connection, namespace: str, trace_id: str, at: float) -> str:
    """The newest answer of a trace; of several answers to one call, the first.

    The id of a message names an answer by itself, whatever trace it is of.
    """
    newest = connection.execute(
        """SELECT run_id FROM run WHERE +namespace = ? AND trace_id IN (SELECT value FROM
            json_each(?)) ORDER BY created_at <= ? DESC, created_at DESC, rowid DESC LIMIT 1""",
        (namespace, as_json(spellings(trace_id)), at),
    ).fetchone()
    if newest is None:
        of_message = _OF_MESSAGE.fullmatch(trace_id)
        found = _first(connection, trace_id) if of_message else None
        if found is not None:
            return found
        raise UnknownRun(
            f"no run of trace {shown_id(trace_id)} is in namespace {namespace!r} of this home; "
            "give the trace id that the run was logged with (what could not be kept is counted as "
            "dropped)"
        )
    further = _FURTHER.fullmatch(newest[0])
    if further and _first(connection, further[1]) == further[1]:
        return further[1]
    return str(newest[0])


# What a person remembers of a run


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which runs of a namespace to find; what is ``None`` does not matter.

    ``users`` are the names that the home may have given to a user. ``text`` is in the answer or in
    the last message of the prompt; the letters A to Z count in either case.
    """

    namespace: str
    thread_id: str | None = None
    trace_id: str | None = None
    tag: str | None = None
    users: tuple[str, ...] | None = None
    text: str | None = None

    def conditions(self) -> tuple[str, dict[str, Any]]:
        """The conditions in SQL, and their values."""
        # A plus keeps SQLite from reading the whole namespace where the index of traces is quicker.
        plus = "" if self.trace_id is None else "+"
        found: list[str] = [f"{plus}namespace = :namespace"]
        values: dict[str, Any] = {"namespace": self.namespace}
        if self.thread_id is not None:
            found.append("thread_id = :thread")
            values["thread"] = _storable(self.thread_id)
        if self.trace_id is not None:
            found.append("trace_id IN (SELECT value FROM json_each(:traces))")
            values["traces"] = as_json(spellings(self.trace_id))
        if self.tag is not None:
            found.append("EXISTS (SELECT 1 FROM json_each(tags) WHERE value = :tag)")
            values["tag"] = _storable(self.tag)
        if self.users is not None:
            found.append("user_id IN (SELECT value FROM json_each(:users))")
            values["users"] = as_json([*self.users])
        return " AND ".join(found), values

    def has_text(self, run: Run) -> bool:
        """Whether a text that was found in JSON is in what was said, and not in its keys."""
        if self.text is None:
            return True
        wanted = _folded(self.text)
        said = (run.prompt.messages[-1], run.output)
        return any(wanted in _folded(text) for message in said for text in texts(message))


def newest(
    connection: sqlite3.Connection, wanted: Wanted, columns: str
) -> Iterator[tuple[Any, ...]]:
    """Select columns of the runs that are wanted, newest first; take no more than you need.

    A text is looked up in the newest runs one by one, and then for all older ones in one pass over
    all messages, which is quicker where it is rare. Where more is known of the runs, each of them
    is looked at.
    """
    conditions, values = wanted.conditions()
    select = f"SELECT {columns} FROM run WHERE {conditions}"
    order = "ORDER BY created_at DESC, rowid DESC"
    if wanted.text is None:
        yield from connection.execute(f"{select} {order}", values)
        return
    nearest = None
    if wanted == Wanted(wanted.namespace, text=wanted.text):
        query = f"SELECT created_at FROM run WHERE namespace = ? {order} LIMIT 1 OFFSET {_NEAR}"
        nearest = connection.execute(query, (wanted.namespace,)).fetchone()
    inside = orjson.dumps(_storable(wanted.text[:_IN_PATTERN])).decode()[1:-1]  # as JSON has it
    values |= {
        "text": "%" + re.sub("([!%_])", r"!\1", inside) + "%",
        "near": nearest[0] if nearest else -math.inf,
    }
    of_run = f"SELECT 1 FROM message WHERE id IN (run.prompt, run.output) AND {_HAS_TEXT}"
    near = f"{select} AND created_at > :near AND EXISTS ({of_run}) {order}"
    yield from connection.execute(near, values)
    said = f"WITH said AS MATERIALIZED (SELECT id FROM message WHERE {_HAS_TEXT})"
    far = f"{select} AND created_at <= :near AND (prompt IN said OR output IN said) {order}"
    yield from connection.execute(f"{said} {far}", values)


def texts(message: Message) -> Iterator[str]:
    """Every text in a message: what was said, thought, and called."""
    rest: list[Any] = [message]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            rest += [below for key, below in value.items() if key not in ("role", "type")]
        elif isinstance(value, list | tuple):
            rest += value


def _storable(text: str) -> str:
    """Without halves of characters, which no home holds, and a command line may."""
    return text.encode(errors="replace").decode()


def _folded(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)
