"""Many rows inserted together are the same as rows inserted one by one."""

from __future__ import annotations

import sqlite3

import pytest

from agentpref.record.database import MAX_PARAMETERS, insert_or_ignore


@pytest.fixture
def connection() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")
    return connection


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, 257, 1000])
def test_rows_are_inserted_in_their_order(connection: sqlite3.Connection, count: int) -> None:
    rows = [(count - n, str(n)) for n in range(count)]
    insert_or_ignore(connection, "t", ("k", "v"), rows)
    assert connection.execute("SELECT k, v FROM t ORDER BY k DESC").fetchall() == rows


def test_a_row_whose_key_is_taken_changes_nothing(connection: sqlite3.Connection) -> None:
    insert_or_ignore(connection, "t", ("k", "v"), [(1, "a"), (2, "b"), (1, "c")])
    insert_or_ignore(connection, "t", ("k", "v"), [(2, "d"), (3, "e")])
    assert connection.execute("SELECT v FROM t ORDER BY k").fetchall() == [("a",), ("b",), ("e",)]


def test_many_rows_take_few_statements_of_few_sizes(connection: sqlite3.Connection) -> None:
    seen: list[str] = []
    connection.set_trace_callback(seen.append)
    for count in range(1, 40):
        insert_or_ignore(connection, "t", ("k", "v"), [(count * 100 + n, "") for n in range(count)])
    inserts = [statement for statement in seen if statement.startswith("INSERT")]
    assert len(inserts) < 130
    assert len({statement.count("(") for statement in inserts}) == 6
    assert MAX_PARAMETERS < 999
