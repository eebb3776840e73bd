"""Which logged conversations teach, which prove, and how they are laid out for a critic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentpref import Log
from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.learn.encode import EncodedExample
from agentpref.learn.features import Features
from agentpref.offline.decisions import Layout, lay_out, scored, teachable
from agentpref.traces import RewardSpec, read_traces
from agentpref.types import INCOMPLETE, Message

SHARE = 0.2


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    Home.create(tmp_path / "home")
    return tmp_path / "home"


def talk(log: Log, name: str, score: float | None, turns: int = 2, begin: str = "") -> list[str]:
    """One conversation; its last answer is scored."""
    messages, runs = [user(begin or f"Hello from {name}")], []
    for number in range(turns):
        answer = said(f"step {number}")
        runs.append(log.record(messages, answer, model="m", thread_id=name))
        messages = [*messages, answer, user(f"done {number}")]
    if score is not None:
        log.feedback(runs[-1], key="won", score=score, source="code")
    return runs


def read(home: Path, gamma: float = 0.5):
    spec = RewardSpec({"won": 1.0}, gamma=gamma)
    return scored(read_traces(home, spec).traces, SHARE, gamma)


def laid(found, *, held_out: bool = False, without: frozenset[str] = frozenset()) -> Layout:
    """The layout, with rows and features that tell prompts and answers apart."""
    prompts = {e.prompt.id: n for n, e in enumerate(found.examples.values())}
    rows, features = {}, {}
    for name, example in found.examples.items():
        if name not in without:
            number = prompts[example.prompt.id]
            words = example.completions[0].message["content"]
            rows[name] = EncodedExample(example, (number,), (tuple(words.encode()),), (None,))
            vector = np.full(3, float(number))
            features[name] = Features(vector, np.full((1, 5), len(words)), vector)
    return lay_out(found.side(held_out=held_out), rows, features, 0.5)


def test_conversations_without_a_score_teach_nothing_and_are_counted(home: Path) -> None:
    with Log(home) as log:
        talk(log, "a", 1.0)
        talk(log, "b", None)
        talk(log, "c", 0.0)
    found = read(home)
    assert {trace.id for trace in found.traces} == {"a", "c"}
    assert found.left_out == {"conversation_without_reward": 1}
    assert len(found.examples) == 4
    assert {e.origin for e in found.examples.values()} == {"decision"}


def test_the_thread_of_a_conversation_decides_about_all_of_it(home: Path) -> None:
    with Log(home) as log:
        for number in range(60):
            talk(log, f"t{number}", 1.0, turns=3, begin="Hi")  # as many of them do
    found = read(home)
    held, trained = (found.side(held_out=side) for side in (True, False))
    assert len(held) + len(trained) == 60
    assert 3 <= len(held) <= 25
    for trace in held:
        assert all(found.examples[step.run.run_id].held_out for step in trace.steps)
    assert not any(found.examples[s.run.run_id].held_out for t in trained for s in t.steps)


def test_another_score_makes_another_example(home: Path) -> None:
    with Log(home) as log:
        runs = talk(log, "a", 1.0)
        before = {name: e.example_id for name, e in read(home).examples.items()}
        log.feedback(runs[0], key="won", score=1.0, source="code")
        log.flush()
        after = {name: e.example_id for name, e in read(home).examples.items()}
    assert before[runs[0]] != after[runs[0]]
    assert before[runs[1]] == after[runs[1]]  # which comes after it


def test_decisions_follow_one_another_and_earn_what_they_led_to(home: Path) -> None:
    with Log(home) as log:
        for number in range(40):
            talk(log, f"t{number}", float(number % 2), turns=1 + number % 3)
    found = read(home)
    layout = laid(found)
    data = layout.data
    assert len(data) == sum(len(trace.steps) for trace in found.side(held_out=False))
    runs = {s.run.run_id: (t, n) for t in found.traces for n, s in enumerate(t.steps)}
    for number, name in enumerate(layout.runs):
        trace, place = runs[name]
        assert data.returns()[number] == pytest.approx(
            sum(0.5**k * step.reward for k, step in enumerate(trace.steps[place:]))
        )
        assert data.done[number] == (place == len(trace.steps) - 1)
    assert data.begins.sum() == len(found.side(held_out=False))
    assert (data.of[data.taken] == data.state).all()


def test_a_step_that_two_conversations_share_counts_once(home: Path) -> None:
    with Log(home) as log:
        first = log.record([user("Hi")], said("Yes?"), model="m", thread_id="a")
        before = [user("Hi"), said("Yes?"), user("Help")]
        ends = [log.record(before, said(text), model="m", thread_id="a") for text in ("Sure", "No")]
        for end, score in zip(ends, (1.0, 0.0), strict=True):
            log.feedback(end, key="won", score=score, source="code")
    found = read(home)
    held = found.examples[first].held_out
    layout = laid(found, held_out=held)
    assert layout.runs.count(first) == 2
    assert {*layout.data.thread.tolist()} == {0}  # they are one conversation to a resample
    assert (
        sum(w for w, run in zip(layout.data.weight, layout.runs, strict=True) if run == first) == 1
    )
    assert len({int(s) for s in layout.data.state}) == 2  # both ends are of one state
    assert sorted(layout.data.returns()[layout.data.begins]) == [0.0, 0.5]


def test_a_step_before_one_that_cannot_be_read_is_left_out(home: Path) -> None:
    with Log(home) as log:
        runs = talk(log, "a", 1.0, turns=3)
    found = read(home)
    held = found.examples[runs[0]].held_out
    layout = laid(found, held_out=held, without=frozenset({runs[1]}))
    assert layout.runs == (runs[2],)
    assert layout.unfinished == 1


def test_steps_before_a_gap_are_linked_to_no_other_conversation(home: Path) -> None:
    with Log(home) as log:
        for name in "abcd":
            talk(log, name, 1.0, turns=3)
    found = read(home)
    for held_out in (False, True):
        traces = found.side(held_out=held_out)
        gone = frozenset(trace.steps[2].run.run_id for trace in traces[::2])
        layout = laid(found, held_out=held_out, without=gone)
        data, whole = layout.data, len(traces[1::2])
        assert len(data) == 3 * whole
        assert layout.unfinished == 2 * len(traces[::2])
        assert data.begins.sum() == whole
        assert [*data.after] == [n + 1 if n % 3 < 2 else -1 for n in range(3 * whole)]
        assert sorted({*data.trace.tolist()}) == [*range(whole)]


def test_more_answers_are_added_once(home: Path) -> None:
    with Log(home) as log:
        runs = talk(log, "a", 1.0)
    found = read(home)
    layout = laid(found, held_out=found.examples[runs[0]].held_out)
    known = layout.tokens[0]
    drawn = [[known, (9,), (9,)], []]
    more = layout.with_answers(drawn, [np.zeros((3, 5)), np.zeros((0, 5))])
    assert more.tokens == (*layout.tokens, (9,))
    assert more.data.of.tolist() == [0, 1, 0]
    assert more.data.answer.shape == (3, 5)
    assert more.data.taken.tolist() == layout.data.taken.tolist()


def test_what_is_no_example_to_follow_is_valued_only(home: Path) -> None:
    with Log(home) as log:
        (name,) = talk(log, "a", 1.0, turns=1)
    run = read_traces(home, RewardSpec({"won": 1.0})).traces[0].steps[0].run
    example = read(home).examples[name]
    assert teachable(example, run, frozenset()) == ""
    assert teachable(example, run, frozenset({example.prompt.id})) == "held_out_elsewhere"
    cut = replace(run, metadata={"finish_reason": INCOMPLETE})
    assert teachable(example, cut, frozenset()) == "incomplete_answer"


@pytest.mark.parametrize("name", ["cost", "tool_error", "gamma", "rewards"])
def test_each_setting_of_the_rewards_changes_what_decisions_earn(home: Path, name: str) -> None:
    with Log(home) as log:
        talk(log, "a", 1.0)
        call = {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ]}  # fmt: skip
        log.record([user("Call")], call, model="m", thread_id="b")
        result = {"role": "tool", "tool_call_id": "1", "content": "error: no"}
        run = log.record([user("Call"), call, result], said("Sorry"), model="m", thread_id="b")
        log.feedback(run, key="won", score=0.5, source="code")
    usual = UpdateConfig(method="iql").offline
    other = {"cost": 0.1, "tool_error": 0.3, "gamma": 0.5, "rewards": {"won": 2.0}}[name]
    values = []
    for settings in (
        replace(usual, rewards={"won": 1.0}),
        replace(usual, **{"rewards": {"won": 1.0}, name: other}),
    ):
        spec = RewardSpec(settings.rewards, settings.cost, settings.tool_error, settings.gamma)
        found = scored(read_traces(home, spec).traces, SHARE, settings.gamma)
        values.append(sorted(e.example_id for e in found.examples.values()))
    assert values[0] != values[1]
