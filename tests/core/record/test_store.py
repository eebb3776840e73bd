"""The store returns records as they were written, and edits are found."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import CorruptHome, InvalidFeedback, InvalidMessage, RunExists, UnknownRun
from agentpref.home import Home
from agentpref.record.database import connect, transaction
from agentpref.record.integrity import examine
from agentpref.record.messages import RUN_COLUMNS, prompt_of, run_row
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

TURNS = ({"role": "user", "content": "2 + 2?"},)


def run(run_id: str = "r1", content: str = "4", **fields: Any) -> Run:
    values = {"namespace": "default", "created_at": 1.0, "prompt": prompt_of(TURNS)} | fields
    return Run(run_id, output={"role": "assistant", "content": content}, **values)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(Home.create(tmp_path / "home"))
    yield connection
    connection.close()


@pytest.fixture
def store(connection: sqlite3.Connection) -> Store:
    return Store(connection)


def test_a_run_is_read_as_it_was_written(store: Store) -> None:
    tools = ({"type": "function", "function": {"name": "add"}},)
    given_run = run(
        prompt=prompt_of(({"role": "system", "content": "s"}, *TURNS), tools),
        model="tiny",
        revision="rev-000001-abc",
        thread_id="t",
        trace_id="x",
        user_id="u",
        params={"temperature": 0.5},
        token_ids=(1, 2),
        logprobs=(-0.5, -1.25),
        tags=("a", "b"),
        metadata={"nested": {"list": [1, None]}},
    )
    store.add_run(given_run)
    assert store.run("r1") == given_run


def test_a_run_s_columns_are_the_fields_of_a_run() -> None:
    assert tuple(field.name for field in fields(Run)) == RUN_COLUMNS


TOOL = {"type": "function", "function": {"name": "add", "description": "a + b"}}
REORDERED = {"function": {"description": "a + b", "name": "add"}, "type": "function"}


def test_keys_come_back_in_the_order_they_were_given_in(
    store: Store, connection: sqlite3.Connection
) -> None:
    """A chat template that writes a tool as JSON makes other tokens of another order."""
    store.add_run(run(prompt=prompt_of(TURNS, [TOOL])))
    (tool,) = store.run("r1").prompt.tools
    assert orjson.dumps(tool) == orjson.dumps(TOOL)
    assert orjson.dumps(store.run("r1").prompt.messages) == orjson.dumps(TURNS)
    assert examine(connection).problems == []


def test_prompts_that_differ_only_in_key_order_share_the_first_body(store: Store) -> None:
    for run_id, tool in (("r1", TOOL), ("r2", REORDERED)):
        store.add_run(run(run_id, prompt=prompt_of(TURNS, [tool])))
    first, second = store.run("r1").prompt, store.run("r2").prompt
    assert first.id == second.id
    assert orjson.dumps(first.tools) == orjson.dumps(second.tools) == orjson.dumps([TOOL])


def test_feedback_and_comparisons_are_read_as_they_were_written(
    store: Store, connection: sqlite3.Connection
) -> None:
    store.add_run(run("r1"))
    store.add_run(run("r2", "four"))
    correction = {"role": "assistant", "content": "It is 4."}
    said = Feedback("f1", "r1", 2.0, "k", 0.5, {"x": 1}, "why", "model", "u", correction)
    judged = Comparison("c1", 3.0, "r1", "r2", "tie", "code", "u", "same")
    store.add_feedback(said)
    store.add_comparison(judged)
    assert list(store.feedback("default")) == [said]
    assert list(store.comparisons("default")) == [judged]
    assert examine(connection).problems == []


def test_a_second_write_of_a_run_changes_nothing(store: Store) -> None:
    store.add_run(run("r1", "4"))
    store.add_run(run("r1", "4"))
    assert [r.output["content"] for r in store.runs("default")] == ["4"]


def test_another_run_under_a_known_id_is_refused_and_changes_nothing(store: Store) -> None:
    store.add_run(run("r1", "4"))
    with pytest.raises(RunExists, match="run 'r1' exists with another prompt, answer"):
        store.add_run(run("r1", "5"))
    with pytest.raises(RunExists):
        store.add_run(run("r1", "4", namespace="other"))
    assert [r.output["content"] for r in store.runs("default")] == ["4"]
    batch = [run("r2", "a"), run("r2", "b"), run("r2", "a")]
    refusals = store.add_runs([*map(run_row, batch)])
    assert [type(refusal).__name__ for refusal in refusals] == ["NoneType", "RunExists", "NoneType"]


def test_runs_of_a_namespace_are_read_oldest_first(store: Store) -> None:
    for run_id, at, namespace in [("b", 2.0, "x"), ("a", 3.0, "x"), ("c", 1.0, "y")]:
        store.add_run(run(run_id, created_at=at, namespace=namespace))
    assert [r.run_id for r in store.runs("x")] == ["b", "a"]
    assert store.namespaces() == ["x", "y"]


def test_a_conversation_of_n_turns_costs_n_rows(
    store: Store, connection: sqlite3.Connection
) -> None:
    turns: list[dict[str, str]] = []
    for n in range(20):
        turns.append({"role": "user", "content": f"question {n}"})
        store.add_run(run(f"r{n}", f"answer {n}", prompt=prompt_of(turns), created_at=n))
        turns.append({"role": "assistant", "content": f"answer {n}"})
    assert connection.execute("SELECT count(*) FROM message").fetchone() == (40,)
    assert [len(r.prompt.messages) for r in store.runs("default")] == list(range(1, 41, 2))


def test_stats_count_one_namespace_or_the_home(store: Store) -> None:
    store.add_run(run("r1", thread_id="t", user_id="u"))
    store.add_run(run("r2", thread_id="t", created_at=5.0))
    store.add_run(run("r3", namespace="other"))
    store.add_comparison(Comparison("c", 1.0, "r1", "r2", "a"))
    fixed = {"role": "assistant", "content": "x"}
    store.add_feedback(Feedback("f1", "r1", 1.0, "thumbs", 1.0))
    store.add_feedback(Feedback("f2", "r1", 1.0, "correction", correction=fixed))
    assert store.stats("default") == {
        "runs": 2, "threads": 1, "users": 1, "feedback": 2, "corrections": 1, "comparisons": 1,
        "first_at": 1.0, "last_at": 5.0,
    }  # fmt: skip
    assert store.stats()["runs"] == 3
    assert store.stats("none")["last_at"] is None


def test_feedback_on_an_unknown_run_names_it(store: Store) -> None:
    with pytest.raises(UnknownRun, match="'nowhere'"):
        store.add_feedback(Feedback("f1", "nowhere", 1.0, "thumbs", 1.0))
    store.add_run(run("r1"))
    with pytest.raises(UnknownRun, match="'nowhere'"):
        store.add_comparison(Comparison("c1", 1.0, "r1", "nowhere", "a"))
    with pytest.raises(UnknownRun, match="'nowhere'"):
        store.run("nowhere")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"prompt": prompt_of(({"role": "user", "content": "2 + 3?"},))}, "prompts"),
        ({"namespace": "other"}, "namespaces"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    store: Store, fields: dict[str, Any], what: str
) -> None:
    store.add_run(run("r1"))
    store.add_run(run("r2", **fields))
    with pytest.raises(InvalidFeedback, match=what):
        store.add_comparison(Comparison("c1", 1.0, "r1", "r2", "a"))
    assert list(store.comparisons("default")) == []


def test_a_refused_run_leaves_nothing(store: Store, connection: sqlite3.Connection) -> None:
    broken = replace(run(), output={"role": "assistant", "content": "\ud800"})
    with pytest.raises(InvalidMessage, match="the output"):
        store.add_run(broken)
    assert connection.execute("SELECT count(*) FROM message").fetchone() == (0,)


def test_writes_join_the_callers_transaction(store: Store, connection: sqlite3.Connection) -> None:
    with contextlib.suppress(ZeroDivisionError), transaction(connection):
        store.add_run(run("r1"))
        raise ZeroDivisionError
    assert list(store.runs("default")) == []


EDITS = [
    ("UPDATE message SET body = '{}' WHERE parent IS NULL", "message"),
    ("UPDATE message SET body = 'not json' WHERE parent IS NULL", "message"),
    ("UPDATE message SET body = replace(body, '{', '{\"content\":\"6\",')", "message"),
    (f"UPDATE message SET body = '{'[' * 999 + ']' * 999}'", "message"),
    ("UPDATE message SET parent = 'gone' WHERE parent IS NOT NULL", "message"),
    ("DELETE FROM message WHERE parent IS NULL", "run"),
    ("UPDATE run SET output = prompt", "run"),
    ("UPDATE run SET tags = 'not json'", "run"),
    ("DELETE FROM run WHERE run_id = 'r1'", "feedback"),
    ("DELETE FROM run WHERE run_id = 'r2'", "comparison"),
    ("UPDATE feedback SET correction = (SELECT prompt FROM run)", "feedback"),
    ("UPDATE feedback SET value = 'not json'", "feedback"),
    ("UPDATE feedback SET source = 'oracle'", "feedback"),
    ("UPDATE comparison SET source = 'oracle'", "comparison"),
    ("UPDATE comparison SET winner = 'c'", "comparison"),
]


@pytest.mark.parametrize(("edit", "table"), EDITS)
def test_a_check_finds_edited_rows(
    store: Store, connection: sqlite3.Connection, edit: str, table: str
) -> None:
    store.add_run(run("r1"))
    store.add_run(run("r2", "5"))
    store.add_feedback(Feedback("f1", "r1", 1.0, "thumbs", 1.0))
    store.add_comparison(Comparison("c1", 1.0, "r1", "r2", "a"))
    assert examine(connection).problems == []
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(edit)
    assert table in {problem.table for problem in examine(connection).problems}


def test_reading_a_run_without_its_message_raises_corrupt_home(
    store: Store, connection: sqlite3.Connection
) -> None:
    store.add_run(run("r1"))
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("DELETE FROM message")
    with pytest.raises(CorruptHome, match="agentpref verify"):
        store.run("r1")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT},
        optional={"name": TEXT, "extra": JSON},
    ),
    min_size=1,
    max_size=5,
)
RUNS = st.builds(
    Run,
    run_id=TEXT,
    namespace=st.just("n"),
    created_at=st.floats(0, 1e10),
    prompt=st.builds(prompt_of, MESSAGES, st.lists(st.dictionaries(TEXT, JSON), max_size=2)),
    output=st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}),
    model=st.none() | TEXT,
    user_id=st.none() | TEXT,
    params=st.dictionaries(TEXT, JSON, max_size=2),
    token_ids=st.none() | st.lists(st.integers(0, 10**6)).map(tuple),
    logprobs=st.none() | st.lists(st.floats(-100, 0)).map(tuple),
    tags=st.lists(TEXT, max_size=2).map(tuple),
    metadata=st.dictionaries(TEXT, JSON, max_size=2),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    connection = connect(Home.create(tmp_path_factory.mktemp("home")))
    yield connection
    connection.close()


@given(runs=st.lists(RUNS, max_size=4, unique_by=lambda r: r.run_id))
@settings(max_examples=50, deadline=None)
def test_any_run_is_read_as_it_was_written(runs: list[Run], shared: sqlite3.Connection) -> None:
    store = Store(shared)
    shared.execute("BEGIN")
    try:
        for each in runs:
            store.add_run(each)
        read = {each.run_id: each for each in store.runs("n")}
        assert read == {each.run_id: each for each in runs}
        assert examine(shared).problems == []
    finally:
        shared.execute("ROLLBACK")
