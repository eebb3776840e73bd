"""Inserting many rows with few statements.

Python gives up the interpreter's lock for every statement that SQLite runs, and a busy host takes
its time to give it back (5 ms, the switch interval): a row at a time, a thread that computes would
starve the thread that writes. So rows go in by hundreds, as one statement with many VALUES. Knows
nothing of what the rows are.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any

MAX_PARAMETERS = 900
"""Values bound in one statement at most: what every build of SQLite allows is 999."""


def insert_or_ignore(
    connection: sqlite3.Connection,
    table: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
) -> None:
    """Insert rows, in their order; one whose key is taken changes nothing."""
    start = 0
    while start < len(rows):
        count = _statement_size(len(rows) - start, MAX_PARAMETERS // len(columns))
        values = tuple(chain.from_iterable(rows[start : start + count]))
        connection.execute(statement(table, tuple(columns), count), values)
        start += count


def _statement_size(left: int, most: int) -> int:
    """The largest power of two that fits: few sizes, so that prepared statements are used again."""
    return 1 << (min(left, most).bit_length() - 1)


@functools.lru_cache(maxsize=64)
def statement(table: str, columns: tuple[str, ...], count: int = 1) -> str:
    """Write the statement that inserts so many rows, or ignores those whose key is taken."""
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * count)}"
