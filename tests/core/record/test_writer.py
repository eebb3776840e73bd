"""The writer counts runs it cannot keep, and answers every caller that waits."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.errors import NotKept
from agentpref.home import Home
from agentpref.record import spill
from agentpref.record.database import connect, transaction
from agentpref.record.log import Log
from agentpref.types import Comparison, Feedback, Run

RunsIn: TypeAlias = "Callable[[Home], list[Run]]"
RunsOf: TypeAlias = "Callable[[Log], list[Run]]"
JudgedIn: TypeAlias = "Callable[[Home], tuple[list[Feedback], list[Comparison]]]"

ASKED = [{"role": "user", "content": "2 + 2?"}]


def test_many_threads_share_a_log(log: Log, runs_of: RunsOf, judged_in: JudgedIn) -> None:
    def work(name: int) -> None:
        for n in range(20):
            run_id = log.record(ASKED, f"{name} {n}")
            if n % 5 == 0:
                log.feedback(run_id, key="k", score=n, source="code")

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
    monkeypatch.setattr(spill, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(spill, "REST_SECONDS", 0.0)


@pytest.fixture
def locker(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(Home.create(tmp_path / "home"))
    yield connection
    connection.close()


@pytest.mark.usefixtures("impatient")
def test_runs_and_feedback_of_a_locked_database_are_stored_later(
    log: Log, locker: sqlite3.Connection, runs_of: RunsOf, judged_in: JudgedIn
) -> None:
    before = log.record(ASKED, "before")
    log.flush()
    with transaction(locker):
        during = log.record(ASKED, "during")
        log.feedback(before, key="k", score=1)
        log.feedback(during, key="k", score=0)
        log.compare(before, during, winner="a")
        assert runs_in_file(log.home.spill) == 1
    after = log.record(ASKED, "after")
    assert [run.run_id for run in runs_of(log)] == [before, during, after]
    feedback, comparisons = judged_in(log.home)
    assert [(said.run_id, said.score) for said in feedback] == [(before, 1.0), (during, 0.0)]
    assert [said.run_b for said in comparisons] == [during]
    assert not log.home.spill.exists()
    assert log.dropped == {}


def runs_in_file(path: Path) -> int:
    return sum(b'"run":' in line for line in path.read_bytes().splitlines())


@pytest.mark.usefixtures("impatient")
def test_feedback_does_not_wait_for_a_lock_that_is_known(
    log: Log, locker: sqlite3.Connection
) -> None:
    run_id = log.record(ASKED, "4")
    log.flush()
    with transaction(locker):
        log.feedback(run_id, key="k", score=1)
        assert log._writer._durable.trouble is not None
        log.feedback(run_id, key="k", score=1)
    log.feedback(run_id, key="k", score=1)
    assert log._writer._durable.trouble is None


@pytest.mark.usefixtures("impatient")
def test_a_strict_log_spills_too(
    tmp_path: Path, locker: sqlite3.Connection, runs_in: RunsIn
) -> None:
    with Log(tmp_path / "home", strict=True) as log:
        with transaction(locker):
            log.record(ASKED, "5")
        log.record(ASKED, "4")
        assert len(runs_in(log.home)) == 2


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A home that takes nothing, as one on a full disk: neither the database nor the spill."""

    def refuse(*_: object) -> None:
        raise NotKept("the disk is full; free space on it")

    with monkeypatch.context() as patch:
        patch.setattr("agentpref.record.writer.REST_SECONDS", 0.01)
        patch.setattr(spill.DurableWriter, "write", refuse)
        yield patch


def test_runs_wait_in_memory_when_nothing_can_be_written(
    log: Log,
    unwritable: pytest.MonkeyPatch,
    runs_of: RunsOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "agentpref"):
        ids = [log.record(ASKED, str(n)) for n in range(3)]
        assert log.flush() is False
        with pytest.raises(NotKept, match="free space"):
            log.feedback(ids[0], key="k", score=1)
    assert len(caplog.records) == 1
    unwritable.undo()
    assert log.flush()  # tries at once; feedback would wait for the next attempt
    log.feedback(ids[0], key="k", score=1)
    assert [run.run_id for run in runs_of(log)] == ids
    assert log.dropped == {}


def test_the_queue_is_bounded_in_bytes(tmp_path: Path, unwritable: pytest.MonkeyPatch) -> None:
    with Log(tmp_path / "home", queue_bytes=1_000) as log:
        for _ in range(3):
            log.record(ASKED, "x" * 300)
        assert log.dropped == {"queue-full": 1}
        unwritable.undo()
        assert log.flush()
        log.record(ASKED, "x" * 300)
        assert log.dropped == {"queue-full": 1}


