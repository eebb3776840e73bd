"""Another process holds the database for half a minute; another one has a later schema."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agentpref.record.log import Log

ASKED = [{"role": "user", "content": "2 + 2?"}]

HOLD = """
import sys, time
from agentpref.record.database import connect, transaction
from agentpref.home import Home

with transaction(connect(Home.open(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    sys.stdin.read()  # and until the test is done, however slow the machine is
"""

LATER_VERSION = """
import sys
from contextlib import closing
from agentpref.record import migrations
from agentpref.record.database import connect
from agentpref.home import Home
from agentpref.record.spill import drain

@migrations.breaking_step
def of_the_future(connection):
    connection.execute("CREATE TABLE of_the_future (x)")

home = Home.open(sys.argv[1])
drain(home)
with closing(connect(home)) as connection:
    for table in ("run", "feedback"):
        print(table, connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
"""


@contextmanager
def held_for(home: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(home), str(seconds)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


@pytest.mark.guarantee("logging")
def test_a_lock_held_for_half_a_minute_delays_a_call_by_seconds_at_most_and_loses_nothing(
    tmp_path: Path,
    held: Callable[[Path], dict[str, set[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with closing(Log(tmp_path / "home")) as log, caplog.at_level(logging.WARNING, "agentpref"):
        before = log.record(ASKED, "before")
        log.flush()
        with held_for(tmp_path / "home", seconds=30) as holder:
            runs = [before, *(log.record(ASKED, f"during {n}") for n in range(50))]
            said = {log.feedback(run, key="thumbs", score=1) for run in runs}
            assert log.flush()
            assert holder.poll() is None  # all of that was acknowledged while the lock was held
        runs.append(log.record(ASKED, "after"))
        assert log.flush()
        assert log.dropped == {}
    begun, ended = (record.message for record in caplog.records)
    assert "locked" in begun
    assert "spill.jsonl" in begun
    assert ended.endswith("agentpref.db takes runs and feedback again")
    there = held(tmp_path / "home")
    assert there["run"] == {*runs}
    assert there["feedback"] == said


@pytest.mark.guarantee("crashes")
def test_a_writer_of_an_older_version_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def as_later_version() -> str:
        command = [sys.executable, "-c", LATER_VERSION, str(tmp_path / "home")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with closing(Log(tmp_path / "home")) as log, caplog.at_level(logging.WARNING, "agentpref"):
        run = log.record(ASKED, "before")
        log.flush()
        assert as_later_version() == "run 1\nfeedback 0\n"
        log.record(ASKED, "after")
        log.feedback(run, key="thumbs", score=1)
        assert log.flush()
        assert log.dropped == {}
    assert "upgrade" in caplog.records[0].message
    assert as_later_version() == "run 2\nfeedback 1\n"
