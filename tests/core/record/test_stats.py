"""Stats and judged runs are right at any time, also in a home that kept counts before."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import NewerHome, RunExists
from agentpref.home import Home
from agentpref.record import database
from agentpref.record.database import connect, require_known_schema
from agentpref.record.integrity import examine
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.migrations import STEPS
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run, Source

ASKED = prompt_of(({"role": "user", "content": "2 + 2?"},))
SPACES = ("a", "b")
DATA = Path(__file__).parents[2] / "data"


def run(number: int, space: str = "a", thread: str | None = None, user: str | None = None) -> Run:
    output = {"role": "assistant", "content": f"{number}"}
    return Run(f"r{number}", space, float(number), ASKED, output, thread_id=thread, user_id=user)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    with closing(connect(Home.create(tmp_path_factory.mktemp("home")))) as connection:
        yield connection


def recount(connection: sqlite3.Connection, space: str | None) -> dict[str, Any]:
    """Count in Python, row by row."""
    runs = {run.run_id: run for run in everything(connection) if space in (None, run.namespace)}
    said = connection.execute("SELECT run_id, correction FROM feedback").fetchall()
    compared = connection.execute("SELECT run_a FROM comparison").fetchall()
    times = [run.created_at for run in runs.values()]
    return {
        "runs": len(runs),
        "threads": len({run.thread_id for run in runs.values()} - {None}),
        "users": len({run.user_id for run in runs.values()} - {None}),
        "feedback": sum(run_id in runs for run_id, _ in said),
        "corrections": sum(run_id in runs and fixed is not None for run_id, fixed in said),
        "comparisons": sum(run_id in runs for (run_id,) in compared),
        "first_at": min(times, default=None),
        "last_at": max(times, default=None),
    }


def everything(connection: sqlite3.Connection) -> list[Run]:
    return [run for space in SPACES for run in Store(connection).runs(space)]


def judged(connection: sqlite3.Connection) -> set[str]:
    store = Store(connection)
    return {run.run_id for space in SPACES for run in store.judged_runs(space)}


def add_run(connection: sqlite3.Connection, given: tuple[int, str, Any, Any]) -> None:
    with suppress(RunExists):
        Store(connection).add_run(run(*given))


def add_feedback(connection: sqlite3.Connection, given: tuple[int, str, Any, Source, bool]) -> None:
    number, key, score, source, corrects = given
    name = f"r{number}"
    if connection.execute("SELECT 1 FROM run WHERE run_id = ?", (name,)).fetchone():
        fixed = {"role": "assistant", "content": "x"} if corrects else None
        said = Feedback(
            f"f{given}", name, 1.0, key, score, source=source, correction=fixed, scale=(-1, 5)
        )
        Store(connection).add_feedback(said)


def add_comparison(connection: sqlite3.Connection, given: tuple[int, int]) -> None:
    places = [
        connection.execute("SELECT namespace FROM run WHERE run_id = ?", (f"r{n}",)).fetchone()
        for n in given
    ]
    if None not in places and places[0] == places[1]:
        a, b = (f"r{n}" for n in given)
        Store(connection).add_comparison(Comparison(f"c{given}", 1.0, a, b, "a"))


def delete_runs(connection: sqlite3.Connection, doomed: list[int]) -> None:
    """As forgetting does: what was said of them first, each table in one statement."""
    marks, names = ", ".join("?" * len(doomed)), [f"r{n}" for n in doomed]
    connection.execute(f"DELETE FROM feedback WHERE run_id IN ({marks})", names)
    connection.execute(
        f"DELETE FROM comparison WHERE run_a IN ({marks}) OR run_b IN ({marks})", names * 2
    )
    connection.execute(f"DELETE FROM run WHERE run_id IN ({marks})", names)


def delete_feedback(connection: sqlite3.Connection, key: str) -> None:
    connection.execute("DELETE FROM feedback WHERE key = ?", (key,))


def change(connection: sqlite3.Connection, given: tuple[int, Any, Any, Any]) -> None:
    number, thread, user, score = given
    names = (thread, user, f"r{number}")
    connection.execute("UPDATE run SET thread_id = ?, user_id = ? WHERE run_id = ?", names)
    connection.execute("UPDATE feedback SET score = ? WHERE run_id = ?", (score, f"r{number}"))


NUMBERS = st.integers(0, 4)
NAMES = st.sampled_from([None, "x", "y", "z"])
SCORES = st.sampled_from([None, -1.0, 0.0, 0.5, 1.0, 4.0])
KEYS = st.sampled_from(["thumbs", "stars"])
STEP = st.one_of(
    st.tuples(st.just(add_run), st.tuples(NUMBERS, st.sampled_from(SPACES), NAMES, NAMES)),
    st.tuples(
        st.just(add_feedback),
        st.tuples(NUMBERS, KEYS, SCORES, st.sampled_from(["human", "code"]), st.booleans()),
    ),
    st.tuples(st.just(add_comparison), st.tuples(NUMBERS, NUMBERS)),
    st.tuples(st.just(delete_runs), st.lists(NUMBERS, min_size=1, max_size=4)),
    st.tuples(st.just(delete_feedback), KEYS),
    st.tuples(st.just(change), st.tuples(NUMBERS, NAMES, NAMES, SCORES)),
)


@given(steps=st.lists(STEP, min_size=10, max_size=40))
@settings(max_examples=300, deadline=None)
def test_counts_are_right_after_any_writes_and_removals(
    steps: list[Any], shared: sqlite3.Connection
) -> None:
    shared.execute("BEGIN")
    try:
        for act, given_to_it in steps:
            act(shared, given_to_it)
            assert_true_counts(shared)
    finally:
        shared.execute("ROLLBACK")


def assert_true_counts(connection: sqlite3.Connection) -> None:
    store = Store(connection)
    assert store.stats() == recount(connection, None)
    for space in SPACES:
        assert store.stats(space) == recount(connection, space)
    assert store.namespaces() == sorted({run.namespace for run in everything(connection)})
    spoken_of = connection.execute(
        "SELECT run_id FROM feedback UNION SELECT run_a FROM comparison "
        "UNION SELECT run_b FROM comparison"
    )
    assert judged(connection) == {run_id for (run_id,) in spoken_of}


# Homes that kept counts in tables, by triggers

TALLY_TABLES = {"tally", "thread", "asker", "judged", "scale", "counted"}


def names(connection: sqlite3.Connection, kind: str) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = ?"
    return {name for (name,) in connection.execute(query, (kind,))}


def own_triggers(tmp_path: Path) -> set[str]:
    """Those of a new home."""
    with closing(connect(Home.create(tmp_path / "new"))) as connection:
        return names(connection, "trigger")


def test_a_home_of_0_1_0_loses_its_counting_triggers_and_tables_when_it_is_opened(
    tmp_path: Path,
) -> None:
    shutil.copytree(DATA / "home-0.1.0", tmp_path / "home")
    with closing(sqlite3.connect(tmp_path / "home" / "agentpref.db")) as old:
        assert names(old, "table") > TALLY_TABLES
        assert len(names(old, "trigger")) == 16
        (runs,) = old.execute("SELECT count(*) FROM run").fetchone()
    with closing(connect(Home.open(tmp_path / "home"))) as new:
        assert not names(new, "table") & TALLY_TABLES
        assert names(new, "trigger") == own_triggers(tmp_path)
        assert Store(new).stats()["runs"] == runs > 0
        assert examine(new).problems == []


def test_a_trigger_of_the_user_s_own_stays(tmp_path: Path) -> None:
    shutil.copytree(DATA / "home-0.1.0", tmp_path / "home")
    with closing(sqlite3.connect(tmp_path / "home" / "agentpref.db")) as old:
        old.execute("CREATE TRIGGER mine AFTER INSERT ON run BEGIN SELECT 1; END")
    with closing(connect(Home.open(tmp_path / "home"))) as new:
        assert names(new, "trigger") == {"mine", *own_triggers(tmp_path)}


def test_a_home_from_before_the_counting_step_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home.create(tmp_path / "home")
    before = next(step.version for step in STEPS if step.name == "tallies") - 1
    with monkeypatch.context() as patch:
        patch.setattr(database, "STEPS", STEPS[:before])
        with closing(connect(home)) as old:
            for number in range(4):
                row = run_row(run(number, SPACES[number % 2], "t", f"u{number}"))
                for node in row.nodes:
                    values = (*node[:2], node[2].decode())
                    old.execute("INSERT OR IGNORE INTO message VALUES (?, ?, ?)", values)
                old.execute(f"INSERT INTO run VALUES ({', '.join('?' * 15)})", row[:-1])
            old.execute(
                "INSERT INTO feedback (feedback_id, run_id, created_at, key, score, source)"
                " VALUES ('f', 'r0', 1, 'thumbs', 1, 'human')"
            )
            old.execute(
                "INSERT INTO comparison VALUES ('c', 1, 'r1', 'r3', 'a', 'human', NULL, NULL)"
            )
    with closing(connect(home)) as new:
        assert_true_counts(new)
        assert judged(new) == {"r0", "r1", "r3"}
        steps = new.execute("SELECT name FROM migration ORDER BY version").fetchall()
    assert [name for (name,) in steps] == [step.name for step in STEPS]


def test_an_older_program_is_told_to_upgrade_once_the_counts_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the tables of counts, so it must stop, even if it has the home open."""
    home = Home.create(tmp_path / "home")
    known = next(step.version for step in STEPS if step.name == "counted_when_asked") - 1
    with monkeypatch.context() as patch:
        patch.setattr(database, "STEPS", STEPS[:known])
        with closing(connect(home)) as old:
            patch.setattr(database, "STEPS", STEPS)
            connect(home).close()
            patch.setattr(database, "STEPS", STEPS[:known])
            with pytest.raises(NewerHome, match="upgrade"):
                require_known_schema(old, home)
            with pytest.raises(NewerHome, match="upgrade"):
                connect(home)
