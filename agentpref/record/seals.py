"""Seals: a chain of hashes in which an edited, inserted or removed row shows.

The seal of a row hashes its columns and the seal of the row before it, in the order in which they
were written. So a changed value breaks the row's own seal, and a row that is gone breaks the seal
of the next one. What a chain does not show, such as rows that are gone at its end, the sum of the
table does (:mod:`agentpref.record.sums`). Runs have no sum. A judged run that is gone shows by its
judgements; of others, those that were the last when they were deleted do not show.

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

from agentpref.record.sums import (
    MISSING,
    SUMMED,
    Sum,
    add,
    body,
    checksum,
    counted,
    keep,
    kept_sum,
    number,
    resum,
)

_SUMMED = ("feedback", "comparison", "updates", "revision", "serving_history")

SEALED: Mapping[str, tuple[str, ...]] = {
    "run": (
        "run_id", "namespace", "created_at", "prompt", "output", "model", "revision", "thread_id",
        "trace_id", "user_id", "params", "token_ids", "logprobs", "tags", "metadata",
    ),
    **{table: SUMMED[table].columns for table in _SUMMED},
}  # fmt: skip
"""What is sealed, by table, in the order in which it is hashed. The first column names a row.

Whoever adds a column here adds a migration that seals the table again.
"""

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
    """The seal of a row (16 bytes): a hash of the seal before it and of its columns."""
    return _hash(before + body(values))


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def sealed(
    connection: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]
) -> list[tuple[Any, ...]]:
    """Add its seal to each row that is about to be inserted, as the last column.

    Call it in the transaction that inserts them, all and in this order.
    """
    before, total = last_seal(connection, table), 0
    found = []
    for row in rows:
        content = body(row)
        before = _hash(before + content)
        if table in SUMMED:
            total += number(content)
        found.append((*row, before))
    if found and table in SUMMED:
        add(connection, table, len(found), total)
    return found


@contextmanager
def resealing(connection: sqlite3.Connection, tables: Sequence[str]) -> Iterator[None]:
    """Seal tables anew after a block that removes or changes rows, in the same transaction.

    Rows whose seal was broken before keep it. The sums keep what was wrong with those that go, and
    of runs it is counted, so that the block hides nothing.
    """
    with counted(connection, *[table for table in tables if table in SUMMED]):
        broken = {
            table: {link.key for link in links(connection, table) if link.fault() is not None}
            for table in tables
        }
        yield
        for table, keys in broken.items():
            _chain(connection, table, but=keys)
            if table not in SUMMED:
                query = f"SELECT 1 FROM {table} WHERE {SEALED[table][0]} IS ?"
                gone = [key for key in keys if not connection.execute(query, (key,)).fetchone()]
                if gone:
                    add(connection, table, len(gone), 0)


def removed_faults(connection: sqlite3.Connection, table: str) -> str | None:
    """Say what was wrong with rows of a table without a sum that were removed since."""
    kept = kept_sum(connection, table)
    if kept == Sum(0, 0):
        return None
    what = "removed since, were not as they were written, or rows before them were gone"
    return MISSING if kept is None else f"{kept.rows} of its rows, {what}"


def seal(connection: sqlite3.Connection, table: str, *, after: int = _ALL) -> None:
    """Seal rows that were inserted without one: those whose rowid is above ``after``.

    By default, seal all rows of the table as they are, and keep their sums.
    """
    if after == _ALL:
        _chain(connection, table)
        resum(connection, [name for name, summed in SUMMED.items() if summed.table == table])
    else:
        names = [table] if table in SUMMED else []
        with counted(connection, *names, where="rowid > ?", values=(after,)):
            _chain(connection, table, after=after)


def _chain(
    connection: sqlite3.Connection,
    table: str,
    *,
    after: int = _ALL,
    but: Container[object] = frozenset(),
) -> bytes:
    """Write the seals of the rows above a rowid anew, but for some keys; return the last one."""
    before = last_seal(connection, table, until=after)
    columns = ", ".join(SEALED[table])
    query = f"""SELECT rowid, seal, {columns} FROM {table} WHERE rowid > ?
        ORDER BY rowid LIMIT {_BATCH}"""
    while rows := connection.execute(query, (after,)).fetchall():
        seals: list[tuple[bytes, int]] = []
        for after, old, *values in rows:
            if values[0] in but:
                before = _as_bytes(old) or before
            else:
                before = seal_of(before, values)
                seals.append((before, after))
        connection.executemany(f"UPDATE {table} SET seal = ? WHERE rowid = ?", seals)
    return before


def last_seal(connection: sqlite3.Connection, table: str, *, until: int = 2**63 - 1) -> bytes:
    """The seal of the last sealed row whose rowid is at most ``until``; empty if there is none."""
    query = (
        f"SELECT seal FROM {table} WHERE rowid <= ? AND seal IS NOT NULL"
        " ORDER BY rowid DESC LIMIT 1"
    )
    found = connection.execute(query, (until,)).fetchone()
    return b"" if found is None else _as_bytes(found[0]) or b""


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
        end = _chain(connection, table)
        if table != "run":
            connection.execute("INSERT INTO last_seal (name, seal) VALUES (?, ?)", (table, end))


def add_sums(connection: sqlite3.Connection) -> None:
    """Sum the tables of a home as they are found: the step ``sums_of_tables`` of the schema.

    A table whose last row is gone by its ``last_seal`` gets the sum of one row more.
    """
    connection.execute(
        """CREATE TABLE table_sum (
            name TEXT PRIMARY KEY NOT NULL,
            rows INTEGER NOT NULL,
            total BLOB NOT NULL
        ) WITHOUT ROWID"""
    )
    resum(connection)
    keep(connection, "run", Sum(0, 0))
    kept = dict(connection.execute("SELECT name, seal FROM last_seal"))
    for table in SEALED:
        if table != "run" and kept.get(table) != last_seal(connection, table):
            add(connection, table, 1, 0)
    connection.execute("DROP TABLE last_seal")
    connection.execute("ALTER TABLE logp ADD COLUMN checksum BLOB")
    connection.create_function("checksum", 4, lambda *values: checksum(values), deterministic=True)
    connection.execute("UPDATE logp SET checksum = checksum(policy, row, logp, tokens)")
