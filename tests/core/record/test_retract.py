"""What somebody takes back trains nothing any more, and stays in the history."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from agentpref.errors import InvalidFeedback, UnknownRun
from agentpref.home import Home
from agentpref.prefer.examples import ExampleSet, read_examples
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.record.transfer.merge import merge

ASKED = [{"role": "user", "content": "2 + 2?"}]


def found(home: Home) -> ExampleSet:
    with closing(connect(home)) as connection:
        return read_examples(Store(connection), "default", held_out=0.2)


def test_a_thumb_that_was_taken_back_makes_no_example(log: Log) -> None:
    run = log.record(ASKED, "5")
    log.thumbs(run, up=True, user_id="ana")
    log.retract(run, user_id="ana")
    assert found(log.home) == ExampleSet((), {"retracted": 1, "retraction": 1})
    log.thumbs(run, up=False, user_id="ana")
    assert len(found(log.home).thumbs) == 1


def test_only_the_voter_s_own_judgement_of_that_run_and_key_is_taken_back(log: Log) -> None:
    run, other = log.record(ASKED, "5"), log.record(ASKED, "4")
    log.thumbs(run, up=False, user_id="bob")
    log.retract(run, user_id="ana")
    log.retract(other, user_id="bob")
    log.retract(run, "correction", user_id="bob")
    assert len(found(log.home).thumbs) == 1
    assert found(log.home).left_out == {"nothing_to_retract": 3}


def test_a_correction_and_comparisons_are_taken_back(log: Log) -> None:
    a, b, c = (log.record(ASKED, text) for text in ("3", "4", "5"))
    log.correct(a, "four")
    log.compare(a, b, winner="b")
    log.compare(c, a, winner="a")
    assert len(found(log.home).pairs) == 3
    log.retract(a, "correction")
    assert len(found(log.home).pairs) == 2
    log.retract(a, "comparison", against=c)
    assert [pair.completions[0].message["content"] for pair in found(log.home).pairs] == ["4"]
    log.retract(b, "comparison")
    assert found(log.home) == ExampleSet((), {"retracted": 3, "retraction": 3})


def test_everything_is_taken_back_at_once(log: Log) -> None:
    a, b = log.record(ASKED, "3"), log.record(ASKED, "4")
    log.correct(a, "four")
    log.compare(a, b, winner="b")
    log.thumbs(a, up=False)
    log.thumbs(b, up=True)
    log.retract(a, None)
    assert len(found(log.home).thumbs) == 1
    assert found(log.home).left_out == {"retracted": 3, "retraction": 1}


def test_the_rows_stay_and_the_home_is_sound(log: Log, judged_in: Callable[[Home], Any]) -> None:
    run = log.record(ASKED, "5")
    thumb = log.thumbs(run, up=True)
    taken = log.retract(run, comment="misclicked")
    first, second = judged_in(log.home)[0]
    assert (first.feedback_id, second.feedback_id) == (thumb, taken)
    assert (second.key, second.value, second.comment) == (
        "retraction", {"key": "thumbs"}, "misclicked"
    )  # fmt: skip
    assert log.verify() == []


def test_a_redaction_does_not_touch_what_is_taken_back(home: Home) -> None:
    with Log(home.path, redact=lambda text: "x") as log:
        run, other = log.record(ASKED, "5"), log.record(ASKED, "4")
        log.compare(run, other, winner="b")
        log.retract(run, "comparison", against=other)
    assert found(home).left_out == {"retracted": 1, "retraction": 1}


def test_a_retraction_is_merged_and_forgotten_like_other_feedback(log: Log) -> None:
    run = log.record(ASKED, "5")
    log.thumbs(run, up=True, user_id="ana")
    log.flush()
    with Log(log.home.path.parent / "copy") as copy:
        merge(copy.home, [log.home])
        assert len(found(copy.home).thumbs) == 1
        log.retract(run, user_id="ana")
        merge(copy.home, [log.home])
        assert found(copy.home).thumbs == ()
        assert copy.forget("ana").feedback == 2
        assert found(copy.home).left_out == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"key": ""}, "key is ''; pass the key"),
        ({"key": 7}, "key is 7"),
        ({"against": "r"}, "against is a str of 1 characters, with another key; pass"),
        ({"key": "comparison", "against": [7]}, "against is a list of 1"),
        ({"source": "me"}, "source is a str of 2 characters"),
    ],
)
def test_a_wrong_argument_is_refused(log: Log, arguments: dict[str, Any], complaint: str) -> None:
    run = log.record(ASKED, "5")
    with pytest.raises(InvalidFeedback, match=complaint):
        log.retract(run, **arguments)


def test_an_unknown_run_is_refused(log: Log) -> None:
    with pytest.raises(UnknownRun):
        log.retract("nowhere")
