"""A connection has the current schema and our settings, or raises an error that names the cure."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import CorruptHome, NewerHome, NotAHome, NotKept
from agentpref.home import Home
from agentpref.record import database
from agentpref.record.database import (
    MAX_PARAMETERS,
    TROUBLES,
    connect,
    diagnose,
    insert_or_ignore,
    require_known_schema,
    transaction,
    translated,
)
from agentpref.record.messages import new_id
from agentpref.record.migrations import STEPS, Step

TABLES = {
    "message", "run", "feedback", "comparison", "updates", "update_pair", "logp", "revision",
    "serving", "serving_history", "migration", "forgotten", "forgotten_run", "pair_source",
    "feedback_scale", "listing", "stale_prompt", "judged_run", "example", "left_out",
    "table_sum", "user_key", "journal", "hold_reason", "answers", "judge", "verdict",
    "calibration",
}  # fmt: skip


@pytest.fixture
def connection(home: Home) -> Iterator[sqlite3.Connection]:
    with closing(connect(home)) as connection:
        yield connection


def tables(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {name for (name,) in rows if not name.startswith("sqlite_")}


def version(connection: sqlite3.Connection) -> int:
    (found,) = connection.execute("SELECT max(version) FROM migration").fetchone()
    return int(found)


def test_a_new_database_has_the_whole_schema(connection: sqlite3.Connection) -> None:
    assert tables(connection) == TABLES
    assert [step.version for step in STEPS] == list(range(1, len(STEPS) + 1))
    assert version(connection) == len(STEPS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 30_000)],
)
def test_every_connection_has_the_settings(
    home: Home, connection: sqlite3.Connection, setting: str, value: object
) -> None:
    with closing(connect(home)) as second:
        for each in (connection, second):
            assert each.execute(f"PRAGMA {setting}").fetchone() == (value,)


def test_a_new_database_waits_for_another_ones_lock(home: Home) -> None:
    """SQLite itself gives up at once where a file that is not yet WAL is being written."""
    with closing(sqlite3.connect(home.database, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(0.1, other.rollback).start()
        connect(home).close()


def test_an_older_database_is_brought_up_to_date(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, closing(_of_steps(home, STEPS[:2], patch)) as old:
        assert "updates" not in tables(old)
        old.execute("INSERT INTO message VALUES ('m', NULL, '{}')")
    with closing(connect(home)) as new:
        assert tables(new) == TABLES
        assert new.execute("SELECT id FROM message").fetchall() == [("m",)]


def _extra(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE extra (x)")


def _breaking(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE run RENAME COLUMN model TO engine")


ADDED = Step(len(STEPS) + 1, "extra", _extra)
BROKEN = Step(len(STEPS) + 2, "broken", _breaking, breaking=True)


def _of_steps(home: Home, steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> sqlite3.Connection:
    monkeypatch.setattr(database, "STEPS", steps)
    return connect(home)


def _upgraded(home: Home, *steps: Step) -> None:
    """What a later agentpref, which has these steps too, leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        _of_steps(home, [*STEPS, *steps], patch).close()


