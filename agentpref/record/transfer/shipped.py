"""What a home remembers of a place of segments: ids, and no text.

It is a small database beside that of the home, one for each place. If it is lost, as after a
restore, the next shipment writes everything again and the next merge reads everything again; the
rows keep their ids, so no home has them twice.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from agentpref.home import Home, open_private
from agentpref.record.messages import as_json

_TABLES = """
CREATE TABLE IF NOT EXISTS shipped (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending (number INTEGER, place INTEGER, id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS seen (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""


class Shipped:
    """The memory of one home for one place. The caller has a lock; each call is one transaction."""

    def __init__(self, home: Home, url: str) -> None:
        mark = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        path = home.path / f"segments-{mark}.db"
        os.close(open_private(str(path), os.O_RDWR | os.O_CREAT))
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.executescript(_TABLES)
        about = os.stat(home.database)
        database = f"{about.st_dev}:{about.st_ino}"
        if self.state("database") != database:  # another one has other rows
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.execute("DELETE FROM seen")
                self._connection.execute("DELETE FROM state")
            self.keep("database", database)

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def known(self, ids: Sequence[str]) -> set[str]:
        """Which of these ids were shipped."""
        query = "SELECT id FROM shipped WHERE id IN (SELECT value FROM json_each(?))"
        return {name for (name,) in self._connection.execute(query, (as_json([*ids]),))}

    def plan(self, ids: Iterable[str], batch: int) -> None:
        """Note what is to be shipped, in batches, before any of it is."""
        rows = ((at // batch, at, name) for at, name in enumerate(ids))
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT INTO pending VALUES (?, ?, ?)", rows)

    def planned(self) -> list[list[str]]:
        """What is to be shipped, by batch, as it was planned."""
        batches: dict[int, list[str]] = {}
        query = "SELECT number, id FROM pending ORDER BY number, place"
        for number, name in self._connection.execute(query):
            batches.setdefault(number, []).append(name)
        return [*batches.values()]

    def done(self, ids: Sequence[str]) -> None:
        """Note that a batch was shipped."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            some = "SELECT value FROM json_each(?)"
            values = (as_json([*ids]),)
            self._connection.execute(f"INSERT OR IGNORE INTO shipped {some}", values)
            self._connection.execute(f"DELETE FROM pending WHERE id IN ({some})", values)

    def seen(self) -> set[str]:
        """The names of the segments that the home has."""
        return {name for (name,) in self._connection.execute("SELECT name FROM seen")}

    def see(self, name: str) -> None:
        """Note that the home has all of a segment."""
        self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (name,))

    def state(self, name: str) -> str | None:
        """A value that was kept."""
        query = "SELECT value FROM state WHERE name = ?"
        row: tuple[Any, ...] | None = self._connection.execute(query, (name,)).fetchone()
        return None if row is None else str(row[0])

    def keep(self, name: str, value: str) -> None:
        """Keep a value."""
        self._connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))
