"""Removal of runs by age, and what every removal does."""

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
from agentpref.record.deletion import removal as module
from agentpref.record.deletion.removal import Removed, choose, delete, expire, removal
from agentpref.record.integrity import examine
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.seals import seal
from agentpref.record.spill import Spill, drain
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

DAY = 86_400.0


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
        seal(connection, "revision")
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


def test_runs_older_than_the_age_are_removed_with_their_judgements(aged: Home) -> None:
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


def test_old_runs_in_the_spill_are_removed_too(aged: Home) -> None:
    Spill(aged).append([run_row(run("spilled", 95, "x")), run_row(run("fresh", 1, "y"))])
    assert expire(aged, older_than=90 * DAY).runs == 3
    assert "fresh" in left(aged)["runs"]


def test_expiry_taints_no_revision_and_keeps_no_tombstone(aged: Home) -> None:
    expire(aged, older_than=90 * DAY)
    with closing(connect(aged)) as connection:
        assert connection.execute("SELECT tainted_at FROM revision").fetchone() == (None,)
        assert connection.execute("SELECT count(*) FROM forgotten").fetchone() == (0,)


@pytest.mark.parametrize("age", [0, -1.0, math.inf, math.nan])
def test_an_age_that_is_not_above_zero_is_refused(aged: Home, age: float) -> None:
    with pytest.raises(ConfigError, match=r"older_than is .* above 0"):
        expire(aged, older_than=age)
    assert len(left(aged)["runs"]) == 4


def test_nothing_is_removed_when_the_clock_is_ahead(aged: Home, monkeypatch) -> None:
    """A year ahead, every run is old."""
    now = time.time() + 365 * DAY
    monkeypatch.setattr(module.time, "time", lambda: now)
    with pytest.raises(ImplausibleClock, match="no run would be left; nothing was removed"):
        expire(aged, older_than=90 * DAY)
    monkeypatch.undo()
    assert len(left(aged)["runs"]) == 4


def test_nothing_is_removed_when_the_clock_is_behind(aged: Home, monkeypatch) -> None:
    now = time.time() - 7200
    monkeypatch.setattr(module.time, "time", lambda: now)
    with pytest.raises(
        ImplausibleClock, match="after this clock's present time; nothing was removed"
    ) as why:
        expire(aged, older_than=90 * DAY)
    assert isinstance(why.value, RecordError)
    monkeypatch.setattr(module.time, "time", lambda: now + 5400)
    assert expire(aged, older_than=90 * DAY).runs == 2, "half an hour is what clocks differ by"


def test_force_removes_although_the_clock_looks_wrong(aged: Home) -> None:
    assert expire(aged, older_than=1e-3, force=True).runs == 4
    with closing(connect(aged)) as connection:
        assert connection.execute("SELECT count(*) FROM message").fetchone() == (0,)


def test_nothing_is_removed_from_an_empty_home(home: Home) -> None:
    assert expire(home, older_than=DAY) == Removed()


def test_nothing_is_removed_while_an_update_runs(aged: Home) -> None:
    with exclusive(aged), pytest.raises(UpdateRunning):
        expire(aged, older_than=90 * DAY)
    assert len(left(aged)["runs"]) == 4


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAHome):
        expire(tmp_path, older_than=DAY)


def test_expiry_deletes_old_lines_from_the_file_of_refused_entries(aged: Home) -> None:
    now = time.time()
    lost = [Feedback(f"f{days}", "nowhere", now - days * DAY, "k", 1.0) for days in (95, 5)]
    Spill(aged).append(lost)
    assert drain(aged).refused == 2
    expire(aged, older_than=90 * DAY)
    left = aged.refused.read_text(encoding="utf-8")
    assert ['"f95"' in left, '"f5"' in left] == [False, True]  # a line begins with hex digits


def test_progress_reports_the_start_and_the_end_of_each_stage(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    home = Home.create(tmp_path / "home")
    with removal(home, lambda *stage: told.append(stage)) as connection:
        choose(connection, "true", "true", {})
        assert delete(connection) == Removed()
    stages = ("remove", "scrub")
    assert told == [(stage, done, 1) for stage in stages for done in (0, 1)]


def test_deleting_a_message_scans_no_table(tmp_path: Path) -> None:
    """Without an index on parents, a check of foreign keys would scan all messages for each."""
    with removal(Home.create(tmp_path / "home"), lambda *stage: None) as connection:
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (0,)
        plans = [
            step
            for query in (
                "DELETE FROM message WHERE id = 'x'",
                "DELETE FROM run WHERE run_id = 'x'",
            )
            for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {query}")
        ]
    assert not any("SCAN" in step for step in plans)
