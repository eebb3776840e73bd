"""Rows that were edited, inserted or removed by other hands break the chain of seals."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.record.database import PAGE_BYTES, connect, transaction
from agentpref.record.deletion.removal import choose, delete
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import COMPARISON_COLUMNS, FEEDBACK_COLUMNS, RUN_COLUMNS
from agentpref.record.seals import SEALED, last_seals, seal, seal_of
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
LEAF_OF_AN_INDEX = 10
"""The first byte of a page, in SQLite's file format."""
UNSEALED = "it is not as it was written, or a row before it is gone"


@pytest.fixture
def filled(home: Home, tmp_path: Path) -> Home:
    """Six runs, each judged twice, three comparisons, and two revisions that served."""
    with Log(home.path) as log:
        for n in range(3):
            asked = [{"role": "user", "content": f"{n} + {n}?"}]
            pair = [log.record(asked, answer, user_id="u") for answer in ("few", "many")]
            for run in pair:
                log.thumbs(run, up=True, user_id=f"u{n}")
                log.feedback(run, key="length", score=3)
            log.compare(*pair, winner="a")
    registry = Registry(home)
    for n in range(2):
        folder = write_adapter(tmp_path / f"adapter-{n}", seed=n)
        revision = registry.publish(folder, parent=None, model=IDENTITY, training={})
        registry.promote(revision.revision_id)
    return home


def edited(home: Home, sql: str) -> set[tuple[str, str]]:
    """The problems that a full check finds once this SQL was run, by table and words."""
    with closing(connect(home)) as connection:
        assert examine(connection).problems == []
        connection.execute("PRAGMA foreign_keys = OFF")
        assert connection.execute(sql).rowcount > 0
        return {(problem.table, problem.what) for problem in examine(connection).problems}


EDITS = {
    "run": "UPDATE run SET params = '{\"t\":1}' WHERE rowid = 3",
    "feedback": "UPDATE feedback SET score = 0 WHERE rowid = 5",
    "comparison": "UPDATE comparison SET winner = 'b' WHERE rowid = 2",
    "revision": "UPDATE revision SET created_at = 1.0 WHERE rowid = 1",
    "serving_history": "UPDATE serving_history SET at = 1.0 WHERE rowid = 2",
}


@pytest.mark.guarantee("verify")
@pytest.mark.parametrize("table", EDITS)
def test_an_edited_row_is_found(filled: Home, table: str) -> None:
    assert edited(filled, EDITS[table]) == {(table, UNSEALED)}


@pytest.mark.parametrize("table", EDITS)
def test_a_sample_finds_edited_rows_too(filled: Home, table: str) -> None:
    with closing(connect(filled)) as connection:
        connection.execute(EDITS[table])
        found = {(one.table, one.what) for one in examine(connection, sample=100).problems}
    assert found == {(table, UNSEALED)}


@pytest.mark.guarantee("verify")
def test_deleted_feedback_is_found_in_the_middle_and_at_the_end(filled: Home) -> None:
    copy = Home(filled.path.with_name("copy"))
    shutil.copytree(filled.path, copy.path)
    gone = ("feedback", "its rows are not those that were written: 11 are there, 12 were written")
    middle = "DELETE FROM feedback WHERE rowid = 4"
    assert edited(filled, middle) == {("feedback", UNSEALED), gone}
    last = "DELETE FROM feedback WHERE rowid = (SELECT max(rowid) FROM feedback)"
    assert edited(copy, last) == {gone}


@pytest.mark.guarantee("verify")
def test_feedback_that_another_program_wrote_is_found_and_not_sealed_later(filled: Home) -> None:
    forged = """INSERT INTO feedback (feedback_id, run_id, created_at, key, score, source)
        SELECT 'forged', run_id, 1.0, 'thumbs', 1.0, 'human' FROM run LIMIT 1"""
    words = "it has no seal: another program wrote or changed it"
    assert edited(filled, forged) == {("feedback", words)}
    with Log(filled.path) as log:
        run = log.record([{"role": "user", "content": "more"}], "yes")
        log.thumbs(run, up=True)
        assert [problem[1:] for problem in log.verify()] == [("forged", words)]


