"""The durable writer stores records in the database, or in the spill until it can."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.errors import NotKept, UnknownRun
from agentpref.home import Home
from agentpref.record import spill as module
from agentpref.record.database import PAGE_BYTES, connect, transaction
from agentpref.record.messages import RunRow, new_id, prompt_of, run_row
from agentpref.record.opened import OpenDatabase
from agentpref.record.spill import Drained, DurableWriter, drain
from agentpref.record.store import Store
from agentpref.types import Feedback, Run


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "REST_SECONDS", 0.0)


@pytest.fixture
def writer(home: Home) -> Iterator[DurableWriter]:
    with closing(DurableWriter(home)) as writer:
        yield writer


@pytest.fixture
def locker(home: Home) -> Iterator[sqlite3.Connection]:
    with closing(connect(home)) as connection:
        yield connection


def a_run(answer: str = "4") -> RunRow:
    prompt = prompt_of([{"role": "user", "content": "2 + 2?"}])
    return run_row(Run(new_id(), "n", 1.0, prompt, {"role": "assistant", "content": answer}))


def on(run_id: str) -> Feedback:
    return Feedback(new_id(), run_id, 2.0, "k", 1.0)


def held(home: Home) -> tuple[set[str], set[str]]:
    with closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        return (
            {run.run_id for run in store.runs("n")},
            {said.feedback_id for said in store.feedback("n")},
        )


def test_one_refused_record_does_not_stop_the_others(home: Home, writer: DurableWriter) -> None:
    run, good, bad = a_run(), on(""), on("nowhere")
    good = on(run.run_id)
    outcomes = writer.write([bad, good, run])
    assert [type(outcome) for outcome in outcomes] == [UnknownRun, type(None), type(None)]
    assert held(home) == ({run.run_id}, {good.feedback_id})


def test_the_spill_is_stored_before_later_records(
    home: Home, writer: DurableWriter, locker: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_run()
    with transaction(locker):
        writer.write([run])
        assert home.spill.exists()
    said = on(run.run_id)
    with caplog.at_level(logging.INFO, "agentpref"):
        assert writer.write([said]) == [None]
    assert held(home) == ({run.run_id}, {said.feedback_id})
    assert "1 entries went to the database" in caplog.text


def test_a_database_in_trouble_is_left_alone_and_warned_of_once(
    home: Home,
    writer: DurableWriter,
    locker: sqlite3.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To try a full disk at each judgement took fifty times as long as the judgement."""
    opened, real = [], OpenDatabase.open

    def counted(self: OpenDatabase, patience: float) -> sqlite3.Connection:
        opened.append(patience)
        return real(self, patience)

    monkeypatch.setattr(OpenDatabase, "open", counted)
    monkeypatch.setattr(module, "REST_SECONDS", 60.0)
    with caplog.at_level(logging.WARNING, "agentpref"):
        with transaction(locker):
            for _ in range(5):
                assert writer.write([a_run()]) == [None]
            assert opened == [module.PATIENCE_SECONDS]
            monkeypatch.setattr(module, "REST_SECONDS", 0.0)
            writer._rest(NotKept("still locked"))
            assert writer.write([a_run()]) == [None]
            assert opened[1:] == [0.0], "it is tried again, and waits for no lock"
        assert writer.write([a_run()]) == [None]
    assert len(held(home)[0]) == 7
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2, warnings
    assert warnings[1].endswith("takes runs and feedback again")


def test_another_process_stores_the_spill(home: Home, locker: sqlite3.Connection) -> None:
    run = a_run()
    with closing(DurableWriter(home)) as first, transaction(locker):
        first.write([run, on(run.run_id)])
    with closing(DurableWriter(home)) as second:
        assert second.write([on(run.run_id)]) == [None]
    runs, feedback = held(home)
    assert (runs, len(feedback)) == ({run.run_id}, 2)


