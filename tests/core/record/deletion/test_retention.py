"""Runs that are old enough go, with what hangs on them, unless the clock must be wrong."""

from __future__ import annotations

import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import ConfigError, ImplausibleClock, NotAHome, RecordError, UpdateRunning
from agentpref.home import Home
from agentpref.record.database import connect, exclusive
from agentpref.record.deletion import retention
from agentpref.record.deletion.removal import Removed
from agentpref.record.deletion.retention import expire
from agentpref.record.integrity import examine
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.spill import Spill
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

DAY = 86_400.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


def run(run_id: str, days: float, text: str, **fields: Any) -> Run:
    """A run that was recorded some days ago."""
    prompt = prompt_of([{"role": "user", "content": "2 + 2?"}])
    output = {"role": "assistant", "content": text}
    return Run(run_id, "default", time.time() - days * DAY, prompt, output, **fields)


@pytest.fixture
def aged(home: Home) -> Home:
    """Two old runs and two young ones, of one prompt, with judgements within and across."""
    with closing(connect(home)) as connection:
        store = Store(connection)
        for name, days in (("old-1", 100), ("old-2", 91), ("young-1", 89), ("young-2", 0)):
            store.add_run(run(name, days, f"{name}-text" * 50))
            fixed = {"role": "assistant", "content": f"{name}-fixed"}
            store.add_feedback(Feedback(f"f-{name}", name, 1.0, "k", 1.0, correction=fixed))
        for n, pair in enumerate(
            [("old-1", "old-2"), ("old-2", "young-1"), ("young-1", "young-2")]
        ):
            store.add_comparison(Comparison(f"c{n}", 1.0, *pair, "a"))
        connection.execute(
            "INSERT INTO revision (revision_id, namespace, seq, created_at, manifest)"
            " VALUES ('r1', 'default', 1, 1, '{}')"
        )
    return home


def left(home: Home) -> dict[str, list[str]]:
    with closing(connect(home)) as connection:
        store = Store(connection)
        assert examine(connection).problems == []
        return {
            "runs": [each.run_id for each in store.runs("default")],
            "feedback": [each.feedback_id for each in store.feedback("default")],
            "comparisons": [each.comparison_id for each in store.comparisons("default")],
        }


def test_what_is_older_goes_with_what_was_said_of_it(aged: Home) -> None:
    removed = expire(aged, older_than=90 * DAY)
    assert removed == Removed(runs=2, feedback=2, comparisons=2, messages=4, shared=1)
    assert left(aged) == {
        "runs": ["young-1", "young-2"],
        "feedback": ["f-young-1", "f-young-2"],
        "comparisons": ["c2"],
    }
    files = [path.read_bytes() for path in aged.path.rglob("*") if path.is_file()]
    assert not any(b"old-1-text" in content or b"old-2-fixed" in content for content in files)
    assert any(b"young-1-text" in content for content in files)
    assert expire(aged, older_than=90 * DAY) == Removed()


def test_what_waits_in_the_spill_is_looked_at_too(aged: Home) -> None:
    Spill(aged).append([run_row(run("spilled", 95, "x")), run_row(run("fresh", 1, "y"))])
    assert expire(aged, older_than=90 * DAY).runs == 3
    assert "fresh" in left(aged)["runs"]


def test_nothing_is_tainted_and_nobody_forgotten(aged: Home) -> None:
    expire(aged, older_than=90 * DAY)
    with closing(connect(aged)) as connection:
        assert connection.execute("SELECT tainted_at FROM revision").fetchone() == (None,)
        assert connection.execute("SELECT count(*) FROM forgotten").fetchone() == (0,)


@pytest.mark.parametrize("age", [0, -1.0, math.inf, math.nan])
def test_what_is_no_age_is_refused(aged: Home, age: float) -> None:
    with pytest.raises(ConfigError, match=r"older_than is .* above 0"):
        expire(aged, older_than=age)
    assert len(left(aged)["runs"]) == 4


def test_a_clock_that_ran_ahead_removes_nothing(aged: Home, monkeypatch) -> None:
    """A year ahead, every run is old."""
    now = time.time() + 365 * DAY
    monkeypatch.setattr(retention.time, "time", lambda: now)
    with pytest.raises(ImplausibleClock, match="none would be left; nothing was removed"):
        expire(aged, older_than=90 * DAY)
    monkeypatch.undo()
    assert len(left(aged)["runs"]) == 4


def test_a_clock_that_fell_behind_removes_nothing(aged: Home, monkeypatch) -> None:
    now = time.time() - 7200
    monkeypatch.setattr(retention.time, "time", lambda: now)
    with pytest.raises(
        ImplausibleClock, match="after this clock's now; nothing was removed"
    ) as why:
        expire(aged, older_than=90 * DAY)
    assert isinstance(why.value, RecordError)
    monkeypatch.setattr(retention.time, "time", lambda: now + 5400)
    assert expire(aged, older_than=90 * DAY).runs == 2, "half an hour is what clocks differ by"


def test_forced_it_takes_the_clock_as_it_is(aged: Home) -> None:
    assert expire(aged, older_than=1e-3, force=True).runs == 4
    with closing(connect(aged)) as connection:
        assert connection.execute("SELECT count(*) FROM message").fetchone() == (0,)


def test_an_empty_home_has_nothing_that_expires(home: Home) -> None:
    assert expire(home, older_than=DAY) == Removed()


def test_while_an_update_runs_nothing_is_removed(aged: Home) -> None:
    with exclusive(aged), pytest.raises(UpdateRunning):
        expire(aged, older_than=90 * DAY)
    assert len(left(aged)["runs"]) == 4


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAHome):
        expire(tmp_path, older_than=DAY)
