"""The views show runs and judgements to the tools that people read a database with."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store
from agentpref.record.updates import UpdateRow, Updates
from agentpref.types import RETRACTION, Comparison, Feedback, Run

ASK = {"role": "user", "content": "Is it raining?"}
YES = {"role": "assistant", "content": "Yes."}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect(Home.create(tmp_path / "home"))) as connection:
        yield connection


@pytest.fixture
def store(connection: sqlite3.Connection) -> Store:
    return Store(connection)


@pytest.fixture
def views(connection: sqlite3.Connection) -> sqlite_utils.Database:
    return sqlite_utils.Database(connection)


def run(run_id: str, *messages: dict[str, Any], output: dict[str, Any] = YES, **more: Any) -> Run:
    fields = {"namespace": "shop", "created_at": 1.5, **more}
    return Run(run_id, prompt=prompt_of(messages or (ASK,)), output=output, **fields)


def only(views: sqlite_utils.Database, view: str) -> dict[str, Any]:
    (row,) = views[view].rows
    return dict(row)


def test_sqlite_utils_lists_every_view(views: sqlite_utils.Database) -> None:
    assert set(views.view_names()) == {
        "message_text", "run_text", "feedback_text", "comparison_text", "lineage",
    }  # fmt: skip


def test_run_text_shows_question_and_answer(store: Store, views: sqlite_utils.Database) -> None:
    store.add_run(run("r1", thread_id="t", model="m", revision="base", tags=("a", "b")))
    row = only(views, "run_text")
    assert row.pop("time") == "1970-01-01T00:00:01.500Z"
    assert row == {
        "run_id": "r1", "namespace": "shop", "thread_id": "t", "trace_id": None, "user_id": None,
        "question": "Is it raining?", "answer": "Yes.", "tool_calls": None, "model": "m",
        "revision": "base", "tags": '["a","b"]', "thumbs": None, "metadata": "{}",
        "created_at": 1.5,
    }  # fmt: skip


def test_the_question_is_the_user_s_last(store: Store, views: sqlite_utils.Database) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": CALLS}
    told = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    earlier = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}, YES)
    store.add_run(run("r1", *earlier, ASK, called, told))
    assert only(views, "run_text")["question"] == "Is it raining?"


def test_a_run_without_a_user_s_message_has_no_question(
    store: Store, views: sqlite_utils.Database
) -> None:
    store.add_run(run("r1", {"role": "system", "content": "Report the weather."}))
    assert only(views, "run_text")["question"] is None


def test_tool_calls_are_shown_beside_the_text(store: Store, views: sqlite_utils.Database) -> None:
    store.add_run(run("r1", output={"role": "assistant", "content": None, "tool_calls": CALLS}))
    row = only(views, "run_text")
    assert row["answer"] is None
    assert json.loads(row["tool_calls"]) == CALLS


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "[image_url]"),
        (["plain", {"type": "text", "text": "parted"}], "plain\nparted"),
        ([{"neither": "text nor type"}, None, 7], "7"),
        ([], None),
        ("", ""),
        ('quoted "text", [not] {json}', 'quoted "text", [not] {json}'),
    ],
)
def test_parts_of_a_message_are_shown_as_lines_of_text(
    store: Store, views: sqlite_utils.Database, content: Any, text: str | None
) -> None:
    store.add_run(run("r1", {"role": "user", "content": content}))
    assert only(views, "run_text")["question"] == text


def test_thumbs_are_shown_as_their_mean(store: Store, views: sqlite_utils.Database) -> None:
    store.add_run(run("r1"))
    for n, (key, score) in enumerate([("thumbs", 1.0), ("thumbs", 0.0), ("latency", 90.0)]):
        store.add_feedback(Feedback(f"f{n}", "r1", 2.0, key, score, user_id=f"u{n}"))
    assert only(views, "run_text")["thumbs"] == 0.5


def test_only_the_newest_thumb_of_each_voter_that_was_not_taken_back_is_shown(
    store: Store, views: sqlite_utils.Database
) -> None:
    store.add_run(run("r1"))
    for name, at, score, user in [("a", 1, 0, "u"), ("b", 2, 1, "u"), ("c", 1, 0, "v")]:
        store.add_feedback(Feedback(name, "r1", float(at), "thumbs", float(score), user_id=user))
    assert only(views, "run_text")["thumbs"] == 0.5
    for name, key, user in [("d", "correction", "u"), ("e", "thumbs", "v"), ("f", None, "w")]:
        taken = Feedback(name, "r1", 3.0, RETRACTION, value={"key": key}, user_id=user)
        store.add_feedback(taken)
    assert only(views, "run_text")["thumbs"] == 1
    store.add_feedback(Feedback("g", "r1", 4.0, "thumbs", 0.0, user_id="v"))
    assert only(views, "run_text")["thumbs"] == 0.5


def test_feedback_text_shows_feedback_beside_its_run(
    store: Store, views: sqlite_utils.Database
) -> None:
    store.add_run(run("r1", revision="base"))
    fixed = {"role": "assistant", "content": "Yes, take a coat."}
    store.add_feedback(Feedback("f", "r1", 2.0, "k", 0.5, {"x": 1}, "why", "model", "u", fixed))
    assert only(views, "feedback_text") == {
        "feedback_id": "f", "time": "1970-01-01T00:00:02.000Z", "namespace": "shop",
        "run_id": "r1", "key": "k", "score": 0.5, "value": '{"x":1}', "comment": "why",
        "source": "model", "user_id": "u", "question": "Is it raining?", "answer": "Yes.",
        "correction": "Yes, take a coat.", "revision": "base", "created_at": 2.0,
    }  # fmt: skip


def test_comparison_text_shows_both_answers(store: Store, views: sqlite_utils.Database) -> None:
    store.add_run(run("r1"))
    store.add_run(run("r2", output={"role": "assistant", "content": "No."}, revision="rev-2"))
    store.add_comparison(Comparison("c", 3.0, "r1", "r2", "b", comment="looked outside"))
    assert only(views, "comparison_text") == {
        "comparison_id": "c", "time": "1970-01-01T00:00:03.000Z", "namespace": "shop",
        "run_a": "r1", "run_b": "r2", "winner": "b", "comment": "looked outside",
        "source": "human", "user_id": None, "question": "Is it raining?", "answer_a": "Yes.",
        "answer_b": "No.", "revision_a": None, "revision_b": "rev-2", "created_at": 3.0,
    }  # fmt: skip


def test_lineage_shows_the_verdict_and_the_state_of_the_revision(
    connection: sqlite3.Connection, views: sqlite_utils.Database
) -> None:
    pairs = {"p1": "new", "p2": "new", "p3": "replay", "p4": "held_out"}
    Updates(connection).add(
        UpdateRow("u1", "shop", 10.0, 12.5, "rev-1", "rev-2", "promoted", {}, pairs)
    )
    Updates(connection).add(UpdateRow("u2", "shop", 20.0, 21.0, "rev-2", None, "refused", {}))
    connection.execute(
        "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest,"
        " tainted_at) VALUES ('rev-2', 'shop', 2, 'rev-1', 11.0, '{}', 30.0)"
    )
    connection.execute("INSERT INTO serving (namespace, live) VALUES ('shop', 'rev-2')")
    first, second = views["lineage"].rows
    assert first == {
        "update_id": "u1", "time": "1970-01-01T00:00:10.000Z", "namespace": "shop",
        "verdict": "promoted", "parent": "rev-1", "revision": "rev-2", "serves": "live",
        "tainted": "1970-01-01T00:00:30.000Z", "pairs_new": 2, "pairs_replayed": 1,
        "pairs_held_out": 1, "seconds": 2.5, "created_at": 10.0,
    }  # fmt: skip
    assert [second[name] for name in ("verdict", "revision", "serves", "pairs_new")] == [
        "refused", None, None, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE message SET body = 'no JSON'",
        "UPDATE message SET parent = id, body = '{}'",
        "DELETE FROM message",
    ],
)
def test_a_damaged_message_still_has_its_row(
    store: Store, connection: sqlite3.Connection, views: sqlite_utils.Database, edit: str
) -> None:
    store.add_run(run("r1", {"role": "system", "content": "x"}, ASK))
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(edit)
    row = only(views, "run_text")
    assert (row["run_id"], row["question"], row["answer"]) == ("r1", None, None)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM run_text WHERE run_id = 'r'",
        "SELECT * FROM run_text WHERE namespace = 'n' AND created_at > 1 ORDER BY created_at",
        "SELECT * FROM run_text WHERE namespace = 'n' ORDER BY created_at DESC",
        "SELECT * FROM run_text ORDER BY run_id DESC",
        "SELECT * FROM feedback_text WHERE run_id = 'r'",
        "SELECT * FROM feedback_text WHERE feedback_id = 'f'",
        "SELECT * FROM feedback_text WHERE namespace = 'n' AND created_at > 1 ORDER BY created_at",
        "SELECT * FROM comparison_text WHERE run_a = 'r'",
        "SELECT * FROM comparison_text WHERE run_b = 'r'",
        "SELECT * FROM comparison_text WHERE created_at > 1 ORDER BY created_at",
        "SELECT * FROM message_text WHERE id = 'm'",
        "SELECT * FROM lineage WHERE update_id = 'u'",
    ],
)
def test_common_queries_on_views_use_an_index(connection: sqlite3.Connection, query: str) -> None:
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    walks = ("SCAN line", "SCAN part")  # up one conversation, along the parts of one message
    scans = [line for line in plan if line.startswith("SCAN") and not line.startswith(walks)]
    assert [line for line in scans if " USING " not in line] == []
    assert "USE TEMP B-TREE FOR ORDER BY" not in plan
