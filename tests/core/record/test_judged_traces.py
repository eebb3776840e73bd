"""A trace, and a run under any spelling of its id, can be judged from any process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from agentpref.errors import InvalidFeedback, UnknownRun
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.spill import drain
from agentpref.record.store import Store

ASKED = [{"role": "user", "content": "2 + 2?"}]
JudgedIn = Callable[[Home], Any]


def test_a_trace_is_judged_before_its_runs_are_on_disk(log: Log, judged_in: JudgedIn) -> None:
    trace = uuid4()
    log.record(ASKED, "let me see", trace_id=str(trace))
    last = log.record(ASKED, "4", trace_id=str(trace))
    log.record(ASKED, "5", trace_id=str(uuid4()))
    log.thumbs(trace_id=trace, up=True, comment="right")
    log.feedback(trace_id=trace.hex.upper(), key="k", score=7)
    log.correct(trace_id=f"lc_run--{trace}", output="four")
    log.retract(trace_id=trace)
    assert {row.run_id for row in judged_in(log.home)[0]} == {last}
    assert [row.key for row in judged_in(log.home)[0]] == [
        "thumbs",
        "k",
        "correction",
        "retraction",
    ]
    assert log.verify() == []


def test_a_trace_is_judged_from_another_process(log: Log, judged_in: JudgedIn) -> None:
    trace = str(uuid4())
    log.record(ASKED, "let me see", trace_id=trace)
    last = log.record(ASKED, "4", trace_id=trace)
    assert log.flush()
    program = (
        "import sys, uuid, agentpref\n"
        "with agentpref.Log(sys.argv[1]) as log:\n"
        "    log.thumbs(trace_id=uuid.UUID(sys.argv[2]), up=False)\n"
    )
    command = [sys.executable, "-c", program, str(log.home.path), trace]
    subprocess.run(command, check=True, timeout=60)
    assert [(row.run_id, row.score) for row in judged_in(log.home)[0]] == [(last, 0.0)]


def test_a_trace_of_another_namespace_or_of_none_is_refused(log: Log, judged_in: JudgedIn) -> None:
    with Log(log.home.path, namespace="other") as other:
        other.record(ASKED, "4", trace_id="t")
        other.flush()
        for trace in ("t", "elsewhere", uuid4()):
            with pytest.raises(UnknownRun, match="no run of trace"):
                log.thumbs(trace_id=trace, up=True)
        other.thumbs(trace_id="t", up=True)
    assert judged_in(log.home)[0] == []


SPELLINGS: dict[str, Callable[[str], Any]] = {
    "as it is": str,
    "UUID": UUID,
    "upper case": str.upper,
    "without dashes": lambda name: name.replace("-", ""),
    "a message, streamed": "lc_run--{}".format,
    "a message": "lc_run--{}-0".format,
    "a message of langchain-core 0": "run-{}-0".format,
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_a_run_is_judged_by_any_spelling_of_its_id(
    log: Log, judged_in: JudgedIn, spell: Callable[[str], Any]
) -> None:
    first, second = log.record(ASKED, "4"), log.record(ASKED, "5")
    given = spell(first)
    log.thumbs(given, up=True)
    log.correct(given, "four")
    log.compare(given, second, winner="a")
    log.retract(second, "comparison", against=given)
    feedback, comparisons = judged_in(log.home)
    assert [row.run_id for row in feedback] == [first, first, second]
    assert [(row.run_a, row.run_b) for row in comparisons] == [(first, second)]
    with closing(connect(log.home)) as connection:
        left_out = read_examples(Store(connection), "default", held_out=0).left_out
    assert left_out["retracted"] == left_out["retraction"] == 1


def test_a_run_is_not_compared_with_itself_in_another_spelling(log: Log) -> None:
    run = log.record(ASKED, "4")
    for other in (UUID(run), run.upper(), f"lc_run--{run}"):
        with pytest.raises(InvalidFeedback, match="is compared with itself"):
            log.compare(run, other, winner="a")


def test_a_run_may_be_recorded_under_a_uuid(log: Log, judged_in: JudgedIn) -> None:
    name, trace = uuid4(), uuid4()
    assert log.record(ASKED, "4", run_id=name, trace_id=trace) == str(name)
    log.thumbs(name, up=True)
    log.thumbs(trace_id=trace, up=False)
    assert [row.run_id for row in judged_in(log.home)[0]] == [str(name)] * 2
    assert (log.dropped, log.altered) == ({}, {})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "no run was named; pass run_id= or trace_id="),
        ({"run_id": "r", "trace_id": "t"}, "were both given; pass one of them"),
        ({"trace_id": ""}, "trace_id is ''; pass a non-empty string"),
        ({"trace_id": "a\nb"}, "trace_id is a str of 3 characters"),
        ({"trace_id": [7]}, "trace_id is a list of 1"),
        ({"run_id": "\ndefault\nt"}, "run_id is a str of 10 characters"),
        ({"run_id": [7]}, "run_id is a list of 1"),
    ],
)
def test_what_names_no_run_or_two_is_refused(
    log: Log, arguments: dict[str, Any], complaint: str
) -> None:
    for call in (log.thumbs, log.feedback, log.correct, log.retract):
        needed = {log.thumbs: {"up": True}, log.feedback: {"score": 1, "key": "thumbs"}}
        with pytest.raises(InvalidFeedback, match=complaint):
            call(**arguments, **needed.get(call, {"output": "4"} if call == log.correct else {}))
    with pytest.raises(InvalidFeedback, match="up is None; pass True or False"):
        log.thumbs("r")


def test_a_trace_can_be_judged_while_the_database_is_locked(
    tmp_path: Path, judged_in: JudgedIn
) -> None:
    """The judgement waits in the spill, and means the answer that was the last one then."""
    with Log(tmp_path / "home") as log:
        log.record(ASKED, "4", trace_id="t")
        with closing(connect(log.home)) as blocker:
            log.flush()
            blocker.execute("BEGIN IMMEDIATE")
            meant = log.record(ASKED, "5", trace_id="t")
            said = log.thumbs(trace_id="t", up=False)
            log.record(ASKED, "6", trace_id="t")
            lost = log.thumbs(trace_id="nowhere", up=False)
            log.flush()
            blocker.execute("ROLLBACK")
        log.flush()
    drain(log.home)
    assert [(row.feedback_id, row.run_id) for row in judged_in(log.home)[0]] == [(said, meant)]
    assert lost.encode() in log.home.refused.read_bytes()
    assert not log.home.spill.exists()
