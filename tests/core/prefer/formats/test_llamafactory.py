"""LLaMA-Factory's ranking formats: what is read, written and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import PreferenceRecord, llamafactory
from agentpref.prefer.rowreader import RowReader
from agentpref.record.messages import prompt_of
from agentpref.types import Message


def said(role: str, content: Any, **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


def turn(sender: str, value: str) -> dict[str, str]:
    return {"from": sender, "value": value}


def pair_of(messages: list[Message], chosen: Message, tools: Any = ()) -> PreferenceRecord:
    prompt = prompt_of(messages, tools)
    return PreferenceRecord(prompt, (chosen, NO), (1, 0), tag="sea")


def read_row(row: dict[str, Any]) -> PreferenceRecord:
    return RowReader().read(row)


SKY, BLUE, NO = said("user", "The sky?"), said("assistant", "Blue."), said("assistant", "No idea.")
TOOL = {"type": "function", "function": {"name": "look_up"}}
SHAREGPT: dict[str, Any] = {
    "conversations": [turn("human", "The sky?")],
    "chosen": turn("gpt", "Blue."),
    "rejected": turn("gpt", "No idea."),
}
ALPACA = {"instruction": "The sky?", "chosen": "Blue.", "rejected": "No idea."}


def call(arguments: Any, **rest: Any) -> dict[str, Any]:
    return {**rest, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


class TestReading:
    @pytest.mark.parametrize("row", [SHAREGPT, ALPACA, {**ALPACA, "input": "", "history": []}])
    def test_both_shapes_say_the_same(self, row: dict[str, Any]) -> None:
        assert read_row(row) == PreferenceRecord(prompt_of([SKY]), (BLUE, NO), (1, 0))

    def test_every_kind_of_turn_has_its_role(self) -> None:
        turns = [
            turn("system", "Be brief."),
            turn("human", "The sky?"),
            turn("function_call", '{"name": "look_up", "arguments": {"of": "sky"}}'),
            turn("observation", "blue"),
        ]
        row = read_row({**SHAREGPT, "conversations": turns, "tools": json.dumps([TOOL])})
        called = said("assistant", None, tool_calls=[call('{"of": "sky"}')])
        assert row.prompt == prompt_of(
            [said("system", "Be brief."), SKY, called, said("tool", "blue")], [TOOL]
        )

    def test_an_answer_may_call_several_tools(self) -> None:
        calls = [{"name": "look_up", "arguments": {}}, {"name": "look_up", "arguments": "as text"}]
        row = read_row({**SHAREGPT, "chosen": turn("function_call", json.dumps(calls))})
        assert row.completions[0]["tool_calls"] == [call("{}"), call("as text")]

    def test_a_system_turn_goes_before_the_system_column(self) -> None:
        brief = {**SHAREGPT, "system": "Be brief."}
        assert read_row(brief).prompt == prompt_of([said("system", "Be brief."), SKY])
        turns = [turn("system", "Be long."), turn("human", "The sky?")]
        told = read_row({**brief, "conversations": turns})
        assert told.prompt == prompt_of([said("system", "Be long."), SKY])

    def test_an_instruction_has_input_history_and_a_system_prompt(self) -> None:
        more = {"input": "At noon.", "history": [["Hi!", "Hello."]], "system": "Be brief."}
        assert read_row({**ALPACA, **more}).prompt == prompt_of(
            [
                said("system", "Be brief."),
                said("user", "Hi!"),
                said("assistant", "Hello."),
                said("user", "The sky?\nAt noon."),
            ]
        )


BAD_ROWS: dict[str, dict[str, Any]] = {
    "'conversations' is a str of 2 characters; write a list of turns": {"conversations": "hi"},
    "turn 0 is a str of 2 characters; write {'from': 'human'": {"conversations": ["hi"]},
    "turn 0 is a dict of 1; write": {"conversations": [{"from": "human"}]},
    "turn 0 is from a str of 4 characters; use one of 'human', 'gpt'": {
        "conversations": [turn("bing", "hi")]
    },
    "messages is an empty list": {"conversations": []},
    "'chosen' is a str of 5 characters; write {'from'": {"chosen": "Blue."},
    "the output has role 'user'": {"chosen": turn("human", "hi")},
    "the value of 'chosen' is not JSON": {"chosen": turn("function_call", "look_up")},
    "the value of 'chosen' is []; write {'name'": {"chosen": turn("function_call", "[]")},
    "the value of 'chosen' is a dict of 1; write": {"chosen": turn("function_call", '{"name": 7}')},
    "the message that 'chosen' carries is not JSON (Input must be": {
        "chosen": {**turn("gpt", "Blue."), "agentpref": 7}
    },
    "the message that 'chosen' carries is not JSON (unexpected": {
        "chosen": {**turn("gpt", "Blue."), "agentpref": "{"}
    },
    "'chosen' carries another message than it shows; remove": {
        "chosen": {**turn("gpt", "Grey."), "agentpref": json.dumps(BLUE)}
    },
    "'chosen' has no text": {
        "chosen": {**turn("gpt", "Blue."), "agentpref": json.dumps(said(["gpt"], "Blue."))}  # type: ignore[arg-type]
    },
    "'system' is 7; write text": {"system": 7},
}
BAD_INSTRUCTIONS: dict[str, dict[str, Any]] = {
    "'instruction' is 7; write text": {"instruction": 7},
    "'chosen' is a list of 1; write text": {"chosen": ["Blue."]},
    "'history' is a str of 2 characters; write a list of ['question', 'answer']": {"history": "hi"},
    "'history' is a list of 1; write": {"history": [["hi"]]},
}


@pytest.mark.parametrize(("complaint", "change"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_conversation_is_refused_with_its_cure(
    complaint: str, change: dict[str, Any]
) -> None:
    with pytest.raises(ExchangeError) as refused:
        read_row({**SHAREGPT, **change})
    assert complaint in str(refused.value)


@pytest.mark.parametrize(("complaint", "change"), BAD_INSTRUCTIONS.items(), ids=BAD_INSTRUCTIONS)
def test_a_bad_instruction_is_refused_with_its_cure(complaint: str, change: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError) as refused:
        read_row({**ALPACA, **change})
    assert complaint in str(refused.value)


class TestWriting:
    def test_plain_messages_are_plain_turns(self) -> None:
        briefed = [said("system", "Be brief."), SKY, NO, said("user", "Look up!")]
        assert llamafactory.write(pair_of(briefed, BLUE)) == {
            "conversations": [
                turn("system", "Be brief."),
                turn("human", "The sky?"),
                turn("gpt", "No idea."),
                turn("human", "Look up!"),
            ],
            "chosen": turn("gpt", "Blue."),
            "rejected": turn("gpt", "No idea."),
            "tag": "sea",
        }

    def test_tools_are_json_text(self) -> None:
        row = llamafactory.write(pair_of([SKY], BLUE, [TOOL]))
        assert json.loads(row["tools"]) == [TOOL]

    def test_a_call_is_written_with_its_arguments_as_an_object(self) -> None:
        called = said("assistant", None, tool_calls=[call('{"of": "sky"}', id="1")])
        chosen = llamafactory.write(pair_of([SKY], called))["chosen"]
        assert chosen["from"] == "function_call"
        assert json.loads(chosen["value"]) == {"name": "look_up", "arguments": {"of": "sky"}}
        assert json.loads(chosen["agentpref"]) == called

    @pytest.mark.parametrize(
        "message",
        [
            said("user", "The sky?", name="ana"),
            said("user", [{"type": "text", "text": "The "}, {"type": "text", "text": "sky?"}]),
            {"content": "The sky?", "role": "user"},
        ],
    )
    def test_a_turn_carries_the_message_that_it_cannot_show(self, message: Message) -> None:
        row = llamafactory.write(pair_of([message], BLUE))
        [shown] = row["conversations"]
        assert (shown["from"], shown["value"]) == ("human", "The sky?")
        [back] = read_row(row).prompt.messages
        assert list(back.items()) == list(message.items())

    @pytest.mark.parametrize(
        "called",
        [
            said("assistant", "", tool_calls=[call("{}")]),
            {"role": "assistant", "tool_calls": [call({"of": "sky"}, id="7"), call("{}")]},
            said("assistant", None, tool_calls=[call('{"of":"sky"}')], refusal=""),
        ],
    )
    def test_tool_calls_read_back_exactly_as_written(self, called: Message) -> None:
        row = read_row(llamafactory.write(pair_of([SKY], called)))
        assert row.completions[0] == called


PICTURE = {"type": "image_url", "image_url": {"url": "sky.png"}}
TOO_MUCH: dict[str, PreferenceRecord] = {
    "message 0 has parts that are not text": pair_of([said("user", [PICTURE])], BLUE),
    "the chosen answer holds text and tool calls": pair_of(
        [SKY], said("assistant", "Look:", tool_calls=[call("{}")])
    ),
    "the chosen answer has no text": pair_of([SKY], said("assistant", None)),
    "the argument text with which the chosen answer calls 'look_up' is not JSON": pair_of(
        [SKY], said("assistant", None, tool_calls=[call("{of: sky}")])
    ),
    "the chosen answer holds a call that names no function": pair_of(
        [SKY], said("assistant", None, tool_calls=[{"id": "1"}])
    ),
    "message 1 is from 'human', but": pair_of([SKY, SKY], BLUE),
    "message 3 is from 'observation', but": pair_of(
        [SKY, NO, said("tool", "blue"), said("tool", "blue")], BLUE
    ),
    "message 1 is from 'system', but": pair_of([SKY, said("system", "Be brief.")], BLUE),
    "message 0 is from 'gpt', but": pair_of([BLUE], BLUE),
    "the prompt does not end with a user or a tool": pair_of([SKY, NO], BLUE),
}


@pytest.mark.parametrize(("complaint", "pair"), TOO_MUCH.items(), ids=TOO_MUCH)
def test_a_pair_that_the_format_cannot_hold_is_refused_with_the_cure(
    complaint: str, pair: PreferenceRecord
) -> None:
    with pytest.raises(ExchangeError) as refused:
        llamafactory.write(pair)
    assert complaint in str(refused.value)
    assert str(refused.value).endswith(
        "export it in the format 'preference', or leave it out with --skip-bad"
    )
