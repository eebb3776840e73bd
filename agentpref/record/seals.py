"""Seals: a chain of hashes in which an edited, inserted or removed row shows.

The seal of a row hashes its columns and the seal of the row before it, in the order in which they
were written. So a changed value breaks the row's own seal, and a row that is gone breaks the seal
of the next one. The last seals of the judgements, updates, revisions and changes of what serves are
kept apart, and show rows that are gone at the end. For runs they are not: they would cost a page
for each run, and a judged run that is gone shows by its judgements.

A message needs no seal, because its id is a hash of its content. A seal has no secret: whoever can
write the file can seal it again. So it shows what failing disks, other programs and hasty hands
did, and a note of the last seals, kept elsewhere, shows the rest.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import orjson

SEALED: Mapping[str, tuple[str, ...]] = {
    "run": (
        "run_id", "namespace", "created_at", "prompt", "output", "model", "revision", "thread_id",
        "trace_id", "user_id", "params", "token_ids", "logprobs", "tags", "metadata",
    ),
    "feedback": (
        "feedback_id", "run_id", "created_at", "key", "score", "value", "comment", "source",
        "user_id", "correction", "scale",
    ),
    "comparison": (
        "comparison_id", "created_at", "run_a", "run_b", "winner", "source", "user_id", "comment",
    ),
    "updates": (
        "update_id", "namespace", "created_at", "finished_at", "parent", "candidate", "verdict",
        "report",
    ),
    "revision": ("revision_id", "namespace", "seq", "parent", "created_at", "manifest"),
    "serving_history": ("namespace", "at", "generation", "action", "live", "canary", "weight"),
}  # fmt: skip
"""What is sealed, by table, in the order in which it is hashed. The first column names a row.