def test_drain_stores_the_spill(home: Home, locker: sqlite3.Connection) -> None:
    assert drain(home) == Drained(0, 0, 0)
    with closing(DurableWriter(home)) as writer, transaction(locker):
        writer.write([a_run()])
        with pytest.raises(NotKept, match="locked"):
            drain(home)
    assert drain(home) == Drained(1, 0, 0)
    assert len(held(home)[0]) == 1


def test_spilled_feedback_on_an_unknown_run_goes_to_the_refused_file(
    home: Home, writer: DurableWriter, locker: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with transaction(locker):
        assert writer.write([on("nowhere")]) == [None]
    with caplog.at_level(logging.WARNING, "agentpref"):
        writer.write([a_run()])
    assert "1 entries" in caplog.text
    assert b"nowhere" in home.refused.read_bytes()


@pytest.mark.guarantee("record")
def test_a_crash_before_the_spill_is_removed_stores_nothing_twice(
    home: Home, writer: DurableWriter, locker: sqlite3.Connection
) -> None:
    run = a_run()
    with transaction(locker):
        writer.write([run, on(run.run_id)])
    spilled = home.spill.read_bytes()
    writer.drain()
    home.spill.write_bytes(spilled)  # as if the process had died before it removed the file
    writer.drain()
    runs, feedback = held(home)
    assert (len(runs), len(feedback)) == (1, 1)


def test_writing_to_a_home_that_is_gone_raises_not_kept(home: Home, writer: DurableWriter) -> None:
    writer.close()
    shutil.rmtree(home.path)
    with pytest.raises(NotKept, match="was removed or moved while a log has it open"):
        writer.write([a_run()])
    assert not home.path.exists()


def test_a_record_that_breaks_the_schema_is_refused_alone(
    home: Home, writer: DurableWriter
) -> None:
    good, bad = a_run("good"), a_run("bad")
    orphan = bad._replace(nodes=bad.nodes[-1:], prompt="0" * 32)
    outcomes = writer.write([orphan, good, on(good.run_id)])
    assert [type(outcome) for outcome in outcomes] == [NotKept, type(None), type(None)]
    assert held(home)[0] == {good.run_id}


@pytest.mark.guarantee("record")
def test_records_go_to_the_spill_when_the_database_is_damaged(
    home: Home, writer: DurableWriter
) -> None:
    writer.close()
    for suffix in ("-wal", "-shm"):
        home.path.joinpath(home.database.name + suffix).unlink(missing_ok=True)
    home.database.write_bytes(b"not a database at all" * 1000)
    assert writer.write([a_run()]) == [None]
    assert home.spill.exists()


# What is written to disk. Ids of messages are hashes, so each one changes a page of its own.


def runs_of(first: int, count: int) -> list[RunRow]:
    made = []
    for n in range(first, first + count):
        prompt = prompt_of([{"role": "user", "content": f"question {n} ".ljust(250, "x")}])
        output = {"role": "assistant", "content": f"answer {n} ".ljust(250, "y")}
        made.append(run_row(Run(new_id(), "n", float(n), prompt, output)))
    return made


def wal_bytes(home: Home) -> int:
    return home.path.joinpath(home.database.name + "-wal").stat().st_size


def test_a_run_on_its_own_writes_at_most_eight_pages(
    home: Home, writer: DurableWriter, locker: sqlite3.Connection
) -> None:
    writer.write(runs_of(0, 20_000))
    locker.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for run in runs_of(20_000, 50):
        writer.write([run])
    assert wal_bytes(home) < 50 * 8 * (PAGE_BYTES + 24)  # 24: a frame's header


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts a process's writes")
def test_a_batch_is_written_to_the_wal_and_nowhere_else(
    home: Home, writer: DurableWriter, locker: sqlite3.Connection
) -> None:
    writer.write(runs_of(0, 10_000))
    locker.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    some = runs_of(10_000, 500)
    before = bytes_written()
    writer.write(some)
    assert bytes_written() - before < 1.1 * wal_bytes(home)


def bytes_written() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])
