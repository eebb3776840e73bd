"""Conversations as decisions: how runs become steps, and what steps earn."""

from __future__ import annotations

import orjson
import pytest

import agentpref
from agentpref.errors import ConfigError, EvaluationError
from agentpref.traces import RewardSpec, read_traces, rewards_of
from agentpref.types import Feedback


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def call(number):
    function = {"name": "look", "arguments": "{}"}
    return {"role": "assistant", "content": "", "tool_calls": [
        {"id": f"c{number}", "type": "function", "function": function}]}  # fmt: skip


def result(number, text):
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def converse(log, *turns, thread="t1", **more):
    """Record a conversation; odd turns are the agent's."""
    return [
        log.record(list(turns[:place]), turns[place], thread_id=thread, **more)
        for place in range(1, len(turns), 2)
    ]


def test_steps_follow_one_another_and_what_was_said_to_the_agent_is_state(home):
    with agentpref.Log(home) as log:
        runs = converse(log, user("a"), said("b"), user("c"), said("d"), revision="rev-x",
                        logprobs=[-1.0, -0.5], token_ids=[1, 2])  # fmt: skip
        log.thumbs(runs[1], up=True)
    [trace] = read_traces(home).traces
    assert [step.run.run_id for step in trace.steps] == runs
    assert [step.reward for step in trace.steps] == [0.0, 1.0]
    assert [step.done for step in trace.steps] == [False, True]
    assert [step.scored for step in trace.steps] == [False, True]
    assert [step.logp for step in trace.steps] == [-1.5, -1.5]
    assert [m["content"] for m in trace.steps[1].state] == ["a", "b", "c"]
    assert trace.steps[1].action["content"] == "d"
    assert (trace.id, trace.value(), trace.value(0.5)) == ("t1", 1.0, 0.5)


def test_a_trace_comes_before_a_thread_and_a_run_without_either_is_alone(home):
    with agentpref.Log(home) as log:
        converse(log, user("a"), said("b"), thread="t", trace_id="x")
        converse(log, user("c"), said("d"), thread="t", trace_id="y")
        alone = log.record([user("e")], said("f"))
    assert {trace.id for trace in read_traces(home).traces} == {"x", "y", alone}


def test_an_answer_that_is_asked_for_again_makes_a_fork_with_two_ends(home):
    with agentpref.Log(home) as log:
        first, second = converse(log, user("a"), said("b"), user("c"), said("d"))
        other = log.record([user("a"), said("b"), user("c")], said("e"), thread_id="t1")
        log.thumbs(first, up=True)
    found = read_traces(home)
    paths = {tuple(step.run.run_id for step in trace.steps) for trace in found.traces}
    assert paths == {(first, second), (first, other)}
    assert found.odd == {"forks": 1, "unconnected": 0, "split": 0}
    assert [trace.value() for trace in found.traces] == [1.0, 1.0]


def test_runs_that_do_not_follow_are_counted_and_stand_alone(home):
    with agentpref.Log(home) as log:
        converse(log, user("a"), said("b"))
        converse(log, user("z"), said("y"))
    found = read_traces(home)
    assert [len(trace.steps) for trace in found.traces] == [1, 1]
    assert found.odd["unconnected"] == 1


@pytest.mark.parametrize(
    ("text", "failed"),
    [("Error: no such file", 1), ('{"error": "gone"}', 1), ('{"error": null}', 0), ("fine", 0),
     ("[1]", 0), ("", 0)],
)  # fmt: skip
def test_a_failed_tool_and_each_step_have_their_cost(home, text, failed):
    with agentpref.Log(home) as log:
        converse(log, user("a"), call(1), result(1, text), said("done"))
    spec = RewardSpec(cost=0.1, tool_error=1.0)
    [trace] = read_traces(home, spec).traces
    assert [step.reward for step in trace.steps] == pytest.approx([-0.1 - failed, -0.1])


