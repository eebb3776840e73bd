"""Another home, read as it was at one moment, though somebody may be writing to it.

What comes from elsewhere may be anything: a damaged file, another program's tables, entries that no
log wrote. Whatever is wrong with it is said of it, and not of the home that reads it. Nothing in it
changes but what its own log would do: its schema is brought up to date, and what waits in its spill
is written to its database. Whether a row is fit to be let in, others ask.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from agentpref.errors import CorruptHome
from agentpref.home import Home
from agentpref.record.database import connect, translated
from agentpref.record.spill import drain

_TABLES = ("message", "run", "feedback", "comparison", "forgotten")


@dataclass(frozen=True, slots=True)
class Foreign:
    """An open home of somebody else's."""

    home: Home
    connection: sqlite3.Connection

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Read all rows of a query. Text that is no UTF-8 comes as bytes.

        Raises:
            CorruptHome: the database cannot be read, or is not as ours are.
        """
        with _blamed(self.home):
            return self.connection.execute(query, values).fetchall()


@contextmanager
def opened(home: Home) -> Iterator[Foreign]:
    """Open a home for reading.

    Raises:
        CorruptHome: its database is not what a log wrote.
        NewerHome: a later agentpref has changed it beyond what this one knows.
        NotKept: it cannot be opened.
    """
    drain(home)
    with _blamed(home):
        connection = connect(home, readonly=True)
    with closing(connection):
        connection.text_factory = _text_or_bytes
        connection.execute("BEGIN")
        foreign = Foreign(home, connection)
        _require_tables(foreign)
        yield foreign


@contextmanager
def _blamed(home: Home) -> Iterator[None]:
    """Say SQLite's errors as ours; here, none of them is a mistake of our own."""
    try:
        with translated(home):
            yield
    except sqlite3.Error as error:
        raise CorruptHome(
            f"{home.database} is not as agentpref makes it ({error}); restore a backup"
        ) from error


def _require_tables(foreign: Foreign) -> None:
    """A view or a virtual table that stands for one of ours would run what its maker wrote."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE %'"
    tables = {name for (name,) in foreign.read(query)}
    if missing := [name for name in _TABLES if name not in tables]:
        raise CorruptHome(f"{foreign.home.database} has no table {missing[0]!r}; restore a backup")


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
