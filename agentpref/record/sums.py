"""Sums: what each table held when agentpref wrote to it last.

The sum of a table adds up the hashes of its rows, in whatever order. Whoever inserts rows adds
their hashes in the same transaction; whoever deletes or changes rows takes the old ones away. So a
row that another program changed, added or deleted leaves a difference. Nothing that agentpref does
later closes it: the row itself may go, and those around it. A sum says how many rows there were,
and not which one is gone; seals say which was changed.

Like a seal, a sum has no secret: it shows what failing disks, other programs and hasty hands did.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import orjson

_MODULUS = 2**128


class Summed(NamedTuple):
    """A table, the columns that count, and which of its rows do."""

    table: str
    columns: tuple[str, ...]
    rows: str = "true"


def _sealed(table: str, *columns: str) -> Summed:
    """A sealed table. Its rows without a seal are found by that: other programs wrote them."""
    return Summed(table, columns, "seal IS NOT NULL")


LISTED = ("listing", "stale_prompt", "judged_run", "example", "left_out")
"""The list of examples, which an update makes anew if its sums are wrong."""

SUMMED: Mapping[str, Summed] = {
    "feedback": _sealed(
        "feedback",
        "feedback_id", "run_id", "created_at", "key", "score", "value", "comment", "source",
        "user_id", "correction", "scale",
    ),
    "comparison": _sealed(
        "comparison",
        "comparison_id", "created_at", "run_a", "run_b", "winner", "source", "user_id", "comment",
    ),
    "updates": _sealed(
        "updates",
        "update_id", "namespace", "created_at", "finished_at", "parent", "candidate", "verdict",
        "report",
    ),
    "revision": _sealed(
        "revision", "revision_id", "namespace", "seq", "parent", "created_at", "manifest"
    ),
    "serving_history": _sealed(
        "serving_history",
        "namespace", "at", "generation", "action", "live", "canary", "weight",
    ),
    "standing": Summed(
        "revision",
        ("revision_id", "tainted_at", "quarantined_at", "quarantine_reason", "pruned_at"),
    ),
    "update_pair": Summed("update_pair", ("update_id", "pair_id", "role")),
    "pair_source": Summed("pair_source", ("source", "pair_id")),
    "forgotten": Summed("forgotten", ("user_id", "at")),
    "forgotten_run": Summed("forgotten_run", ("hash",)),
    "hold_reason": Summed("hold_reason", ("namespace", "generation", "reason")),
    "user_key": Summed("user_key", ("fingerprint",)),
    "feedback_scale": Summed(
        "feedback_scale", ("namespace", "key", "source", "low", "high", "since")
    ),
    "listing": Summed("listing", ("namespace", "feedback", "comparisons", "scales", "rules")),
    "stale_prompt": Summed("stale_prompt", ("namespace", "prompt")),
    "judged_run": Summed("judged_run", ("namespace", "prompt", "run_id")),
    "example": Summed(
        "example",
        (
            "number", "namespace", "prompt", "example_id", "created_at", "origin", "tag", "lone",
            "point",
        ),
    ),
    "left_out": Summed("left_out", ("namespace", "prompt", "reason", "judgements")),
    "answers": Summed("answers", ("update_id", "number", "prompt", "before", "after")),
    "judge": Summed("judge", ("voter", "name", "digest", "rubric", "source", "created_at")),
    "verdict": Summed("verdict", ("judge", "question", "prompt", "created_at", "said")),
    "calibration": Summed(
        "calibration", ("number", "namespace", "voter", "created_at", "noise", "report")
    ),
}  # fmt: skip
"""What is summed, by the name of the sum. ``standing`` has what changes of a revision.

