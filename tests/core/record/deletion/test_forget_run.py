"""Forgetting one run leaves no byte of it, and a dry run leaves everything."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

import agentpref
from agentpref.errors import NotKept, UnknownRun, UnknownUser
from agentpref.home import Home
from agentpref.leftovers import PUBLISHING
from agentpref.record import database
from agentpref.record.database import connect
from agentpref.record.deletion.forget import Forgotten, forget, forget_run
from agentpref.record.deletion.removal import expire
from agentpref.record.integrity import examine
from agentpref.record.spill import Spill
from agentpref.types import Feedback

SECRET = "the-secret-of-one-run"
ASKED = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Home, list[str]]:
    """A home with three runs of one user, the middle one with a secret in every text of it."""
    with agentpref.Log(tmp_path / "home") as log:
        runs = [log.record(ASKED, text, user_id="ana") for text in ("a", SECRET, "c")]
        log.correct(runs[1], f"{SECRET}, corrected", user_id="ana", comment=SECRET)
        log.compare(runs[0], runs[1], winner="a", user_id="bob", comment=SECRET)
        log.compare(runs[0], runs[2], winner="b", user_id="bob")
    home = Home.open(tmp_path / "home")
    Spill(home).append([Feedback("waits", runs[1], 1.0, "k", 1.0, comment=SECRET)])
    return home, runs


def holding(home: Home, text: str) -> list[str]:
    files = (path for path in home.path.rglob("*") if path.is_file())
    return [path.name for path in files if text.encode() in path.read_bytes()]


def rows(home: Home) -> list[str]:
    with closing(connect(home)) as connection:
        return [*connection.iterdump()]


def test_no_byte_of_a_forgotten_run_is_left_and_the_others_stay(judged) -> None:
    home, runs = judged
    done = forget_run(home, runs[1])
    assert (done.runs, done.feedback, done.comparisons) == (1, 2, 1)
    assert holding(home, SECRET) == []
    with closing(connect(home)) as connection:
        assert examine(connection).problems == []
        left = connection.execute("SELECT run_id FROM run ORDER BY created_at").fetchall()
    assert left == [(runs[0],), (runs[2],)]
    assert forget(home, "ana").runs == 2, "the user was not forgotten with the run"


def test_a_removal_that_a_reader_stopped_is_completed_though_the_run_is_gone(
    judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, runs = judged
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    with closing(connect(home)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM run").fetchone()
        with pytest.raises(NotKept, match="run the same command again"):
            forget_run(home, runs[1])
    with pytest.raises(UnknownRun, match=runs[1]):
        forget_run(home, runs[1])
    assert holding(home, SECRET) == []
    assert forget_run(home, runs[1], missing_ok=True) == Forgotten()


def test_a_dry_run_changes_no_row_and_keeps_the_spill_and_what_was_left(judged) -> None:
    home, runs = judged
    half = home.adapters / f"{PUBLISHING}of-a-killed-update"
    half.mkdir(parents=True)
    before, waiting = rows(home), home.spill.read_bytes()
    assert forget(home, "ana", dry_run=True).runs == 3
    assert forget_run(home, runs[1], dry_run=True).comparisons == 1
    assert expire(home, older_than=1e-6, force=True, dry_run=True).runs == 3
    assert rows(home) == before
    assert home.spill.read_bytes() == waiting
    assert half.is_dir()
    forget(home, "ana")
    assert not half.exists()


def test_a_log_goes_on_during_a_dry_run(judged) -> None:
    home, _ = judged
    with agentpref.Log(home.path) as log:
        forget(home, "ana", dry_run=True)
        run = log.record(ASKED, "still here", user_id="ana")
        log.thumbs(run, up=True)
        assert log.flush(10)
        assert log.dropped == {}


def test_an_unknown_user_is_no_error_unless_that_is_asked_for(judged) -> None:
    home, _ = judged
    with pytest.raises(UnknownUser, match="nobody with the id 'eve'"):
        forget(home, "eve", missing_ok=False)
    assert forget(home, "eve") == Forgotten(), "a job may forget in homes that never saw the user"
    assert forget(home, "eve", missing_ok=False) == Forgotten(), "known as forgotten from now on"
