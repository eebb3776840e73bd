"""Integrity checks find each kind of damage."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from uuid import uuid4

import orjson
import pytest

from agentpref.home import Home
from agentpref.record.database import connect, transaction
from agentpref.record.integrity import Looked, examine
from agentpref.record.invariants import INVARIANTS, KEYS, SAMPLED, WHOLE
from agentpref.record.log import Log
from agentpref.record.messages import node_id, prompt_of, run_row
from agentpref.record.seals import SEALED, seal
from agentpref.record.spill import Spill
from agentpref.record.store import Store
from agentpref.record.sums import resum
from agentpref.record.updates import UpdateRow, Updates
from agentpref.types import Comparison, Feedback, Run

TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"})
OTHER = ({"role": "user", "content": "3 + 3?"},)


def run(run_id: str, content: str = "4", turns: tuple[dict[str, str], ...] = TURNS) -> Run:
    output = {"role": "assistant", "content": content}
    return Run(run_id, "default", 10.0, prompt_of(turns), output, user_id="u")


@pytest.fixture
def connection(home: Home) -> Iterator[sqlite3.Connection]:
    """A sound record in which every table has rows."""
    with closing(connect(home)) as connection:
        with transaction(connection):
            _log(Store(connection))
            _learn(connection)
        yield connection


def _log(store: Store) -> None:
    for each in (run("r1"), run("r2", "four"), run("r3", "6", OTHER)):
        store.add_run(each)
    fixed = {"role": "assistant", "content": "It is 4."}
    store.add_feedback(Feedback("f1", "r1", 11.0, "k", 1.0, "x", user_id="u", correction=fixed))
    store.add_comparison(Comparison("c1", 12.0, "r1", "r2", "a", user_id="u"))


def _learn(connection: sqlite3.Connection) -> None:
    revision = (
        "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest)"
        " VALUES (?, 'default', ?, ?, 20.0, ?)"
    )
    connection.execute(revision, ("rev-1", 1, None, '{"parent":null}'))
    connection.execute(revision, ("rev-2", 2, "rev-1", '{"parent":"rev-1"}'))
    updates, pairs = Updates(connection), {"p1": "new"}
    updates.add(UpdateRow("u1", "default", 19.0, 21.0, None, "rev-1", "promoted", {}, pairs))
    updates.add(UpdateRow("u2", "default", 29.0, 31.0, "rev-1", "rev-2", "insufficient", {}))
    connection.execute("INSERT INTO pair_source (source, pair_id) VALUES ('f1', 'p1')")
    connection.execute("INSERT INTO forgotten (user_id, at) VALUES ('gone', 15.0)")
    history = (
        "INSERT INTO serving_history (namespace, at, generation, action, live, canary, weight)"
        " VALUES ('default', 40.0, ?, ?, 'rev-1', ?, ?)"
    )
    connection.execute(history, (1, "promote", None, 0.0))
    connection.execute(history, (2, "canary", "rev-2", 0.1))
    connection.execute(
        "INSERT INTO serving (namespace, live, canary, weight, generation)"
        " VALUES ('default', 'rev-1', 'rev-2', 0.1, 2)"
    )
    for table in SEALED:
        seal(connection, table)
    resum(connection)


NO_ANSWER = "is missing, answers another prompt, or is not an assistant's message"
ROLES = (
    "new, replay, held_out, left_out, waiting, set_aside, trained_aside, aged_out, restored, "
    "known, anchor, anchor_held_out"
)
EDITS = {
    ("message", "its parent is missing"): "UPDATE message SET parent = 'x' WHERE id LIKE '%a%'",
    ("run", "its prompt is missing or has no message"): "UPDATE run SET prompt = 'x'",
    ("run", f"its output {NO_ANSWER}"): "UPDATE run SET output = prompt",
    ("run", "its user was forgotten later"): "UPDATE run SET user_id = 'gone'",
    ("feedback", "its run is missing"): "DELETE FROM run WHERE run_id = 'r1'",
    ("feedback", f"its correction {NO_ANSWER}"): (
        "UPDATE feedback SET correction = (SELECT output FROM run WHERE run_id = 'r3')"
    ),
    ("feedback", "its user was forgotten later"): ("UPDATE feedback SET user_id = 'gone'"),
    ("comparison", "one of its runs is missing, or they are of different prompts or namespaces"): (
        "UPDATE comparison SET run_b = 'r3'"
    ),
    ("comparison", "its user was forgotten later"): ("UPDATE forgotten SET user_id = 'u'"),
    ("updates", "its candidate is missing, or has another parent or namespace"): (
        "UPDATE updates SET parent = NULL"
    ),
    ("updates", "its parent is no revision of its namespace"): (
        "UPDATE revision SET namespace = 'other'"
    ),
    ("updates", "it promoted no candidate"): "UPDATE updates SET candidate = NULL",
    ("updates", "its report is not JSON"): "UPDATE updates SET report = '{'",
    ("update_pair", "its update is missing"): "UPDATE update_pair SET update_id = 'x'",
    ("update_pair", f"its role is none of {ROLES}"): "UPDATE update_pair SET role = 'x'",
    ("pair_source", "no update used its pair"): "DELETE FROM update_pair",
    ("revision", "its parent is missing, younger, or of another namespace"): (
        "UPDATE revision SET seq = 3 WHERE seq = 1"
    ),
    ("revision", "its parent is tainted and it is not"): (
        "UPDATE revision SET tainted_at = 50.0 WHERE seq = 1"
    ),
    ("revision", "its update is not in the ledger, so what it learned is unknown"): (
        "UPDATE revision SET manifest = json_set(manifest, '$.watermark.update_id', 'lost')"
    ),
    ("revision", "its manifest is not JSON, or names another parent"): (
        "UPDATE revision SET parent = NULL"
    ),
    ("serving", "its live is no revision of its namespace"): "UPDATE serving SET live = 'x'",
    ("serving", "its canary is no revision of its namespace"): "DELETE FROM revision WHERE seq = 2",
    ("serving", "it names a revision that was pruned"): (
        "UPDATE revision SET pruned_at = 50.0 WHERE seq = 2"
    ),
    ("serving", "it is not what its history ends with"): "UPDATE serving SET weight = 0.9",
    ("serving_history", "its generation is not above the one before it"): (
        "UPDATE serving_history SET generation = 2"
    ),
    ("serving_history", "it is the last of its namespace, which serves nothing"): (
        "DELETE FROM serving"
    ),
    ("serving_history", "its live is no revision of its namespace"): (
        "UPDATE serving_history SET live = 'x' WHERE id = 1"
    ),
    ("serving_history", "its canary is no revision of its namespace"): (
        "UPDATE serving_history SET canary = 'x' WHERE id = 1"
    ),
}


NOT_SAMPLED = set(KEYS) - {*SAMPLED, *WHOLE}


@pytest.mark.parametrize("broken", EDITS, ids=" ".join)
@pytest.mark.parametrize("sample", [None, 100])
def test_a_broken_invariant_is_found(
    connection: sqlite3.Connection, broken: tuple[str, str], sample: int | None
) -> None:
    assert examine(connection, sample=sample).problems == []
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(EDITS[broken])
    found = {problem[::2] for problem in examine(connection, sample=sample).problems}
    assert (broken in found) == (sample is None or broken[0] not in NOT_SAMPLED)


def test_every_invariant_has_a_test() -> None:
    assert set(EDITS) == {(invariant.table, invariant.what) for invariant in INVARIANTS}


FAULTS = [
    ("run", "params = '[]'", "its params is '[]', not a mapping in JSON"),
    ("run", "metadata = 'x'", "its metadata is 'x', not a mapping in JSON"),
    ("run", "tags = '[1]'", "its tags is '[1]', not a list of strings in JSON"),
    ("run", "created_at = 9e999", "its created_at is inf, not a time"),
    ("run", "model = x'00ff'", r"its model is b'\x00\xff', not text or null"),
    ("run", "thread_id = CAST(x'ff' AS TEXT)", r"its thread_id is b'\xff', not text or null"),
    ("feedback", "score = 'good'", "its score is 'good', not a finite number, or null"),
    ("feedback", "value = 'no JSON'", "its value is 'no JSON', not JSON, or null"),
    ("feedback", "source = 'x'", "its source is 'x', not one of human, model, code"),
    ("comparison", "winner = 'c'", "its winner is 'c', not one of a, b, tie"),
]


@pytest.mark.parametrize(("table", "change", "what"), FAULTS)
@pytest.mark.parametrize("sample", [None, 100])
def test_a_column_that_no_log_would_write_is_found(
    connection: sqlite3.Connection, table: str, change: str, what: str, sample: int | None
) -> None:
    (key,) = connection.execute(f"SELECT max({KEYS[table]}) FROM {table}").fetchone()
    connection.execute(f"UPDATE {table} SET {change} WHERE {KEYS[table]} = '{key}'")
    assert examine(connection, sample=sample).problems == [(table, key, what)]


@pytest.mark.parametrize(
    ("bodies", "table", "what"),
    [
        (['{"tools":[]}'], "run", "its prompt is missing or has no message"),
        (['{"role":"user","content":"x"}'] * 2, "run", f"its output {NO_ANSWER}"),
    ],
)
@pytest.mark.parametrize("sample", [None, 100])
def test_an_answer_or_prompt_of_the_wrong_role_is_found(
    connection: sqlite3.Connection, bodies: list[str], table: str, what: str, sample: int | None
) -> None:
    """All hashes are right: whoever edits a text can hash it, too."""
    parent = None
    for body in [*bodies, '{"role":"assistant","content":"y"}'][:2]:
        key = node_id(parent, orjson.loads(body))
        connection.execute("INSERT INTO message VALUES (?, ?, ?)", (key, parent, body))
        connection.execute(
            "UPDATE run SET prompt = ?, output = ? WHERE run_id = 'r3'", (parent or key, key)
        )
        parent = key
    seal(connection, "run")
    assert examine(connection, sample=sample).problems == [(table, "r3", what)]


def test_a_body_that_is_a_blob_is_found(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE message SET body = CAST(body AS BLOB) WHERE parent IS NULL")
    problems = examine(connection).problems
    assert {problem.what for problem in problems} == {"its columns are not text"}


@pytest.mark.parametrize("sample", [None, 100])
def test_everything_that_a_log_accepts_is_sound(home: Home, sample: int | None) -> None:
    ask, answer = [{"role": "user", "content": "x"}], {"role": "assistant", "content": None}
    numbers: dict[str, Any] = {"model": uuid4(), "user_id": 7}  # the log makes text of them
    with Log(home.path) as log:
        first = log.record(ask, "4", params=None, token_ids=[], logprobs=[], tags=())
        second = log.record(ask, answer, token_ids=[1], logprobs=[float("nan")])
        log.record(ask, "5", tools=[{"type": "function"}], metadata={"at": object()}, **numbers)
        log.feedback(first, key="k", value=[None])
        log.feedback(first, key="k", score=True, user_id="u")
        log.correct(second, "é\0")
        log.compare(first, second, winner="tie")
        assert log.verify(sample=sample) == []


def test_a_check_leaves_the_connection_as_it_was(connection: sqlite3.Connection) -> None:
    examine(connection)
    assert connection.text_factory is str


def test_records_after_a_user_was_forgotten_are_sound(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE run SET user_id = 'gone', created_at = 15.5")
    seal(connection, "run")
    assert examine(connection).problems == []


def test_a_pair_s_source_may_be_gone(connection: sqlite3.Connection) -> None:
    """It was forgotten, or is older than what is kept; that it trained a revision stays known."""
    connection.execute("DELETE FROM feedback")
    seal(connection, "feedback")
    assert examine(connection).problems == []


@pytest.mark.parametrize("body", [b"\xff\xfe", b"[1]", b"7", b'{"role":"user"}', b"[" * 5000])
@pytest.mark.parametrize("sample", [None, 100])
def test_a_changed_message_is_found(
    connection: sqlite3.Connection, body: bytes, sample: int | None
) -> None:
    (key,) = connection.execute("SELECT id FROM message WHERE parent IS NULL LIMIT 1").fetchone()
    connection.execute("UPDATE message SET body = CAST(? AS TEXT) WHERE id = ?", (body, key))
    (problem,) = examine(connection, sample=sample).problems
    assert problem == ("message", key, "its text is not what was recorded")


def test_a_full_check_counts_the_rows_it_looked_at(connection: sqlite3.Connection) -> None:
    looked_at = examine(connection).looked_at
    assert looked_at["message"] == Looked(7, 7)
    assert looked_at["run"] == Looked(3, 3)
    assert looked_at["update_pair"] == Looked(1, 1)


def test_a_full_check_reports_progress(connection: sqlite3.Connection) -> None:
    told: list[tuple[str, int, int]] = []
    examine(connection, progress=lambda *stage: told.append(stage))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == [
        "pages", "rows", "references", "seals", "sums",
    ]  # fmt: skip
    assert [done == total for _, done, total in told].count(True) == 5


def _many(connection: sqlite3.Connection, count: int) -> None:
    store = Store(connection)
    with transaction(connection):
        for n in range(count):
            store.add_run(run(f"many-{n}", f"answer {n}"))


def test_a_sample_looks_at_the_given_number_of_rows(connection: sqlite3.Connection) -> None:
    _many(connection, 97)
    looked_at = examine(connection, sample=20, seed=1).looked_at
    assert looked_at["run"] == Looked(20, 100)
    assert looked_at["feedback"] == Looked(1, 1)
    assert looked_at["serving_history"] == Looked(2, 2)
    assert "update_pair" not in looked_at


def test_a_sample_of_an_empty_home_finds_nothing(home: Home) -> None:
    with closing(connect(home)) as connection:
        found = examine(connection, sample=20)
    assert found.problems == []
    assert set(found.looked_at.values()) == {Looked(0, 0)}


def test_a_sample_is_repeatable_by_its_seed(connection: sqlite3.Connection) -> None:
    _many(connection, 50)
    connection.execute("UPDATE run SET tags = 'no JSON'")
    first, again, other = (examine(connection, sample=5, seed=seed).problems for seed in (1, 1, 2))
    assert len(first) == 5
    assert first == again != other


def test_every_row_is_equally_likely_in_a_sample_despite_gaps(
    connection: sqlite3.Connection,
) -> None:
    """Rows after a gap would be drawn more often if the next row stood in for a removed one."""
    _many(connection, 57)
    connection.execute("DELETE FROM run WHERE run_id LIKE 'many-1%' OR run_id LIKE 'many-4%'")
    connection.execute("UPDATE run SET tags = 'no JSON'")
    (left,) = connection.execute("SELECT count(*) FROM run").fetchone()
    seal(connection, "run")
    drawn: dict[str, int] = {}
    for seed in range(400):
        for problem in examine(connection, sample=6, seed=seed).problems:
            if problem.table == "run":
                drawn[problem.key] = drawn.get(problem.key, 0) + 1
    expected = 400 * 6 / left
    assert len(drawn) == left
    assert all(0.5 * expected < count < 1.6 * expected for count in drawn.values())


def test_the_size_of_a_table_with_gaps_is_estimated(connection: sqlite3.Connection) -> None:
    _many(connection, 997)
    connection.execute("DELETE FROM run WHERE run_id LIKE 'many-%' AND rowid % 2")
    rows, of = examine(connection, sample=200, seed=0).looked_at["run"]
    assert rows == 200
    assert 400 < of < 600


def test_a_sample_seeks_and_does_not_scan(connection: sqlite3.Connection) -> None:
    """What it costs must not grow with the home: no statement of its own walks a large table."""
    _many(connection, 20)
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    examine(connection, sample=10, seed=0)
    connection.set_trace_callback(None)
    queries = [one for one in statements if one.startswith("SELECT")]
    plans = [row[3] for one in queries for row in connection.execute(f"EXPLAIN QUERY PLAN {one}")]
    scans = {plan.split()[1] for plan in plans if plan.startswith("SCAN")}
    assert len(queries) > len(INVARIANTS) - 5
    assert scans <= {
        "CONSTANT", "json_each", "pragma_database_list", "serving", "serving_history",
        "newest", "before", "(subquery-2)", "(subquery-3)", "last",
    }  # fmt: skip


def _waiting(home: Home, *content: str) -> None:
    Spill(home).append([run_row(replace(run(f"w-{text}"), namespace=text)) for text in content])


def test_records_in_the_spill_are_counted(home: Home, connection: sqlite3.Connection) -> None:
    assert examine(connection).waiting == 0
    _waiting(home, "one", "two")
    for sample in (None, 1):
        found = examine(connection, sample=sample)
        assert (found.waiting, found.torn, found.problems) == (2, 0, [])


@pytest.mark.parametrize("lost", [1, 2, 20, 300])
def test_a_line_that_a_crash_cut_off_is_counted_as_torn(
    home: Home, connection: sqlite3.Connection, lost: int
) -> None:
    _waiting(home, "one", "two")
    os.truncate(home.spill, home.spill.stat().st_size - lost)
    found = examine(connection)
    assert (found.waiting, found.torn, found.problems) == (1, 1, [])
    _waiting(home, "three")
    found = examine(connection)
    assert found.waiting + found.torn == 3
    assert found.problems == []


@pytest.mark.guarantee("verify")
def test_an_edited_line_of_the_spill_is_a_problem(
    home: Home, connection: sqlite3.Connection
) -> None:
    _waiting(home, "one", "two")
    home.spill.write_bytes(home.spill.read_bytes().replace(b'"two"', b'"new"'))
    found = examine(connection)
    assert found.problems == [("spill", "line 2", "it is not what was written")]
    assert found.waiting == 1


def test_a_sample_finds_the_same_problems_in_a_small_home(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE comparison SET winner = 'c'")
    expected = [("comparison", "c1", "its winner is 'c', not one of a, b, tie")]
    assert examine(connection).problems == examine(connection, sample=5).problems == expected


def test_a_line_of_the_spill_that_was_edited_is_no_line_that_was_cut_off(
    home: Home, connection: sqlite3.Connection
) -> None:
    _waiting(home, "one", "two")
    data = bytearray(home.spill.read_bytes())
    for place in (40, 60, 80):
        for byte in (0x00, 0xFF, ord('"')):
            changed = data.copy()
            changed[place] = byte if data[place] != byte else ord("x")
            home.spill.write_bytes(changed)
            found = examine(connection)
            assert (found.waiting, found.torn) == (1, 0)
            assert [problem.what for problem in found.problems] == ["it is not what was written"]
