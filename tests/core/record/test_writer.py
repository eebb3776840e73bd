"""The writer counts what it cannot keep, answers those that wait, and blocks nobody else."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.errors import NotKept
from agentpref.record import database
from agentpref.record.database import connect, transaction
from agentpref.record.home import Home
from agentpref.record.log import Log
from agentpref.types import Comparison, Feedback, Run

RunsIn: TypeAlias = "Callable[[Home], list[Run]]"
RunsOf: TypeAlias = "Callable[[Log], list[Run]]"
JudgedIn: TypeAlias = "Callable[[Home], tuple[list[Feedback], list[Comparison]]]"

ASKED = [{"role": "user", "content": "2 + 2?"}]


def test_threads_share_a_log(log: Log, runs_of: RunsOf, judged_in: JudgedIn) -> None:
    def work(name: int) -> None:
        for n in range(20):
            run_id = log.record(ASKED, f"{name} {n}")
            if n % 5 == 0:
                log.feedback(run_id, key="k", score=n)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.output["content"] for run in runs_of(log)}) == 80
    assert len(judged_in(log.home)[0]) == 16
    assert log.verify() == []
    assert log.dropped == {}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)


@pytest.fixture
def locker(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(Home.create(tmp_path / "home"))
    yield connection
    connection.close()


@pytest.mark.usefixtures("impatient")
def test_a_locked_database_is_counted_and_said_once(
    log: Log, locker: sqlite3.Connection, caplog: pytest.LogCaptureFixture, runs_of: RunsOf
) -> None:
    kept = log.record(ASKED, "kept")
    log.flush()
    with transaction(locker), caplog.at_level(logging.WARNING, "agentpref"):
        for n in range(3):
            log.record(ASKED, str(n))
            log.flush()
        with pytest.raises(NotKept, match="end the process that holds the database"):
            log.feedback(kept, key="k", score=1)
    assert log.dropped == {"locked": 3}
    assert len(caplog.records) == 1
    log.feedback(kept, key="k", score=1)
    assert [run.run_id for run in runs_of(log)] == [kept]


@pytest.mark.usefixtures("impatient")
def test_a_strict_log_raises_what_others_count(
    tmp_path: Path, locker: sqlite3.Connection, runs_in: RunsIn
) -> None:
    with Log(tmp_path / "home", strict=True) as log:
        log.record(ASKED, "4")
        with transaction(locker), pytest.raises(NotKept, match="locked"):
            log.record(ASKED, "5")
        assert log.dropped == {}
        assert len(runs_in(log.home)) == 1


def test_a_full_queue_drops_runs_and_takes_feedback(
    tmp_path: Path, locker: sqlite3.Connection, runs_of: RunsOf
) -> None:
    with Log(tmp_path / "home", queue_size=2) as log:
        first = log.record(ASKED, "0")
        log.flush()
        with transaction(locker):
            log.record(ASKED, "in hand")
            assert not log.flush(timeout=0.2)  # the writer now waits for the lock
            for n in range(5):
                log.record(ASKED, str(n))
        log.feedback(first, key="k", score=1)
        assert log.dropped == {"queue-full": 3}
        assert len(runs_of(log)) == 4


def test_flush_keeps_its_deadline(log: Log, locker: sqlite3.Connection) -> None:
    with transaction(locker):
        log.record(ASKED, "4")
        assert log.flush(timeout=0.05) is False
    assert log.flush() is True


def test_a_full_disk_loses_nothing_that_was_acknowledged(log: Log, runs_of: RunsOf) -> None:
    run_id = log.record(ASKED, "4")
    log.flush()
    pages = log._writer._connection.execute("PRAGMA page_count").fetchone()[0]
    log._writer._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(NotKept, match="free space"):
        log.correct(run_id, "x" * 100_000)
    log.record(ASKED, "y" * 100_000)
    log.flush()
    assert log.dropped == {"full": 1}
    assert len(runs_of(log)) == 1
    assert log.verify() == []