Runs have none: it would cost a page of the disk for each run that is written on its own. Whoever
adds a table or a column here adds a migration that sums the table anew.
"""


class Sum(NamedTuple):
    """How many rows there are, and the sum of their hashes."""

    rows: int
    total: int


def body(values: Iterable[object]) -> bytes:
    """The columns of a row as bytes to hash.

    A number counts as SQLite stores it, whether it was given as 1, 1.0 or True.
    """
    plain = [float(value) if isinstance(value, int | float) else value for value in values]
    return orjson.dumps(plain, default=_hex)


def _hex(value: object) -> str:
    """Bytes, which only a damaged row has in these columns."""
    return f"0x{value.hex()}" if isinstance(value, bytes) else str(type(value))


def number(content: bytes) -> int:
    """The number that a row adds to the sum of its table."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "big")


def checksum(values: Iterable[object]) -> bytes:
    """A hash (8 bytes) of the columns of a row that is checked by itself."""
    return hashlib.blake2b(body(values), digest_size=8).digest()


def sum_of(
    connection: sqlite3.Connection,
    name: str,
    where: str = "true",
    values: Sequence[Any] | Mapping[str, Any] = (),
) -> Sum:
    """Add up the rows that are there, or those for which a condition is true."""
    table, columns, rows = SUMMED[name]
    query = f"SELECT {', '.join(columns)} FROM {table} WHERE {rows} AND ({where})"
    count = total = 0
    for row in connection.execute(query, values):
        count += 1
        total += number(body(row))
    return Sum(count, total)


def kept_sum(connection: sqlite3.Connection, name: str) -> Sum | None:
    """The sum that agentpref kept; None if it is gone or damaged."""
    query = "SELECT rows, total FROM table_sum WHERE name = ?"
    found = connection.execute(query, (name,)).fetchone()
    if found is None or not isinstance(found[0], int) or not isinstance(found[1], bytes):
        return None
    return Sum(found[0], int.from_bytes(found[1], "big"))


def add(connection: sqlite3.Connection, name: str, rows: int, total: int) -> None:
    """Add rows to the kept sum, in the transaction that inserts them; negative for deleted ones.

    A sum that is gone or damaged stays so, for verification to find.
    """
    kept = kept_sum(connection, name)
    if kept is not None:
        keep(connection, name, Sum(kept.rows + rows, kept.total + total))


@contextmanager
def counted(
    connection: sqlite3.Connection,
    *names: str,
    where: str = "true",
    values: Sequence[Any] | Mapping[str, Any] = (),
) -> Iterator[None]:
    """Keep the sums of tables up to date while a block changes rows for which ``where`` is true.

    Call it in the transaction of the block. It reads these rows before and after.
    """
    before = [sum_of(connection, name, where, values) for name in names]
    yield
    for name, old in zip(names, before, strict=True):
        new = sum_of(connection, name, where, values)
        if new != old:
            add(connection, name, new.rows - old.rows, new.total - old.total)


def resum(connection: sqlite3.Connection, names: Iterable[str] = SUMMED) -> None:
    """Keep the sums of what is there now, right or wrong; of tables that an older schema has."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    there = {name for (name,) in connection.execute(query)}
    for name in (name for name in names if SUMMED[name].table in there):
        keep(connection, name, sum_of(connection, name))


def difference(connection: sqlite3.Connection, name: str) -> str | None:
    """Say how a table differs from what agentpref wrote; None if it does not.

    Call it in a transaction, or the writes of others come in between.
    """
    there, kept = sum_of(connection, name), kept_sum(connection, name)
    if kept is None:
        return MISSING
    if there.rows != kept.rows:
        what = f"{there.rows:,} are there, {kept.rows:,} were written"
        return f"its rows are not those that were written: {what}"
    if there.total % _MODULUS != kept.total:
        return CHANGED
    return None


MISSING = "its sum is missing or damaged, so nobody can say whether rows are gone"
CHANGED = "its rows are not as they were written; some were changed, and may be removed since"


def keep(connection: sqlite3.Connection, name: str, new: Sum) -> None:
    """Keep a sum in place of the one before."""
    connection.execute(
        "INSERT OR REPLACE INTO table_sum (name, rows, total) VALUES (?, ?, ?)",
        (name, new.rows, (new.total % _MODULUS).to_bytes(16, "big")),
    )