def test_rows_known_already_and_rows_of_one_batch_are_sealed_once(home: Home) -> None:
    asked = [{"role": "user", "content": "x"}]
    with Log(home.path) as log:
        for _ in range(3):
            log.record(asked, "y", run_id="same")
        log.record(asked, "another", run_id="same")
        log.flush()
        log.record(asked, "y", run_id="same")
        assert log.verify() == []
        assert log.dropped == {"RunExists": 1}


def test_a_home_stays_sealed_when_a_user_is_forgotten(filled: Home) -> None:
    with Log(filled.path) as log:
        log.forget("u1")
        assert log.verify() == []
        log.forget("u")
        assert log.verify() == []
        run = log.record([{"role": "user", "content": "more"}], "yes")
        log.thumbs(run, up=False)
        assert log.verify() == []


def test_forgetting_a_user_hides_no_other_change(filled: Home) -> None:
    with closing(connect(filled)) as connection:
        connection.execute("UPDATE feedback SET score = 0 WHERE rowid = 1")
    with Log(filled.path) as log:
        before = [problem.key for problem in log.verify()]
        log.forget("u2")
        assert [problem.key for problem in log.verify()] == before
        assert len(before) == 1


def test_a_removal_that_finds_nothing_seals_nothing_again(filled: Home) -> None:
    """It would read and write the whole home each night."""
    statements: list[str] = []
    with closing(connect(filled)) as connection, transaction(connection):
        choose(connection, "created_at < 0", "created_at < 0", {})
        connection.set_trace_callback(statements.append)
        assert delete(connection).runs == 0
    assert not [one for one in statements if "seal" in one]


def test_a_home_from_before_seals_is_sealed_when_it_is_opened(filled: Home) -> None:
    with closing(connect(filled)) as connection:
        true = last_seals(connection)
        for table in SEALED:
            connection.execute(f"UPDATE {table} SET seal = NULL")
            seal(connection, table)
        assert last_seals(connection) == true
        assert examine(connection).problems == []


def test_everything_that_a_row_of_the_record_says_is_sealed(home: Home) -> None:
    with closing(connect(home)) as connection:
        for table, columns in SEALED.items():
            there = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
            marks = {"tainted_at", "quarantined_at", "quarantine_reason", "pruned_at", "id", "seal"}
            assert set(columns) == there - marks
    assert SEALED["run"] == RUN_COLUMNS
    assert SEALED["feedback"] == FEEDBACK_COLUMNS
    assert SEALED["comparison"] == COMPARISON_COLUMNS


def test_a_number_is_sealed_as_sqlite_stores_it() -> None:
    assert seal_of(b"", [1, True]) == seal_of(b"", [1.0, 1.0])
    assert seal_of(b"", [1]) != seal_of(b"", ["1"])
    assert seal_of(b"", [None]) != seal_of(b"", [""])
    assert seal_of(b"", [b"\xff"]) != seal_of(b"", [b"\xfe"])


def test_sealing_again_makes_no_example_stale(filled: Home) -> None:
    with closing(connect(filled)) as connection:
        connection.execute("INSERT INTO listing VALUES ('default', 0, 0, '', '')")
        seal(connection, "feedback")
        assert connection.execute("SELECT count(*) FROM stale_prompt").fetchone() == (0,)
        connection.execute("UPDATE feedback SET score = 0 WHERE rowid = 1")
        assert connection.execute("SELECT count(*) FROM stale_prompt").fetchone() == (1,)


@pytest.mark.guarantee("verify")
def test_an_index_that_has_lost_a_row_is_found(filled: Home) -> None:
    """The row and its seal are as they were written; what looks it up by its id finds nothing."""
    with closing(connect(filled)) as connection:
        (key,) = connection.execute("SELECT feedback_id FROM feedback WHERE rowid = 5").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(filled.database.read_bytes())
    places = [found.start() for found in re.finditer(key.encode(), data)]
    (place,) = (at for at in places if data[at - at % PAGE_BYTES] == LEAF_OF_AN_INDEX)
    data[place + len(key) - 1] ^= 1
    filled.database.write_bytes(data)
    with closing(connect(filled, readonly=True)) as connection:
        look_up = "SELECT count(*) FROM feedback WHERE feedback_id = ?"
        assert connection.execute(look_up, (key,)).fetchone() == (0,)
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        assert {problem.table for problem in examine(connection).problems} == {"database"}