def test_runs_that_close_cannot_write_are_counted(
    tmp_path: Path, unwritable: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(tmp_path / "home")
    log.record(ASKED, "4")
    with caplog.at_level(logging.WARNING, "agentpref"):
        log.close()
    assert log.dropped == {"NotKept": 1}
    assert "free space" in caplog.records[-1].message


def test_a_full_queue_drops_runs_and_accepts_feedback(
    tmp_path: Path, locker: sqlite3.Connection, runs_of: RunsOf
) -> None:
    with Log(tmp_path / "home", queue_size=2) as log:
        first = log.record(ASKED, "0")
        log.flush()
        with transaction(locker):
            log.record(ASKED, "in hand")
            while log._writer._queue:  # until the writer has it, and waits for the lock
                time.sleep(0.001)
            for n in range(5):
                log.record(ASKED, str(n))
        log.feedback(first, key="k", score=1)
        assert log.dropped == {"queue-full": 3}
        assert len(runs_of(log)) == 4


def test_flush_returns_at_its_deadline(log: Log, locker: sqlite3.Connection) -> None:
    with transaction(locker):
        log.record(ASKED, "4")
        assert log.flush(timeout=0.05) is False
    assert log.flush() is True


@pytest.mark.usefixtures("impatient")
def test_runs_and_feedback_of_a_full_database_are_stored_later(
    log: Log, runs_of: RunsOf, judged_in: JudgedIn
) -> None:
    run_id = log.record(ASKED, "4")
    log.flush()
    connection = log._writer._durable._database._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    log.correct(run_id, "x" * 100_000)
    log.record(ASKED, "y" * 100_000)
    log.flush()
    assert log.home.spill.stat().st_size > 200_000
    connection.execute("PRAGMA max_page_count = 1000000")
    assert len(runs_of(log)) == 2
    assert len(judged_in(log.home)[0]) == 1
    assert log.dropped == {}
    assert log.verify() == []


def test_a_clock_that_goes_back_is_warned_of_once(
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    runs_of: RunsOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1_700_000_000_000_000_000
    ticks = iter([now, now - 500_000_000, now - 3_600_000_000_000, now - 3_500_000_000_000])
    with caplog.at_level(logging.WARNING, "agentpref"), monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: next(ticks))
        ids = {log.record(ASKED, str(n)) for n in range(4)}
    assert {run.run_id for run in runs_of(log)} == ids
    assert [record.message for record in caplog.records] == [
        "the clock went back by 3600 s; runs keep the time at which they came"
    ]


def test_a_redactor_may_call_the_log(tmp_path: Path, runs_in: RunsIn) -> None:
    seen: list[str] = []

    def redact(text: str) -> str:
        if text == "4" and not seen:
            seen.append(log.record(ASKED, "from within"))
            log.feedback(seen[0], key="k", score=1)
        return text

    with Log(tmp_path / "home", redact=redact) as log:
        log.record(ASKED, "4")
        assert log.flush(timeout=30)
    assert len(runs_in(log.home)) == 2


def test_a_bug_of_ours_is_counted_and_the_log_keeps_working(
    log: Log, monkeypatch: pytest.MonkeyPatch, runs_of: RunsOf
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    said = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: said.set())
        patch.setattr(spill.DurableWriter, "write", fail)
        log.record(ASKED, "4")
        assert said.wait(10)
    assert log.dropped == {"unexpected": 1}
    log.record(ASKED, "5")
    assert len(runs_of(log)) == 1


def test_nothing_is_tried_or_warned_of_twice_while_nothing_can_be_written(
    log: Log, monkeypatch: pytest.MonkeyPatch, runs_of: RunsOf, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def refuse(_: object, records: list[object], *__: object) -> None:
        tried.append(len(records))
        raise NotKept("the disk is full; free space on it")

    now = time.time_ns()
    ticks = iter(range(now, now + 10**12, 2 * 10**9))  # the clock goes on by two seconds a call
    with caplog.at_level(logging.WARNING, "agentpref"), monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: next(ticks))
        patch.setattr("agentpref.record.writer.REST_SECONDS", 60.0)
        patch.setattr(spill.DurableWriter, "write", refuse)
        ids = [log.record(ASKED, "0")]
        assert log.flush() is False
        for n in range(50):
            ids.append(log.record(ASKED, str(n)))
            with pytest.raises(NotKept, match="free space"):
                log.feedback(ids[0], key="k", score=1)
        assert len(tried) == 1, "feedback waits for the next attempt no longer than for a lock"
        assert log.flush() is False
        assert tried[1:] == [51], "a flush tries at once"
    assert [record.message for record in caplog.records] == [
        "nothing can be written now, so that runs wait in memory: "
        "the disk is full; free space on it"
    ]
    assert [run.run_id for run in runs_of(log)] == ids


def test_a_finaliser_that_judges_in_the_middle_of_a_transaction_is_refused(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of the transaction that it would join is not its own."""
    run_id = log.record(ASKED, "4")
    log.flush()
    write, refused = spill.DurableWriter.write, []

    def judge_first(self: spill.DurableWriter, *arguments: object) -> object:
        with pytest.raises(NotKept, match="finaliser") as refusal:
            log.feedback(run_id, key="k", score=1)
        refused.append(refusal)
        return write(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(spill.DurableWriter, "write", judge_first)
        log.feedback(run_id, key="k", score=0)
    assert len(refused) == 1
