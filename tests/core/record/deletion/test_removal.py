"""What both ways of removing share, where neither's own tests would see it."""

from __future__ import annotations

from pathlib import Path

from agentpref.home import Home
from agentpref.record.deletion.removal import Removed, choose, delete, removal


def test_progress_tells_each_stage_and_its_end(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    home = Home.create(tmp_path / "home")
    with removal(home, lambda *stage: told.append(stage)) as connection:
        choose(connection, "true", "true", {})
        assert delete(connection) == Removed()
    stages = ("look for stray text", "remove", "scrub")
    assert told == [(stage, done, 1) for stage in stages for done in (0, 1)]


def test_no_message_is_asked_for_its_children(tmp_path: Path) -> None:
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
