"""A log whose database is removed, moved or replaced acknowledges nothing that nobody finds."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.errors import NotKept, UnknownRun
from agentpref.home import Home
from agentpref.record import spill, writer
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.opened import OpenDatabase
from agentpref.record.transfer.backup import backup
from agentpref.types import Comparison, Feedback, Run

JudgedIn: TypeAlias = "Callable[[Home], tuple[list[Feedback], list[Comparison]]]"
RunsIn: TypeAlias = "Callable[[Home], list[Run]]"

ASKED = [{"role": "user", "content": "2 + 2?"}]
REST = 0.05


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (spill, writer):
        monkeypatch.setattr(module, "REST_SECONDS", REST)


@pytest.fixture
def run(log: Log) -> str:
    name = log.record(ASKED, "4", user_id="ana")
    log.thumbs(name, up=True, user_id="ana")
    return name


def shell(command: str, folder: Path) -> None:
    subprocess.run(command, shell=True, check=True, cwd=folder)


def sound(home: Home) -> bool:
    with closing(sqlite3.connect(home.database)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.guarantee("record")
def test_feedback_waits_in_the_spill_while_the_database_is_gone(
    log: Log, run: str, judged_in: JudgedIn, caplog: pytest.LogCaptureFixture
) -> None:
    shell("mv agentpref.db kept.db", log.home.path)
    with caplog.at_level(logging.WARNING, "agentpref"):
        said = log.thumbs(run, up=False)
    assert log.home.spill.exists()
    assert len(caplog.records) == 1
    assert "was removed or moved while a log has it open; put it back" in caplog.text
    assert not log.home.database.exists()
    shell("mv kept.db agentpref.db", log.home.path)
    last = log.thumbs(run, up=True)
    while log.home.spill.exists():  # the log brings it to the database by itself
        time.sleep(0.001)
    assert [each.feedback_id for each in judged_in(log.home)[0]][1:] == [said, last]
    assert log.verify() == []


def test_a_moved_database_is_complete_and_leaves_no_log_at_its_path(log: Log, run: str) -> None:
    """SQLite would apply the log to whatever database is put there."""
    shell("mv agentpref.db kept.db", log.home.path)
    log.thumbs(run, up=False)
    assert not {"agentpref.db-wal", "agentpref.db-shm"} & {p.name for p in log.home.path.iterdir()}
    with closing(sqlite3.connect(log.home.path / "kept.db")) as kept:
        assert kept.execute("SELECT count(*) FROM feedback").fetchone() == (1,)


@pytest.mark.guarantee("record")
@pytest.mark.parametrize("command", ["rm -r home", "mv home elsewhere", "rm -r home; mkdir home"])
def test_feedback_raises_when_the_home_is_gone_or_another_folder(
    log: Log, run: str, command: str
) -> None:
    shell(command, log.home.path.parent)
    with pytest.raises(NotKept, match="home was removed or moved while a log has it open"):
        log.thumbs(run, up=False)
    log.record(ASKED, "5")
    assert log.flush() is False
    log.close()
    assert log.dropped == {"removed": 1}
    assert not log.home.path.exists() or not [*log.home.path.iterdir()]


def test_runs_that_wait_are_written_when_the_home_comes_back(
    log: Log, run: str, runs_in: RunsIn
) -> None:
    shell("mv home elsewhere", log.home.path.parent)
    log.record(ASKED, "5")
    assert log.flush() is False
    shell("mv elsewhere home", log.home.path.parent)
    assert log.flush()
    assert [each.output["content"] for each in runs_in(log.home)] == ["4", "5"]
    assert run == runs_in(log.home)[0].run_id


@pytest.mark.guarantee("logging")
def test_a_log_goes_on_in_the_home_that_took_the_place_of_its_own(
    log: Log,
    run: str,
    runs_in: RunsIn,
    judged_in: JudgedIn,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shell("mv home elsewhere", log.home.path.parent)
    with Log(log.home.path) as other, caplog.at_level(logging.WARNING, "agentpref"):
        name = other.record(ASKED, "5", user_id="ana")
        other.flush()
        with pytest.raises(UnknownRun):
            log.thumbs(run, up=False)
        log.thumbs(name, up=True, user_id="ana")
        log.record(ASKED, "6", user_id="ana")
        log.flush()
    assert "was replaced while a log had it open" in caplog.text
    here, there = runs_in(log.home), runs_in(Home(log.home.path.with_name("elsewhere")))
    assert [each.output["content"] for each in here] == ["5", "6"]
    assert [each.output["content"] for each in there] == ["4"]
    assert here[0].user_id == here[1].user_id == judged_in(log.home)[0][0].user_id
    assert here[0].user_id != there[0].user_id, "the new home has keys of its own"


@pytest.mark.guarantee("record")
@pytest.mark.parametrize(
    "command", ["cp {} new && mv new agentpref.db", "rm agentpref.db; cp {} ."]
)
def test_a_database_that_is_restored_under_an_open_log_stays_sound(
    log: Log, run: str, command: str, judged_in: JudgedIn
) -> None:
    copy = Path(backup(log.home, log.home.path.with_name("copy")).path)
    for _ in range(20):
        log.thumbs(log.record(ASKED, "later" * 300), up=True)
    shell(command.format(copy / "agentpref.db"), log.home.path)
    said = log.thumbs(run, up=False)
    log.close()
    assert sound(log.home)
    assert [each.feedback_id for each in judged_in(log.home)[0]][1:] == [said]


def test_the_guide_s_recipe_for_a_restore_loses_nothing_beside_an_app_that_was_not_stopped(
    tmp_path: Path, runs_in: RunsIn, judged_in: JudgedIn
) -> None:
    guide = Path(__file__).parents[3] / "docs" / "replicas.md"
    recipe = guide.read_text(encoding="utf-8").partition("## Restore")[2]
    assert "Stop the app first" in recipe
    commands = re.findall(r"^\$ (.*)$", recipe.partition("```console")[2].partition("```")[0], re.M)
    assert len(commands) == 3
    with Log(tmp_path / "lyon") as log:
        first = log.record(ASKED, "4")
        log.flush()
        backup(log.home, tmp_path / "outbox" / "lyon")
        later = log.record(ASKED, "5")
        told = [log.thumbs(later, up=True)]
        shell(commands[0], tmp_path)  # what was in the home's place is in its place again
        told.append(log.thumbs(first, up=True))
        for command in commands[1:]:
            shell(command.replace("agentpref", f"{sys.executable} -m agentpref_cli", 1), tmp_path)
        told.append(log.thumbs(later, up=True))
    assert [run.run_id for run in runs_in(log.home)] == [first, later]
    assert {said.feedback_id for said in judged_in(log.home)[0]} == set(told)


def test_a_log_of_changes_that_is_removed_costs_nothing(
    log: Log, run: str, judged_in: JudgedIn
) -> None:
    shell("rm agentpref.db-wal", log.home.path)
    log.thumbs(run, up=False)
    assert len(judged_in(log.home)[0]) == 2
    assert sound(log.home)


def test_a_removal_in_the_middle_of_a_transaction_is_noticed(
    log: Log, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = spill._judge

    def remove_first(*arguments: object) -> object:
        shutil.rmtree(log.home.path, ignore_errors=True)
        return judge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(spill, "_judge", remove_first)
    with pytest.raises(NotKept, match="was removed or moved"):
        log.thumbs(run, up=False)


@pytest.fixture
def opened(home: Home) -> Iterator[OpenDatabase]:
    with closing(OpenDatabase(home)) as opened:
        yield opened


def test_a_database_is_not_displaced_by_what_happens_every_day(opened: OpenDatabase) -> None:
    with Log(opened._home.path) as log:
        log.thumbs(log.record(ASKED, "4"), up=True)
    opened.require_in_place()
    backup(opened._home, opened._home.path.with_name("copy"))
    opened.require_in_place()
    os.utime(opened._home.database)
    opened.require_in_place()
    assert opened.generation == 0


CUT = """
import os, sys
from agentpref.errors import AgentprefError
from agentpref.record.log import Log

