"""Which votes count for a revision: real feedback in a real home."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.serve.thumbs import votes_on

A, B = "rev-000001-aaaaaaaaaaaa", "rev-000002-bbbbbbbbbbbb"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "home") as log:
        yield log


def answer(log: Log, revision: str | None = A, **about: object) -> str:
    question = [{"role": "user", "content": "hi"}]
    return log.record(question, "hello", revision=revision, **about)  # type: ignore[arg-type]


def count(log: Log, *revisions: str, **which: float) -> list[tuple[str, bool]]:
    log.flush()
    with closing(connect(log.home, readonly=True)) as connection:
        votes = votes_on(
            connection,
            "default",
            revisions or (A,),
            **{"since": 0.0, **which},  # type: ignore[arg-type]
        )
    return [(vote.revision, vote.liked) for vote in votes]


def test_thumbs_are_counted_by_revision(log: Log) -> None:
    for revision, up in ((A, True), (B, False), (A, False), ("base", True), (None, True)):
        log.thumbs(answer(log, revision), up=up)
    assert count(log, A) == [(A, True), (A, False)]
    assert count(log, A, B) == [(A, True), (B, False), (A, False)]
    assert count(log, "base") == [("base", True)]


def test_a_thread_has_one_vote_its_first(log: Log) -> None:
    for up in (False, True, True):
        log.thumbs(answer(log, thread_id="t"), up=up)
    log.thumbs(answer(log, trace_id="x"), up=True)
    log.thumbs(answer(log, trace_id="x"), up=False)
    assert count(log) == [(A, False), (A, True)]


def test_a_thread_that_outlives_a_swap_votes_on_both_revisions(log: Log) -> None:
    log.thumbs(answer(log, A, thread_id="t"), up=True)
    log.thumbs(answer(log, B, thread_id="t"), up=False)
    assert count(log, A, B) == [(A, True), (B, False)]


def test_whoever_changes_their_mind_counts_with_the_newest(log: Log) -> None:
    run = answer(log)
    log.thumbs(run, up=True)
    log.thumbs(run, up=False)
    assert count(log) == [(A, False)]
    log.feedback(run, key="thumbs", score=None, comment="hm")
    assert count(log) == [(A, False)], "words change no vote"


def test_what_was_taken_back_does_not_count_and_the_thread_votes_with_the_next(log: Log) -> None:
    first, second = answer(log, thread_id="t"), answer(log, thread_id="t")
    log.thumbs(first, up=False)
    log.thumbs(second, up=True)
    assert count(log) == [(A, False)]
    log.retract(first)
    assert count(log) == [(A, True)]
    log.retract(second)
    assert count(log) == []


def test_declared_keys_count_on_their_scale_and_others_do_not(log: Log) -> None:
    log.feedback(answer(log), key="stars", score=2)
    log.feedback(answer(log), key="latency", score=0.1)
    assert count(log) == []
    log.declare("stars", low=1, high=5)
    log.feedback(answer(log), key="stars", score=5)
    log.feedback(answer(log), key="stars", score=3)  # neutral
    assert count(log) == [(A, False), (A, True)]


def test_judges_programs_and_corrections_do_not_vote(log: Log) -> None:
    log.feedback(answer(log), key="thumbs", score=0, source="model")
    log.feedback(answer(log), key="thumbs", score=0, source="code")
    log.correct(answer(log), "good day")
    assert count(log) == []


def test_votes_and_answers_of_another_time_do_not_count(log: Log) -> None:
    run = answer(log)
    log.flush()
    between = time.time()
    log.thumbs(run, up=True)
    log.thumbs(answer(log), up=False)
    assert count(log, since=between) == [(A, False)], "the first answer is older"
    assert count(log, until=between) == []
    assert count(log) == [(A, True), (A, False)]


def test_runs_without_a_thread_can_be_left_out(log: Log) -> None:
    log.thumbs(answer(log), up=True)
    log.thumbs(answer(log, thread_id="t"), up=False)
    assert count(log, only_threads=True) == [(A, False)]


def test_other_namespaces_do_not_count(log: Log, tmp_path: Path) -> None:
    with Log(tmp_path / "home", namespace="other") as other:
        other.thumbs(answer(other), up=True)
        other.flush()
    assert count(log) == []


def test_the_query_reads_only_the_judgements_since(log: Log) -> None:
    with closing(connect(log.home, readonly=True)) as connection:
        from agentpref.serve.thumbs import _QUERY

        names = dict.fromkeys(("namespace", "since", "until"), 0)
        plan = connection.execute(
            f"EXPLAIN QUERY PLAN {_QUERY}", names | {"keys": "[]", "revisions": "[]"}
        )
        steps = [row[3] for row in plan]
    assert "feedback_in_time" in steps[0]
    assert any("SEARCH run USING INDEX sqlite_autoindex_run_1" in step for step in steps)
