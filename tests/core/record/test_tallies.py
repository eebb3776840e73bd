"""Counts that are kept equal counts that are made anew, whatever came and went."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.home import Home
from agentpref.record import database
from agentpref.record.database import connect
from agentpref.record.messages import prompt_of
from agentpref.record.migrations import STEPS
from agentpref.record.store import Store
from agentpref.record.tallies import Scale, catch_up, scales
from agentpref.types import Comparison, Feedback, Run, Source

ASKED = prompt_of(({"role": "user", "content": "2 + 2?"},))
SPACES = ("a", "b")

RECOUNT = """
SELECT count(*) AS runs, count(DISTINCT thread_id) AS threads, count(DISTINCT user_id) AS users,
    (SELECT count(*) FROM feedback JOIN run USING (run_id) WHERE {this}) AS feedback,
    (SELECT count(correction) FROM feedback JOIN run USING (run_id) WHERE {this}) AS corrections,
    (SELECT count(*) FROM comparison JOIN run ON run_id = run_a WHERE {this}) AS comparisons,
    min(created_at) AS first_at, max(created_at) AS last_at
FROM run WHERE {this}
"""


def run(number: int, space: str = "a", thread: str | None = None, user: str | None = None) -> Run:
    output = {"role": "assistant", "content": f"{number}"}
    return Run(f"r{number}", space, float(number), ASKED, output, thread_id=thread, user_id=user)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect(Home.create(tmp_path / "home"))) as connection:
        yield connection


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    with closing(connect(Home.create(tmp_path_factory.mktemp("home")))) as connection:
        yield connection


def recount(connection: sqlite3.Connection, space: str | None) -> dict[str, Any]:
    this = "true" if space is None else "run.namespace = :space"
    cursor = connection.execute(RECOUNT.format(this=this), {"space": space})
    return dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))


def rescaled(connection: sqlite3.Connection, space: str) -> list[Scale]:
    query = """SELECT key, source, count(*), sum(score < 0), sum(abs(score) > 1)
        FROM feedback JOIN run USING (run_id)
        WHERE namespace = ? AND score IS NOT NULL AND correction IS NULL
        GROUP BY key, source ORDER BY key, source"""
    return [Scale(*row) for row in connection.execute(query, (space,))]


def judged(connection: sqlite3.Connection) -> set[str]:
    store = Store(connection)
    return {run.run_id for space in SPACES for run in store.judged_runs(space)}


def add_run(connection: sqlite3.Connection, given: tuple[int, str, Any, Any]) -> None:
    Store(connection).add_run(run(*given))


def add_feedback(connection: sqlite3.Connection, given: tuple[int, str, Any, Source, bool]) -> None:
    number, key, score, source, corrects = given
    name = f"r{number}"
    if connection.execute("SELECT 1 FROM run WHERE run_id = ?", (name,)).fetchone():
        fixed = {"role": "assistant", "content": "x"} if corrects else None
        said = Feedback(f"f{given}", name, 1.0, key, score, source=source, correction=fixed)
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


def count(connection: sqlite3.Connection, limit: int) -> None:
    catch_up(connection, limit=limit)


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
    st.tuples(st.just(count), st.integers(1, 20)),
)


@given(steps=st.lists(STEP, min_size=10, max_size=40))
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_a_recount(steps: list[Any], shared: sqlite3.Connection) -> None:
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
        assert sorted(scales(connection, space)) == rescaled(connection, space)
    named = connection.execute("SELECT DISTINCT namespace FROM run ORDER BY namespace")
    assert store.namespaces() == [name for (name,) in named]
    spoken_of = connection.execute(
        "SELECT run_id FROM feedback UNION SELECT run_a FROM comparison "
        "UNION SELECT run_b FROM comparison"
    )
    there = {run_id for (run_id,) in connection.execute("SELECT run_id FROM run")}
    assert {run_id for (run_id,) in spoken_of} <= judged(connection) <= there


def test_an_older_home_is_counted_when_it_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home.create(tmp_path / "home")
    before = next(step.version for step in STEPS if step.name == "tallies") - 1
    with monkeypatch.context() as patch:
        patch.setattr(database, "STEPS", STEPS[:before])
        with closing(connect(home)) as old:
            for number in range(4):
                Store(old).add_run(run(number, SPACES[number % 2], "t", f"u{number}"))
            add_feedback(old, (0, "thumbs", 1.0, "human", False))
            add_feedback(old, (1, "thumbs", -1.0, "human", False))
            add_feedback(old, (0, "thumbs", None, "human", True))
            add_comparison(old, (1, 3))
    with closing(connect(home)) as new:
        assert_true_counts(new)
        assert judged(new) == {"r0", "r1", "r3"}
        assert not catch_up(new), "nothing was left to be counted"
        add_run(new, (5, "a", "t", "u5"))
        catch_up(new)
        assert_true_counts(new)


def test_catching_up_goes_step_by_step(connection: sqlite3.Connection) -> None:
    for number in range(5):
        add_run(connection, (number, "a", None, None))
    assert not catch_up(connection, lag=6)
    assert connection.execute("SELECT runs FROM tally WHERE namespace = 'a'").fetchone() is None
    assert [catch_up(connection, lag=1, limit=2) for _ in range(3)] == [True, True, False]
    counted = connection.execute("SELECT runs FROM tally WHERE namespace = 'a'").fetchone()
    assert counted == (5,)
    assert not catch_up(connection)
    assert Store(connection).stats("a")["runs"] == 5


def test_counts_hold_after_a_vacuum(connection: sqlite3.Connection) -> None:
    """It may number rows anew, which is why the last that was counted is known by its id."""
    for number in range(6):
        add_run(connection, (number, "a", f"t{number}", None))
    catch_up(connection, limit=4)
    delete_runs(connection, [0, 1])
    connection.execute("VACUUM")
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("UPDATE run SET rowid = rowid - 2")
    assert_true_counts(connection)


def test_nothing_of_somebody_who_is_gone_stays_in_the_counts(
    connection: sqlite3.Connection,
) -> None:
    add_run(connection, (1, "a", "their-thread", "their-name"))
    add_feedback(connection, (1, "thumbs", 1.0, "human", False))
    catch_up(connection)
    delete_runs(connection, [1])
    for table in ("thread", "asker", "judged"):
        assert connection.execute(f"SELECT * FROM {table}").fetchall() == []


@pytest.mark.parametrize(
    ("column", "value"),
    [("key", "stars"), ("score", 4.0), ("source", "code"), ("correction", ASKED.id)],
)
def test_feedback_that_is_changed_is_counted_anew(
    connection: sqlite3.Connection, column: str, value: object
) -> None:
    add_run(connection, (1, "a", None, None))
    add_feedback(connection, (1, "thumbs", 1.0, "human", False))
    catch_up(connection)
    connection.execute(f"UPDATE feedback SET {column} = ?", (value,))
    assert_true_counts(connection)
