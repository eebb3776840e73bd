"""Runs are found by ids in any spelling, by traces, and by what a person remembers."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import UnknownRun
from agentpref.home import Home
from agentpref.record import finding
from agentpref.record.database import connect
from agentpref.record.finding import (
    Wanted,
    find,
    find_prefix,
    newest,
    of_trace,
    shortest,
    spellings,
)
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store
from agentpref.types import Run

WAYS = {
    "as it is": str,
    "upper": lambda uuid: str(uuid).upper(),
    "plain": lambda uuid: uuid.hex,
    "plain, upper": lambda uuid: uuid.hex.upper(),
}
OF_MESSAGES = ("lc_run--{}", "run--{}", "run-{}", "lc_run--{}-0", "run-{}-0", "LC_RUN--{}")


@pytest.fixture
def connection(home: Home) -> Iterator[sqlite3.Connection]:
    with closing(connect(home)) as connection:
        yield connection


def add(connection: sqlite3.Connection, name: str, at: float = 1.0, **fields: Any) -> None:
    asked, said = fields.pop("asked", "why?"), fields.pop("said", name)
    answer = {"role": "assistant", "content": said}
    if isinstance(said, dict):
        answer = said
    prompt = prompt_of([{"role": "user", "content": asked}])
    fields = {"namespace": "default"} | fields
    Store(connection).add_run(Run(name, created_at=at, prompt=prompt, output=answer, **fields))


@given(st.uuids(), st.sampled_from([*WAYS]), st.sampled_from([*WAYS]))
def test_a_uuid_is_understood_in_each_spelling_that_it_was_logged_in(
    uuid: UUID, logged: str, asked: str
) -> None:
    names = spellings(WAYS[asked](uuid))
    assert WAYS[logged](uuid) in names
    assert names[0] == WAYS[asked](uuid), "what was given goes first"
    for pattern in OF_MESSAGES:
        assert WAYS[logged](uuid) in spellings(pattern.format(uuid))


@given(st.text(max_size=40))
def test_any_other_text_is_only_itself(text: str) -> None:
    names = spellings(text)
    assert names[0] == text
    for other in names[1:]:
        UUID(other.partition(":")[0])


def test_a_further_answer_of_a_langchain_call_is_its_own_run(
    connection: sqlite3.Connection,
) -> None:
    call = str(uuid4())
    for name in (call, f"{call}:1", f"{call}:2"):
        add(connection, name)
    assert find(connection, f"lc_run--{call}-2", 9.0) == f"{call}:2"
    assert find(connection, f"lc_run--{call}-0", 9.0) == call
    with pytest.raises(UnknownRun):
        find(connection, f"lc_run--{call}-3", 9.0)


def test_the_exact_id_wins_over_another_spelling(connection: sqlite3.Connection) -> None:
    uuid = uuid4()
    for name in (str(uuid), uuid.hex):
        add(connection, name)
    assert find(connection, uuid.hex, 9.0) == uuid.hex
    assert find(connection, str(uuid).upper(), 9.0) == str(uuid)


def test_a_trace_is_its_newest_answer_in_the_namespace(connection: sqlite3.Connection) -> None:
    trace = str(uuid4())
    add(connection, "old", 1.0, trace_id=trace)
    add(connection, "new", 3.0, trace_id=trace)
    add(connection, "same moment", 3.0, trace_id=trace)
    add(connection, "another trace", 4.0, trace_id=str(uuid4()))
    add(connection, "another namespace", 5.0, trace_id=trace, namespace="other")
    add(connection, "no trace", 6.0)
    for spelling in spellings(trace):
        assert find(connection, of_trace("default", spelling), 9.0) == "same moment"
    assert find(connection, of_trace("other", trace), 9.0) == "another namespace"
    with pytest.raises(UnknownRun, match="in namespace 'third' of this home; give the trace id"):
        find(connection, of_trace("third", trace), 9.0)


def test_an_answer_that_came_after_the_judgement_was_not_meant(
    connection: sqlite3.Connection,
) -> None:
    for name, at in (("first", 1.0), ("second", 5.0)):
        add(connection, name, at, trace_id="t")
    assert find(connection, of_trace("default", "t"), 4.0) == "first"
    assert find(connection, of_trace("default", "t"), 0.5) == "second", "unless the clock went back"


def test_of_several_answers_to_the_last_call_the_first_is_meant(
    connection: sqlite3.Connection,
) -> None:
    for at, name in enumerate(("a", "b", "b:1", "b:2")):
        add(connection, name, float(at), trace_id="t")
    assert find(connection, of_trace("default", "t"), 9.0) == "b"
    add(connection, "of:7", 5.0, trace_id="t")
    assert find(connection, of_trace("default", "t"), 9.0) == "of:7", "an id of the app's own"


def test_the_id_of_a_message_names_its_run_also_as_a_trace(connection: sqlite3.Connection) -> None:
    step, trace = str(uuid4()), str(uuid4())
    add(connection, step, 1.0, trace_id=trace)
    add(connection, "last", 2.0, trace_id=trace)
    assert find(connection, of_trace("default", f"lc_run--{step}"), 9.0) == step
    assert find(connection, of_trace("default", f"lc_run--{trace}"), 9.0) == "last"
    with pytest.raises(UnknownRun):
        find(connection, of_trace("default", step), 9.0)


def test_traces_are_looked_up_by_their_index(connection: sqlite3.Connection) -> None:
    query = "EXPLAIN QUERY PLAN SELECT run_id FROM run WHERE +namespace = 'a' AND trace_id IN"
    (*_, plan), *_ = connection.execute(f"{query} (SELECT value FROM json_each('[1]'))")
    assert "run_of_trace" in plan


def test_a_beginning_of_an_id_is_enough_if_it_is_its_own(connection: sqlite3.Connection) -> None:
    for name in ("0198-aa", "0198-ab", "0199-aa", "Ä-1"):
        add(connection, name)
    assert find_prefix(connection, "0199") == "0199-aa"
    assert find_prefix(connection, "0198-ab") == "0198-ab"
    assert find_prefix(connection, "Ä") == "Ä-1"
    with pytest.raises(UnknownRun, match="the ids of several runs begin with '0198-'"):
        find_prefix(connection, "0198-")
    for name in ("", "02", "0199-aab", "%", "_"):
        with pytest.raises(UnknownRun, match="no run"):
            find_prefix(connection, name)


@given(st.sets(st.text("ab1-", min_size=1, max_size=6), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=30)
def test_the_shortest_beginning_is_the_run_s_own(
    shared: sqlite3.Connection, names: set[str], data: st.DataObject
) -> None:
    shared.execute("BEGIN")
    for name in names:
        add(shared, name)
    name = data.draw(st.sampled_from(sorted(names)))
    short = shortest(shared, name, least=1)
    assert find_prefix(shared, short) == name
    if short != name and len(short) > 1:
        assert sum(other.startswith(short[:-1]) for other in names) > 1
    shared.execute("ROLLBACK")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    with closing(connect(Home.create(tmp_path_factory.mktemp("home")))) as connection:
        yield connection


TEXTS = [
    "100% of it",
    'he said "no"',
    "a_b",
    "ÄRGER",
    "line\nbreak",
    "role",
    "Assistant",
    "!",
    "\\",
]
RUNS = st.tuples(
    st.sampled_from([None, "t1", "t2"]),
    st.sampled_from([(), ("x",), ("x", "y"), ("xy",)]),
    st.sampled_from([None, "u", "v"]),
    st.sampled_from(TEXTS),
    st.sampled_from(TEXTS),
)
WANTED = st.builds(
    Wanted,
    st.just("default"),
    thread_id=st.sampled_from([None, "t1", "t3"]),
    trace_id=st.none(),
    tag=st.sampled_from([None, "x", "y"]),
    users=st.sampled_from([None, (), ("u",), ("u", "v")]),
    text=st.sampled_from(
        [None, "", "%", "_", "!", '"', "NO", "ärger", "ÄRGER", "\n", "content", "\\"]
    ),
)


@given(st.lists(RUNS, max_size=8), WANTED, st.integers(1, 5), st.sampled_from([0, 1, 3, 1000]))
@settings(deadline=None, max_examples=120)
def test_the_newest_runs_that_are_wanted_are_found(
    shared: sqlite3.Connection, rows: list[Any], wanted: Wanted, limit: int, near: int
) -> None:
    shared.execute("BEGIN")
    expected = []
    for n, (thread, tags, user, asked, said) in enumerate(rows):
        about = {"thread_id": thread, "tags": tags, "user_id": user, "asked": asked, "said": said}
        add(shared, f"r{n}", float(n), **about)
        add(shared, f"o{n}", float(n), **about, namespace="other")
        texts = [plain(asked), plain(said)]
        if (
            wanted.thread_id in (None, thread)
            and (wanted.tag is None or wanted.tag in tags)
            and (wanted.users is None or user in wanted.users)
            and (wanted.text is None or any(plain(wanted.text) in text for text in texts))
        ):
            expected.append(f"r{n}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "_NEAR", near)
        found = [run.run_id for run in Store(shared).newest_runs(wanted, limit)]
    assert found == expected[::-1][:limit]
    shared.execute("ROLLBACK")


def plain(text: str) -> str:
    """The letters A to Z in lower case, and no others."""
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)


def test_text_is_found_in_parts_reasoning_and_tool_calls_and_not_in_what_json_adds(
    connection: sqlite3.Connection,
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."}
    asked = [{"type": "text", "text": "How warm is it?"}]
    add(connection, "r", asked=asked, said=said)
    store = Store(connection)
    for text, count in {
        "weather": 1, '{"a": 1}': 1, "hm.": 1, "HOW WARM": 1, "reasoning_content": 0, "function": 0,
        "text": 0, "assistant": 0, "x" * 70_000: 0, "\ud800": 0,
    }.items():  # fmt: skip
        found = [*store.newest_runs(Wanted("default", text=text), 9)]
        assert len(found) == count, text[:20]


def test_no_more_rows_are_read_than_are_asked_for(connection: sqlite3.Connection) -> None:
    for n in range(50):
        add(connection, f"r{n}", float(n))
    plan = connection.execute(
        "EXPLAIN QUERY PLAN SELECT 1 FROM run WHERE namespace = 'default'"
        " ORDER BY created_at DESC, rowid DESC"
    ).fetchall()
    assert [row[-1] for row in plan] == [
        "SEARCH run USING COVERING INDEX run_in_time (namespace=?)"
    ]
    assert next(newest(connection, Wanted("default"), "run_id")) == ("r49",)