Whoever adds a column here adds a migration that seals the table again.
"""

_WITHOUT_END = frozenset({"run"})
_BATCH = 2_000
_ALL = -(2**63)


class Link(NamedTuple):
    """A row of a sealed table: its key, its seal, the seal before it, and the sealed columns."""

    key: object
    seal: bytes | None
    before: bytes
    values: Sequence[object]

    def fault(self) -> str | None:
        """Say what is wrong with it, or return None."""
        if self.seal is None:
            return "it has no seal: another program wrote or changed it"
        if self.seal != seal_of(self.before, self.values):
            return "it is not as it was written, or a row before it is gone"
        return None


def seal_of(before: bytes, values: Iterable[object]) -> bytes:
    """The seal of a row (16 bytes): a hash of the seal before it and of its columns.

    A number counts as SQLite stores it, whether it was given as 1, 1.0 or True.
    """
    plain = [float(value) if isinstance(value, int | float) else value for value in values]
    return hashlib.blake2b(before + orjson.dumps(plain, default=_hex), digest_size=16).digest()


def _hex(value: object) -> str:
    """Bytes, which only a damaged row has in these columns."""
    return f"0x{value.hex()}" if isinstance(value, bytes) else str(type(value))


def sealed(
    connection: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]
) -> list[tuple[Any, ...]]:
    """Add its seal to each row that is about to be inserted, as the last column.

    Call it in the transaction that inserts them, all and in this order.
    """
    before = last_seal(connection, table)
    found = []
    for row in rows:
        before = seal_of(before, row)
        found.append((*row, before))
    _keep_end(connection, table, before)
    return found


@contextmanager
def resealing(connection: sqlite3.Connection, tables: Iterable[str]) -> Iterator[None]:
    """Seal tables anew after a block that removes or changes rows, in the same transaction.

    Rows whose seal was broken before stay without one, so that the block hides nothing.
    """
    broken = {
        table: {link.key for link in links(connection, table) if link.fault() is not None}
        for table in tables
    }
    yield
    for table, keys in broken.items():
        seal(connection, table, but=keys)


def seal(
    connection: sqlite3.Connection,
    table: str,
    *,
    after: int = _ALL,
    but: Container[object] = frozenset(),
) -> None:
    """Seal anew the rows of a table whose rowid is above ``after``; by default, all rows.

    Rows whose keys are in ``but`` get no seal, and those after them do not depend on them.
    """
    before = last_seal(connection, table, until=after)
    columns = ", ".join(SEALED[table])
    query = f"SELECT rowid, {columns} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT {_BATCH}"
    while rows := connection.execute(query, (after,)).fetchall():
        seals: list[tuple[bytes | None, int]] = []
        for after, *values in rows:
            if values[0] in but:
                seals.append((None, after))
            else:
                before = seal_of(before, values)
                seals.append((before, after))
        connection.executemany(f"UPDATE {table} SET seal = ? WHERE rowid = ?", seals)
    _keep_end(connection, table, before)


def last_seal(connection: sqlite3.Connection, table: str, *, until: int = 2**63 - 1) -> bytes:
    """The seal of the last sealed row whose rowid is at most ``until``; empty if there is none."""
    query = (
        f"SELECT seal FROM {table} WHERE rowid <= ? AND seal IS NOT NULL"
        " ORDER BY rowid DESC LIMIT 1"
    )
    found = connection.execute(query, (until,)).fetchone()
    return b"" if found is None else bytes(found[0])


def last_seals(connection: sqlite3.Connection) -> dict[str, str]:
    """The last seal of each table in hex, for a note to be kept elsewhere."""
    return {table: last_seal(connection, table).hex() for table in SEALED}


def links(
    connection: sqlite3.Connection, table: str, rows: Iterable[int] | None = None
) -> Iterator[Link]:
    """Read the rows of a table with their seals: all of them, or those of some rowids."""
    query = f"SELECT {SEALED[table][0]}, seal, {', '.join(SEALED[table])} FROM {table}"
    if rows is None:
        before = b""
        for key, seal_, *values in connection.execute(f"{query} ORDER BY rowid"):
            yield Link(key, _as_bytes(seal_), before, values)
            before = _as_bytes(seal_) or before
        return
    for row in rows:
        for key, seal_, *values in connection.execute(f"{query} WHERE rowid = ?", (row,)):
            before = last_seal(connection, table, until=row - 1)
            yield Link(key, _as_bytes(seal_), before, values)


def _as_bytes(value: object) -> bytes | None:
    """A seal as it was stored; a damaged one may have any type."""
    return value if value is None or isinstance(value, bytes) else str(value).encode()


def lost_ends(connection: sqlite3.Connection) -> Iterator[str]:
    """Name the tables whose last row is not the one that was sealed last."""
    for table, kept in connection.execute("SELECT name, seal FROM last_seal").fetchall():
        if table in SEALED and last_seal(connection, table) != _as_bytes(kept):
            yield table


def add_seals(connection: sqlite3.Connection) -> None:
    """Seal a home from before rows were sealed, as it is found: the step ``seals`` of the schema.

    Sealing again changes no judgement, so the triggers of the list of examples then watch only the
    columns that are sealed.
    """
    connection.execute(
        "CREATE TABLE last_seal (name TEXT PRIMARY KEY NOT NULL, seal BLOB NOT NULL) WITHOUT ROWID"
    )
    for table in ("feedback", "comparison"):
        query = "SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name = ?"
        (sql,) = connection.execute(query, (f"{table}_changed",)).fetchone()
        connection.execute(f"DROP TRIGGER {table}_changed")
        connection.execute(sql.replace("UPDATE ON", f"UPDATE OF {', '.join(SEALED[table])} ON"))
    for table in SEALED:
        connection.execute(f"ALTER TABLE {table} ADD COLUMN seal BLOB")
        seal(connection, table)


def _keep_end(connection: sqlite3.Connection, table: str, end: bytes) -> None:
    if table not in _WITHOUT_END:
        query = "INSERT OR REPLACE INTO last_seal (name, seal) VALUES (?, ?)"
        connection.execute(query, (table, end))
