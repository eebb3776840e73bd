"""The split must be the same for ever: models are bundled that were trained on one side of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.prefer.split import is_held_out, split_point


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_prompt_keeps_its_side_for_ever() -> None:
    assert split_point(asked("What is the capital of France?")) == pytest.approx(
        0.879962280979206, abs=1e-15
    )


def test_a_fifth_of_many_prompts_is_held_out() -> None:
    held = sum(is_held_out(asked(f"question {n}"), 0.2) for n in range(5000))
    assert 900 <= held <= 1100


def test_the_system_message_moves_no_prompt() -> None:
    dated = [{"role": "system", "content": "Today is Monday."}, *asked("hi")]
    assert split_point(dated) == split_point(asked("hi"))


def test_what_the_assistant_said_before_is_part_of_the_prompt() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert split_point([*asked("hi"), turn]) != split_point(asked("hi"))


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_all_that_a_smaller_one_does(
    text: str, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    assert is_held_out(asked(text), small) <= is_held_out(asked(text), large)


@given(st.text())
def test_no_share_holds_out_nothing_and_the_whole_everything(text: str) -> None:
    assert not is_held_out(asked(text), 0)
    assert is_held_out(asked(text), 1)