def test_scores_count_by_their_weights_and_several_by_their_mean(home):
    with agentpref.Log(home) as log:
        [run] = converse(log, user("a"), said("b"))
        for score in (0.0, 1.0):
            log.feedback(run, key="resolved", score=score, user_id=str(score))
        log.thumbs(run, up=True)
        log.feedback(run, key="other", score=0.9)
    spec = RewardSpec({"resolved": 2.0, "thumbs": 0.25})
    assert read_traces(home, spec).traces[0].value() == pytest.approx(2 * 0.5 + 0.25)


def test_what_was_taken_back_earns_nothing(home):
    with agentpref.Log(home) as log:
        [run] = converse(log, user("a"), said("b"))
        log.thumbs(run, up=True, user_id="u")
        log.retract(run, user_id="u")
    [trace] = read_traces(home).traces
    assert (trace.value(), trace.steps[0].scored) == (0.0, False)


def test_a_key_with_two_scales_has_no_sum():
    rows = [
        Feedback(name, "run", 0.0, "stars", score, scale=scale)
        for name, score, scale in (("a", 4.0, (1.0, 5.0)), ("b", 0.5, (0.0, 1.0)))
    ]
    with pytest.raises(EvaluationError, match="'stars' has scores on 2 scales"):
        rewards_of(rows, RewardSpec({"stars": 1.0}))
    assert rewards_of(rows[:1], RewardSpec({"stars": 0.5})) == {"run": 2.0}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"cost": float("nan")}, "cost is nan"),
        ({"keys": {}}, "keys is {}"),
        ({"keys": {"a": 0.0}}, "a weight other than 0"),
        ({"keys": {"a": float("inf")}}, "a is inf"),
    ],
)
def test_a_wrong_specification_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        RewardSpec(**wrong)


def test_the_newest_conversations_are_read_and_statistics_say_what_is_there(home):
    with agentpref.Log(home) as log:
        for number in range(4):
            runs = converse(log, user(f"{number}"), said("b"), user("c"), said("d"),
                            thread=f"t{number}")  # fmt: skip
            log.thumbs(runs[-1], up=bool(number % 2))
    assert [trace.id for trace in read_traces(home, limit=2).traces] == ["t3", "t2"]
    stats = read_traces(home).stats()
    assert stats == {
        "traces": 4, "steps": 8, "longest": 2, "with_reward": 4, "with_logprobs": 0,
        "returns": {"mean": 0.5, "lowest": 0.0, "median": 0.5, "highest": 1.0},
        "revisions": {"base": 8}, "odd": {"forks": 0, "unconnected": 0, "split": 0},
    }  # fmt: skip
    assert orjson.dumps(stats)


def test_a_home_without_runs_has_no_traces(home):
    agentpref.Log(home).close()
    assert read_traces(home).stats()["returns"] is None


def test_a_conversation_without_the_name_of_its_thread_is_told(home):
    with agentpref.Log(home) as log:
        for name in "ab":
            log.record([user(name)], said("b"))
            log.record([user(name), said("b"), user("c")], said("d"))
        converse(log, user("x"), said("y"), user("z"), said("d"), thread="t")
    assert read_traces(home).odd["split"] == 2


def test_likes_are_worth_one_and_dislikes_nothing_however_they_were_written(home):
    with agentpref.Log(home) as log:
        for number, score in enumerate((1, -1, 1, 0)):
            run = log.record([user(f"{number}")], said("b"), thread_id=f"t{number}")
            log.feedback(run, key="thumbs", score=score)
    values = {trace.id: trace.value() for trace in read_traces(home).traces}
    assert values == {"t0": 1.0, "t1": 0.0, "t2": 1.0, "t3": 0.0}


def test_scores_of_two_sources_that_cannot_be_one_scale_are_refused(home):
    with agentpref.Log(home) as log:
        run = log.record([user("a")], said("b"))
        log.feedback(run, key="resolved", score=4.0, source="code")
        log.feedback(run, key="resolved", score=87.0, source="human")
    spec = RewardSpec(keys={"resolved": 1.0})
    with pytest.raises(EvaluationError, match="reach 4 by code, 87 by human"):
        read_traces(home, spec)
