"""Prompts that are too long lose whole old turns, which is counted; completions are never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentpref.learn.encode import encode
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import encode_prompt
from agentpref.models.turns import shorter
from agentpref.types import Example, Prompt
from tests.core.learn.examples import make_pair, with_completions

SYSTEM = {"role": "system", "content": "Be brief."}


def turn(number: int, *, tool: bool = False) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": f"Question {number}, and what of it?"}
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    looked = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": f"Result {number}"},
    ]
    return [asked, *(looked if tool else []), {"role": "assistant", "content": f"A{number}"}]


def prompt_of(turns: int, *, system: bool = True, tool: bool = False) -> Prompt:
    messages = [m for n in range(turns) for m in turn(n, tool=tool)][:-1]
    return Prompt("", (*([SYSTEM] if system else []), *messages))


def pair_of(prompt: Prompt, chosen: str = "A long answer, yes.", rejected: str = "No.") -> Example:
    return make_pair(0, chosen, rejected, prompt=prompt)


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(random_base)


def test_whole_turns_are_dropped_and_the_system_message_stays() -> None:
    prompts = shorter(prompt_of(3, tool=True))
    asked = [[m["content"] for m in p.messages if m["role"] == "user"] for p in prompts]
    assert [len(questions) for questions in asked] == [2, 1]
    assert all(p.messages[0] == SYSTEM and p.messages[1]["role"] == "user" for p in prompts)
    assert prompts[-1].messages == (SYSTEM, *turn(2, tool=True)[:-1])


@pytest.mark.parametrize("messages", [[], [SYSTEM], turn(0), [SYSTEM, *turn(0, tool=True)]])
def test_one_turn_cannot_be_made_shorter(messages: Any) -> None:
    assert shorter(Prompt("", tuple(messages))) == []


def test_a_first_message_of_the_assistant_is_dropped_with_the_oldest_turn() -> None:
    hello = {"role": "assistant", "content": "Hello!"}
    (last,) = shorter(Prompt("", (SYSTEM, hello, *turn(0))))
    assert last.messages == (SYSTEM, *turn(0))


def test_two_questions_in_a_row_are_one_turn() -> None:
    again = {"role": "user", "content": "Well?"}
    assert shorter(Prompt("", (turn(0)[0], again))) == []


@given(st.integers(1, 7), st.booleans(), st.booleans(), st.integers(1, 400))
def test_as_few_turns_as_possible_are_dropped_and_no_answer_is_cut(
    tokenizer: Any, turns: int, system: bool, tool: bool, room: int
) -> None:
    pair = pair_of(prompt_of(turns, system=system, tool=tool))
    (whole,) = encode([pair], ChatTemplate(tokenizer), max_length=10_000).rows
    found = encode([pair], ChatTemplate(tokenizer), max_length=room)
    longest = max(map(len, whole.completions))
    candidates = [
        encode_prompt(p, ChatTemplate(tokenizer)) for p in (pair.prompt, *shorter(pair.prompt))
    ]
    fitting = [ids for ids in candidates if len(ids) + longest <= room]
    if not fitting:
        assert (found.rows, found.left_out, found.shortened) == ([], {"too_long": 1}, {})
        return
    (row,) = found.rows
    assert (row.prompt, row.completions, row.example) == (fitting[0], whole.completions, pair)
    cut = fitting[0] != candidates[0]
    assert (found.left_out, found.shortened) == ({}, {"prompt_shortened": 1} if cut else {})


def test_logged_tokens_are_never_cut(tokenizer: Any) -> None:
    ids = tuple(tokenizer("A long answer, yes.", add_special_tokens=False)["input_ids"])
    pair = with_completions(pair_of(prompt_of(5)), {"token_ids": ids})
    found = encode([pair], ChatTemplate(tokenizer), max_length=80)
    assert found.rows[0].completions[0] == ids
    assert found.shortened == {"prompt_shortened": 1}
    assert encode([pair], ChatTemplate(tokenizer), max_length=len(ids)).left_out == {"too_long": 1}


def test_a_learner_counts_left_out_shortened_and_retokenized_examples_apart(
    make_learner: Any,
) -> None:
    learner = make_learner(max_length=64)
    foreign = with_completions(pair_of(prompt_of(1, system=False)), {"token_ids": (10**6,)})
    pairs = [pair_of(prompt_of(4, system=False)), pair_of(prompt_of(1), "word " * 99), foreign]
    assert len(learner.encode(pairs)) == 2
    assert [o.reason for o in learner.objections.values()] == ["too_long"]
    assert learner.shortened == {"prompt_shortened": 1}
    assert learner.retokenized == {"foreign_token_ids": 1}
