"""TRL's formats: every way to write a preference reads as the same record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import PreferenceRecord, RowReader
from agentpref.prefer.formats.trl import write_preference, write_unpaired
from agentpref.record.messages import prompt_of
from agentpref.types import Message, Prompt


def read_row(row: dict[str, Any], format: str | None = None) -> PreferenceRecord:
    return RowReader(format).read(row)


def pair(prompt: Prompt, *answers: Message, tag: str | None = None) -> PreferenceRecord:
    return PreferenceRecord(prompt, answers, (1, 0), tag)


def thumb(prompt: Prompt, answer: Message, liked: bool, tag: str | None = None) -> PreferenceRecord:
    return PreferenceRecord(prompt, (answer,), (int(liked),), tag)


def turn(role: str, content: str | None, **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


SKY = [turn("user", "What colour is the sky?")]
BLUE, GREEN = turn("assistant", "Blue."), turn("assistant", "Green.")
PREFERRED = pair(prompt_of(SKY), BLUE, GREEN)

WAYS_TO_SAY_IT: dict[str, dict[str, Any]] = {
    "text": {"prompt": "What colour is the sky?", "chosen": "Blue.", "rejected": "Green."},
    "text, prompt implied": {
        "chosen": "What colour is the sky? Blue.",
        "rejected": "What colour is the sky? Green.",
    },
    "messages": {"prompt": SKY, "chosen": [BLUE], "rejected": [GREEN]},
    "messages, prompt implied": {"chosen": [*SKY, BLUE], "rejected": [*SKY, GREEN]},
    "messages that repeat the prompt": {
        "prompt": SKY,
        "chosen": [*SKY, BLUE],
        "rejected": [*SKY, GREEN],
    },
    "messages that repeat a text prompt": {
        "prompt": "What colour is the sky?",
        "chosen": [*SKY, BLUE],
        "rejected": [*SKY, GREEN],
    },
    "text answers to messages": {"prompt": SKY, "chosen": "Blue.", "rejected": "Green."},
    "nulls and other columns": {
        "prompt": SKY,
        "chosen": [BLUE],
        "rejected": [GREEN],
        "tools": None,
        "tag": None,
        "score_chosen": 9.5,
    },
}


@pytest.mark.parametrize("row", WAYS_TO_SAY_IT.values(), ids=WAYS_TO_SAY_IT)
def test_every_way_to_write_a_preference_reads_as_the_same_record(row: dict[str, Any]) -> None:
    assert read_row(row) == PREFERRED


@pytest.mark.parametrize("prompt", ["What colour is the sky?", SKY])
@pytest.mark.parametrize("completion", ["Blue.", [BLUE]])
@pytest.mark.parametrize("label", [True, 1])
def test_every_way_to_write_a_thumb_reads_as_the_same_record(
    prompt: Any, completion: Any, label: Any
) -> None:
    row = {"prompt": prompt, "completion": completion, "label": label}
    assert read_row(row) == thumb(prompt_of(SKY), BLUE, True)


def test_turns_that_both_sides_share_are_part_of_the_prompt() -> None:
    shared = [turn("assistant", "Day or night?"), turn("user", "Day.")]
    row = {"prompt": SKY, "chosen": [*shared, BLUE], "rejected": [*shared, GREEN]}
    assert read_row(row) == pair(prompt_of([*SKY, *shared]), BLUE, GREEN)


def test_a_text_prompt_beside_whole_conversations_adds_nothing_to_them() -> None:
    briefed = [turn("system", "Be brief."), *SKY]
    row = {
        "prompt": "What colour is the sky?",
        "chosen": [*briefed, BLUE],
        "rejected": [*briefed, GREEN],
    }
    assert read_row(row) == pair(prompt_of(briefed), BLUE, GREEN)


def test_an_implied_prompt_ends_between_words() -> None:
    row = read_row({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert row.prompt.messages == (turn("user", "The sky is"),)
    assert row.completions[1]["content"] == "black."


def test_tools_are_offered_with_the_prompt_in_either_form() -> None:
    tool = {"type": "function", "function": {"name": "look_up"}}
    answers = {"prompt": SKY, "chosen": [BLUE], "rejected": [GREEN]}
    as_list = read_row({**answers, "tools": [tool]})
    as_text = read_row({**answers, "tools": '[{"type":"function","function":{"name":"look_up"}}]'})
    assert as_list == as_text
    assert as_list.prompt == prompt_of(SKY, [tool])


def test_an_answer_may_be_a_tool_call() -> None:
    call = turn("assistant", None, tool_calls=[{"id": "1", "function": {"name": "look_up"}}])
    row = read_row({"prompt": SKY, "chosen": [call], "rejected": [BLUE]})
    assert row.completions[0] == call


def test_a_recorded_null_is_kept() -> None:
    recorded = prompt_of([SKY[0] | {"name": None}])
    told = pair(recorded, BLUE | {"refusal": None}, GREEN, tag="untagged")
    row = read_row(_as_json(write_preference(told)))
    assert row == pair(recorded, BLUE | {"refusal": None}, GREEN, tag="untagged")
    assert recorded != prompt_of(SKY)


def test_a_row_that_fits_both_formats_is_a_preference_unless_the_format_is_named() -> None:
    both = {**WAYS_TO_SAY_IT["messages"], "completion": [GREEN], "label": False}
    assert read_row(both) == PREFERRED
    assert read_row(both, "unpaired") == thumb(prompt_of(SKY), GREEN, False)


BAD_ROWS = {
    "the row has the keys 'prompt', 'chosen' and lacks 'rejected'; write 'prompt', 'chosen', "
    "'rejected' in every row of the preference format": {"prompt": "a", "chosen": "b"},
    "lacks 'label'; write 'prompt', 'completion', 'label' in every row of the unpaired": {
        "prompt": "a",
        "completion": "b",
    },
    "lacks 'chosen'": {"prompt": "a", "chosen": None, "rejected": "b"},
    "the row has the keys none": {},
    "'chosen' is 7; write text, or a list": {"prompt": "a", "chosen": 7, "rejected": "b"},
    "'rejected' is []; write text": {"prompt": "a", "chosen": "b", "rejected": []},
    "are not two answers after one beginning": {"chosen": "yes", "rejected": "no"},
    "'chosen' and 'rejected' are not two": {"chosen": "The sky", "rejected": "The sky"},
    "the row has no prompt": {"chosen": [BLUE], "rejected": [GREEN]},
    "differ before their last message": {
        "chosen": [*SKY, BLUE],
        "rejected": [turn("user", "And the sea?"), GREEN],
    },
    "the output has role 'user'": {"prompt": SKY, "chosen": SKY, "rejected": [BLUE]},
    "message 0 has role 'human'": {
        "prompt": [turn("human", "hi")],
        "chosen": "a",
        "rejected": "b",
    },
    "'label' is 'good'; write true": {"prompt": "a", "completion": "b", "label": "good"},
    "no 'prompt' but a 'question'; rename it": {
        "question": "What is above?",
        "chosen": "The sky is above.",
        "rejected": "The sky is below.",
    },
    "'tools' is 7; write a list of tools": {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "tools": 7,
    },
    "'tools' is not JSON": {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "look_up"},
    "tool 0 is a str": {"prompt": "a", "chosen": "b", "rejected": "c", "tools": ["look_up"]},
}


@pytest.mark.parametrize(("complaint", "row"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_with_its_cure(complaint: str, row: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError) as refused:
        read_row(row)
    assert complaint in str(refused.value)


texts = st.text(st.characters(codec="utf-8"))
prompts = st.lists(
    st.builds(turn, st.sampled_from(["system", "user", "assistant"]), texts), min_size=1
)
answers = st.builds(turn, st.just("assistant"), texts)


@given(prompts, answers, answers, st.sampled_from([(), ({"name": "look_up"},)]))
def test_a_written_pair_reads_back_as_the_same_record(
    messages: list[dict[str, Any]], chosen: Any, rejected: Any, tools: tuple[Any, ...]
) -> None:
    prompt = prompt_of(messages, tools)
    told = pair(prompt, chosen, rejected, tag="chat")
    assert read_row(_as_json(write_preference(told))) == told


@given(prompts, answers, st.booleans())
def test_a_written_thumb_reads_back_as_the_same_record(
    messages: list[dict[str, Any]], completion: Any, desirable: bool
) -> None:
    prompt = prompt_of(messages)
    told = thumb(prompt, completion, desirable, tag="chat")
    assert read_row(_as_json(write_unpaired(told))) == told


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