def test_an_upgrade_that_fails_keeps_the_steps_before_the_failure(home: Home) -> None:
    def bad(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        connection.execute("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(CorruptHome, match="nowhere"):
        _upgraded(home, ADDED, Step(len(STEPS) + 2, "bad", bad, breaking=True))
    with closing(connect(home)) as connection:
        assert tables(connection) == TABLES | {"extra"}
        assert version(connection) == len(STEPS) + 1


def test_a_process_killed_in_a_step_leaves_the_schema_before_it(home: Home) -> None:
    script = f"""if True:
        import os, sqlite3
        from agentpref.record import database
        from agentpref.home import Home
        from agentpref.record.migrations import STEPS, Step

        def dies(connection: sqlite3.Connection) -> None:
            connection.execute("DROP TABLE updates")
            os._exit(9)

        database.STEPS = [*STEPS[:3], Step(4, "dies", dies)]
        database.connect(Home.open({str(home.path)!r}))
    """
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with closing(sqlite3.connect(home.database)) as raw:
        assert version(raw) == 3
        assert "updates" in tables(raw)
    with closing(connect(home)) as connection:
        assert tables(connection) == TABLES


def test_two_processes_that_upgrade_at_once_apply_each_step_once(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has read the old version and waits for the lock while the first applies."""
    connect(home).close()
    applying = threading.Event()

    def slowly(connection: sqlite3.Connection) -> None:
        _extra(connection)
        applying.set()
        time.sleep(0.2)

    monkeypatch.setattr(database, "STEPS", [*STEPS, Step(len(STEPS) + 1, "slow", slowly)])
    first = threading.Thread(target=lambda: connect(home).close())
    first.start()
    assert applying.wait(10)
    connect(home).close()
    first.join()
    with closing(connect(home)) as connection:
        rows = connection.execute("SELECT version FROM migration ORDER BY version").fetchall()
    assert [n for (n,) in rows] == list(range(1, len(STEPS) + 2))


def test_a_home_with_a_newer_additive_step_still_works(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    _upgraded(home, ADDED)
    for _ in range(3):
        with closing(connect(home)) as connection:
            connection.execute("INSERT INTO message (id, body) VALUES (?, '{}')", (new_id(),))
            assert version(connection) == len(STEPS) + 1
    assert [record.name for record in caplog.records] == ["agentpref"]
    assert f"schema {len(STEPS) + 1}, this agentpref knows {len(STEPS)}" in caplog.text


def test_a_home_with_a_newer_breaking_step_is_refused(home: Home) -> None:
    _upgraded(home, ADDED, BROKEN)
    with pytest.raises(NewerHome, match=r"schema \d+.*pip install --upgrade agentpref"):
        connect(home)


def test_a_version_that_knows_the_breaking_step_works(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    _upgraded(home, ADDED, BROKEN, Step(len(STEPS) + 3, "more", lambda connection: None))
    with closing(_of_steps(home, [*STEPS, ADDED, BROKEN], monkeypatch)) as connection:
        assert connection.execute("SELECT engine FROM run").fetchall() == []


def test_a_breaking_step_stops_an_open_log_of_an_older_version(
    home: Home, connection: sqlite3.Connection
) -> None:
    _upgraded(home, ADDED)
    with transaction(connection):
        require_known_schema(connection, home)
    _upgraded(home, ADDED, BROKEN)
    with pytest.raises(NewerHome, match=str(home.database)), transaction(connection):
        require_known_schema(connection, home)


def test_a_writer_that_waited_during_a_breaking_step_is_stopped(home: Home) -> None:
    """He had a step of his own to apply; when he has the lock, it is applied, and more."""

    def overtaken(connection: sqlite3.Connection, home: Home) -> bool:
        waiting.undo()
        _upgraded(home, ADDED, BROKEN)
        return False

    with pytest.MonkeyPatch.context() as waiting:
        waiting.setattr(database, "STEPS", STEPS[:-1])
        connect(home).close()
        waiting.setattr(database, "STEPS", STEPS)
        waiting.setattr(database, "_apply_next", overtaken)
        with pytest.raises(NewerHome):
            connect(home)


def test_a_file_that_is_not_a_database_is_refused(home: Home) -> None:
    home.database.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorruptHome, match=r"agentpref\.db.*restore a backup"):
        connect(home)
    assert home.database.read_bytes().startswith(b"not a database")


def test_another_program_s_database_is_refused(home: Home) -> None:
    with closing(sqlite3.connect(home.database)) as foreign:
        foreign.execute("CREATE TABLE songs (title)")
    with pytest.raises(NotAHome, match="'songs'"):
        connect(home)


def test_a_folder_without_a_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAHome, match="agentpref init"):
        connect(Home(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_damaged_pages_raise_corrupt_home(home: Home) -> None:
    with closing(connect(home)) as connection:
        rows = ((f"m{n}", None, "x" * 500) for n in range(2_000))
        with transaction(connection):
            connection.executemany("INSERT INTO message VALUES (?, ?, ?)", rows)
    content = bytearray(home.database.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    home.database.write_bytes(content)
    with closing(connect(home)) as connection, pytest.raises(CorruptHome), translated(home):
        connection.execute("SELECT sum(length(body)) FROM message").fetchall()


def test_a_missing_table_raises_corrupt_home(home: Home, connection: sqlite3.Connection) -> None:
    connection.execute("DROP TABLE comparison")
    with pytest.raises(CorruptHome, match="no such table"), translated(home):
        connection.execute("SELECT * FROM comparison")


def test_a_readonly_connection_writes_nothing(home: Home) -> None:
    with closing(connect(home, readonly=True)) as connection:
        assert tables(connection) == TABLES
        with pytest.raises(NotKept, match="readonly"), translated(home):
            connection.execute("INSERT INTO message VALUES ('m', NULL, '{}')")


def test_a_folder_that_is_gone_is_refused(home: Home, tmp_path: Path) -> None:
    with pytest.raises(NotKept, match="read and write the folder"), translated(home):
        sqlite3.connect(tmp_path / "gone" / "agentpref.db")


def test_errors_in_our_own_sql_pass_unchanged(home: Home, connection: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError), translated(home):
        connection.execute("INSERT INTO message VALUES ('m', 'no such parent', '{}')")


def test_a_transaction_commits_all_or_nothing(connection: sqlite3.Connection) -> None:
    with suppress(ZeroDivisionError), transaction(connection):
        connection.execute("INSERT INTO message VALUES ('m', NULL, '{}')")
        with transaction(connection):
            connection.execute("INSERT INTO message VALUES ('n', NULL, '{}')")
        raise ZeroDivisionError
    assert not connection.in_transaction
    assert connection.execute("SELECT count(*) FROM message").fetchone() == (0,)


def test_a_revision_s_number_is_unique_in_a_home(connection: sqlite3.Connection) -> None:
    """All namespaces keep their revisions in one folder, under names that begin with it."""
    insert = (
        "INSERT INTO revision (revision_id, namespace, seq, created_at, manifest)"
        " VALUES (?, ?, 1, 0.0, '{}')"
    )
    connection.execute(insert, ("rev-000001-a", "one"))
    with pytest.raises(sqlite3.IntegrityError, match=r"revision\.seq"):
        connection.execute(insert, ("rev-000001-b", "other"))


# Inserting many rows


@pytest.fixture
def memory() -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:")
    memory.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")
    return memory


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, 257, 1000])
def test_rows_are_inserted_in_their_order(memory: sqlite3.Connection, count: int) -> None:
    rows = [(count - n, str(n)) for n in range(count)]
    insert_or_ignore(memory, "t", ("k", "v"), rows)
    assert memory.execute("SELECT k, v FROM t ORDER BY k DESC").fetchall() == rows


def test_a_row_whose_key_is_taken_changes_nothing(memory: sqlite3.Connection) -> None:
    insert_or_ignore(memory, "t", ("k", "v"), [(1, "a"), (2, "b"), (1, "c")])
    insert_or_ignore(memory, "t", ("k", "v"), [(2, "d"), (3, "e")])
    assert memory.execute("SELECT v FROM t ORDER BY k").fetchall() == [("a",), ("b",), ("e",)]


def test_many_rows_take_few_statements_of_few_sizes(memory: sqlite3.Connection) -> None:
    seen: list[str] = []
    memory.set_trace_callback(seen.append)
    for count in range(1, 40):
        insert_or_ignore(memory, "t", ("k", "v"), [(count * 100 + n, "") for n in range(count)])
    inserts = [statement for statement in seen if statement.startswith("INSERT")]
    assert len(inserts) < 130
    assert len({statement.count("(") for statement in inserts}) == 6
    assert MAX_PARAMETERS < 999


@pytest.mark.parametrize("message", ["disk I/O error", "unable to open database file"])
def test_an_error_of_a_disk_without_room_is_called_full(
    home: Home, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """SQLite calls it so where it cannot grow the file that its processes share."""
    error = sqlite3.OperationalError(message)
    assert diagnose(error, home) is not TROUBLES["is full"]
    disk = os.statvfs(home.path)
    full = os.statvfs_result((*disk[:4], 0, *disk[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert diagnose(error, home) is TROUBLES["is full"]
    assert diagnose(sqlite3.OperationalError("database is locked"), home) is TROUBLES["is locked"]


def test_a_home_is_read_where_sqlite_cannot_make_the_files_that_readers_share(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(home).close()
    real = sqlite3.connect

    def refuse(place: object, **options: Any) -> sqlite3.Connection:
        if not options.get("uri"):
            raise sqlite3.OperationalError("unable to open database file")
        return real(place, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(NotKept, match="let this user read and write"):
        connect(home)
    with closing(connect(home, readonly=True)) as connection:
        assert connection.execute("SELECT count(*) FROM run").fetchone() == (0,)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM run")
