"""Examples read from a home: all of them, or those of prompts judged since a time."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.home import Home
from agentpref.prefer.examples import build_examples, read_examples
from agentpref.record.database import connect
from agentpref.record.declared import declare
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store
from agentpref.types import RETRACTION, Comparison, Feedback, Prompt, Run

PROMPTS = tuple(prompt_of([{"role": "user", "content": f"question {n}"}]) for n in range(3))
RUNS = {
    f"r{p}{a}": Run(
        f"r{p}{a}", "default", 0.0, prompt, {"role": "assistant", "content": f"answer {a}"}
    )
    for p, prompt in enumerate(PROMPTS)
    for a in range(3)
}
PROMPT_OF: dict[str, Prompt] = {name: run.prompt for name, run in RUNS.items()}

TIMES = st.integers(0, 9).map(float)
VOTERS = st.sampled_from(["ann", "bob", None])
SOURCES = st.sampled_from(["human", "model"])
CORRECTIONS = st.none() | st.just({"role": "assistant", "content": "answer fixed"})
SCORES = {
    "thumbs": (None, 0.0, 1.0),
    "smile": (None, -1.0, -0.5, 1.0),
    "stars": (None, 1.0, 3.0, 5.0),
    "mood": (0.0, 7.0),  # is not declared
}
SAID = [(key, score, None) for key, scores in SCORES.items() for score in scores]
TAKEN_BACK = [
    (RETRACTION, None, {"key": key}) for key in (None, "thumbs", "correction", "comparison")
]
FEEDBACK = st.builds(
    lambda name, run, at, said, source, user, fixed: Feedback(
        name, run, at, *said, None, source, user, None if said in TAKEN_BACK else fixed
    ),
    st.uuids().map(str),
    st.sampled_from(sorted(RUNS)),
    TIMES,
    st.sampled_from([*SAID, *TAKEN_BACK]),
    SOURCES,
    VOTERS,
    CORRECTIONS,
)
COMPARISONS = st.builds(
    lambda name, at, prompt, pair, winner, source, user: Comparison(
        name, at, f"r{prompt}{pair[0]}", f"r{prompt}{pair[1]}", winner, source, user
    ),
    st.uuids().map(str),
    TIMES,
    st.integers(0, 2),
    st.permutations(range(3)),
    st.sampled_from(["a", "b", "tie"]),
    SOURCES,
    VOTERS,
)


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """A home with the answers above, and the same ones once more in another namespace."""
    home = Home.create(tmp_path_factory.mktemp("home"))
    with closing(connect(home)) as connection:
        for run in RUNS.values():
            Store(connection).add_run(run)
            Store(connection).add_run(replace(run, run_id=f"x{run.run_id}", namespace="other"))
        declare_keys(connection)
        yield connection


def declare_keys(connection: sqlite3.Connection) -> None:
    for namespace in ("default", "other"):
        declare(connection, namespace, "smile", (-1, 1))
        declare(connection, namespace, "stars", (1, 5))


@given(
    st.lists(FEEDBACK, max_size=12, unique_by=lambda row: row.feedback_id),
    st.lists(COMPARISONS, max_size=8, unique_by=lambda row: row.comparison_id),
    TIMES,
)
@settings(deadline=None)
def test_examples_since_a_time_are_those_of_prompts_judged_then_or_later(
    connection: sqlite3.Connection,
    feedback: list[Feedback],
    comparisons: list[Comparison],
    since: float,
) -> None:
    judged = {PROMPT_OF[row.run_id].id for row in feedback if row.created_at >= since}
    judged |= {PROMPT_OF[row.run_a].id for row in comparisons if row.created_at >= since}
    old = [row for row in feedback if PROMPT_OF[row.run_id].id not in judged]
    old_too = [row for row in comparisons if PROMPT_OF[row.run_a].id not in judged]
    connection.execute("BEGIN")
    try:
        store = Store(connection)
        _store(store, feedback, comparisons)
        whole = read_examples(store, "default", held_out=0.5)
        recent = read_examples(store, "default", held_out=0.5, since=since)
        standards = store.standards("default")
    finally:
        connection.execute("ROLLBACK")
    rest = build_examples(RUNS.values(), old, old_too, held_out=0.5, standards=standards)
    every = build_examples(RUNS.values(), feedback, comparisons, held_out=0.5, standards=standards)
    assert whole == every
    assert recent.examples == tuple(e for e in whole.examples if e.prompt.id in judged)
    assert Counter(recent.left_out) + Counter(rest.left_out) == Counter(whole.left_out)


def _store(store: Store, feedback: list[Feedback], comparisons: list[Comparison]) -> None:
    for said in feedback:
        store.add_feedback(said)
        decoy = replace(said, feedback_id=f"x{said.feedback_id}", run_id=f"x{said.run_id}")
        store.add_feedback(replace(decoy, score=9.0, created_at=99.0, scale=(0.0, 9.0)))
    for row in comparisons:
        store.add_comparison(row)


def test_runs_without_a_judgement_are_not_read(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN")
    try:
        store = Store(connection)
        store.add_feedback(Feedback("f", "r00", 5.0, "thumbs", 1.0))
        store.add_comparison(Comparison("c", 1.0, "r10", "r12", "a"))
        assert {run.run_id for run in store.judged_runs("default")} == {"r00", "r10", "r12"}
        assert [run.run_id for run in store.judged_runs("default", since=5.0)] == ["r00"]
        assert not list(store.judged_runs("other"))
    finally:
        connection.execute("ROLLBACK")


def test_examples_are_of_one_moment_when_rows_are_written_meanwhile(tmp_path: Path) -> None:
    """Else the answer's first comparison would be read, and not the thumb that came before it."""
    home = Home.create(tmp_path / "home")
    with closing(connect(home)) as ours, closing(connect(home)) as theirs:

        class Interrupted(Store):
            def feedback(self, namespace: str, *, since: float | None = None) -> Iterator[Feedback]:
                yield from super().feedback(namespace, since=since)
                Store(theirs).add_feedback(Feedback("f", "r00", 5.0, "thumbs", 1.0))
                Store(theirs).add_comparison(Comparison("c", 5.0, "r00", "r01", "b"))

        for name in ("r00", "r01"):
            Store(theirs).add_run(RUNS[name])
        assert not read_examples(Interrupted(ours), "default", held_out=0.5).pairs
        (pair,) = read_examples(Store(ours), "default", held_out=0.5).pairs
        assert pair.completions[0].message == RUNS["r01"].output
