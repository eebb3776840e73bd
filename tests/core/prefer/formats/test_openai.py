"""OpenAI's format, as its guide shows it."""

from __future__ import annotations

from typing import Any

import pytest

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import PreferenceRecord, openai
from agentpref.prefer.rowreader import RowReader
from agentpref.record.messages import prompt_of

ASKED = [{"role": "user", "content": "How cold is San Francisco today?"}]
GOOD = {"role": "assistant", "content": "Today it is 68 degrees Fahrenheit."}
BAD = {"role": "assistant", "content": "It is not particularly cold."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ROW: dict[str, Any] = {
    "input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True},
    "preferred_output": [GOOD],
    "non_preferred_output": [BAD],
}


def read_row(row: dict[str, Any]) -> PreferenceRecord:
    return RowReader().read(row)


def test_the_row_of_the_guide_is_a_preference() -> None:
    assert read_row(ROW) == PreferenceRecord(prompt_of(ASKED), (GOOD, BAD), (1, 0))


def test_tools_are_offered_with_the_prompt() -> None:
    row = read_row({**ROW, "input": {"messages": ASKED, "tools": [TOOL]}})
    assert row.prompt == prompt_of(ASKED, [TOOL])


def test_turns_that_both_outputs_share_are_part_of_the_prompt() -> None:
    calls = [
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "weather"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "68"},
    ]
    row = {**ROW, "preferred_output": [*calls, GOOD], "non_preferred_output": [*calls, BAD]}
    assert read_row(row) == PreferenceRecord(prompt_of([*ASKED, *calls]), (GOOD, BAD), (1, 0))


def test_a_pair_is_written_with_only_the_keys_that_openai_defines() -> None:
    pair = PreferenceRecord(prompt_of(ASKED, [TOOL]), (GOOD, BAD), (1, 0), tag="x")
    assert openai.write(pair) == {
        "input": {"messages": tuple(ASKED), "tools": (TOOL,)},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    }


BAD_ROWS: dict[str, dict[str, Any]] = {
    "lacks 'non_preferred_output'; write 'input', 'preferred_output'": {
        "non_preferred_output": None
    },
    "'input' is a str of 9 characters; write {'messages': […]}": {"input": "How cold?"},
    "'input' is a dict of 1; write": {"input": {"tools": []}},
    "'preferred_output' is a dict of 2; write": {"preferred_output": GOOD},
    "'preferred_output' and 'non_preferred_output' differ before their last message": {
        "preferred_output": [BAD, GOOD],
    },
    "messages is an empty list": {"input": {"messages": []}},
    "the output has role 'user'": {"preferred_output": ASKED},
    "'tools' is a dict of 1; write": {"input": {"messages": ASKED, "tools": {"x": 1}}},
}


@pytest.mark.parametrize(("complaint", "change"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_with_its_cure(complaint: str, change: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError) as refused:
        RowReader("openai").read({**ROW, **change})
    assert complaint in str(refused.value)