log = Log(sys.argv[1])
run = log.record([{"role": "user", "content": "2 + 2?"}], "4")
for _ in range(20):
    log.thumbs(run, up=True)
file = os.path.join(sys.argv[1], sys.argv[2])
os.truncate(file, os.stat(file).st_size // int(sys.argv[3]) if sys.argv[3] != "0" else 0)
print(*(log.thumbs(run, up=False) for _ in range(5)), flush=True)
os._exit(0)  # as a kill: a log that is cut is not written back
"""


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("end", ["", "-wal", "-shm"])
def test_feedback_is_kept_when_a_file_of_the_open_database_is_cut(
    home: Home, part: int, end: str
) -> None:
    """A cut index would end the process with a bus error."""
    command = [sys.executable, "-c", CUT, str(home.path), f"agentpref.db{end}", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = f"agentpref.db{end} was cut while a log has it open"
    assert told in done.stderr
    acknowledged = set(done.stdout.split())
    assert len(acknowledged) == 5
    if end == "-shm":
        with closing(sqlite3.connect(home.database)) as connection:
            rows = connection.execute("SELECT feedback_id FROM feedback")
            assert acknowledged <= {name for (name,) in rows}
        assert sound(home)
    else:
        lines = home.spill.read_text().splitlines()
        assert all(any(name in line for line in lines) for name in acknowledged)


def test_a_removal_that_empties_the_log_cuts_nothing(log: Log, run: str) -> None:
    for _ in range(20):
        log.thumbs(run, up=True)
    size = log.home.database_files[1].stat().st_size
    log.forget("nobody")
    assert log.home.database_files[1].stat().st_size < size
    log.thumbs(run, up=False)
    assert not log.home.spill.exists()
    assert log.verify() == []


def test_a_database_that_is_a_link_leaves_the_home_where_it_is(log: Log, run: str) -> None:
    """SQLite knows it by its real path, where there are no keys and no spill."""
    log.close()
    home = log.home
    shell("mkdir ../disk; mv agentpref.db ../disk; ln -s ../disk/agentpref.db .", home.path)
    with Log(home.path) as again:
        again.thumbs(again.record(ASKED, "five", user_id="ana"), up=False, user_id="ana")
        assert again.altered == {}
        assert again.verify() == []
        assert again.forget("ana").runs == 2
    home.spill.write_text("0000 not what was written}\n")
    with closing(connect(home)) as connection:
        assert [problem.table for problem in examine(connection).problems] == ["spill"]


@pytest.mark.parametrize("cut", ["agentpref.db", "agentpref.db-wal"])
def test_a_link_to_a_database_that_is_cut_to_nothing_is_told(
    log: Log, run: str, cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    log.close()
    home = log.home
    shell("mkdir ../disk; mv agentpref.db ../disk; ln -s ../disk/agentpref.db .", home.path)
    with Log(home.path) as again:
        for up in (False, True, False):
            again.thumbs(run, up=up)
        with caplog.at_level(logging.WARNING, "agentpref"):
            os.truncate(home.path.with_name("disk") / cut, 0)
            again.thumbs(run, up=True)
        assert home.spill.exists()
        assert f"{cut} was cut while a log has it open" in caplog.text
