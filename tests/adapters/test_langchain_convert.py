from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.tools import tool
from pydantic import BaseModel

from agentpref.record.ingest import freeze_what_can_be_kept
from agentpref.record.messages import prompt_of
from agentpref_adapters._langchain_messages import first_id, openai_messages, openai_tool

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def openai_message(message: BaseMessage) -> dict[str, Any]:
    (body,) = openai_messages([message])
    return body


def test_a_conversation_with_a_tool_call_is_converted_to_openais_shape() -> None:
    call = {"name": "add", "args": {"a": 1, "b": "é"}, "id": "c1", "type": "tool_call"}
    messages = openai_messages(
        [
            SystemMessage("be brief"),
            HumanMessage("1 + é?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage("3", tool_call_id="c1", name="add"),
            AIMessage("3"),
        ]
    )
    function = {"name": "add", "arguments": '{"a": 1, "b": "é"}'}
    assert messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + é?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "3"},
    ]
    prompt_of(messages)


def test_multimodal_content_stays_a_list() -> None:
    blocks: list[str | dict[Any, Any]] = [{"type": "text", "text": "what is this?"}, IMAGE]
    assert openai_message(HumanMessage(blocks))["content"] == blocks


@pytest.mark.parametrize(
    "message", [HumanMessage, SystemMessage, lambda content: ToolMessage(content, tool_call_id="c")]
)
def test_several_blocks_of_a_prompt_stay_blocks(message: Any) -> None:
    """Nothing says what separates them; the chat template joins them as in serving."""
    blocks = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    assert openai_message(message(blocks))["content"] == blocks
    assert openai_message(message(blocks[:1]))["content"] == "first"


def test_the_blocks_of_an_answer_are_joined_without_separator() -> None:
    cut = AIMessage([{"type": "text", "text": "The sky "}, {"type": "text", "text": "is blue."}])
    assert openai_message(cut) == {"role": "assistant", "content": "The sky is blue."}


def test_a_tool_use_block_of_anthropic_becomes_a_tool_call() -> None:
    block = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
    call = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
    body = openai_message(
        AIMessage([{"type": "text", "text": "Let me see"}, block], tool_calls=[call])
    )
    assert body["content"] == "Let me see"
    assert [call["id"] for call in body["tool_calls"]] == ["c1"]


def test_an_invalid_tool_call_is_kept_as_the_model_wrote_it() -> None:
    wrong = {
        "name": "add",
        "args": '{"a": 1',
        "id": "c1",
        "error": "cut",
        "type": "invalid_tool_call",
    }
    body = openai_message(AIMessage("", invalid_tool_calls=[wrong]))
    assert body["tool_calls"] == [
        {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 1'}}
    ]


def test_a_streamed_message_equals_the_same_message_in_one_piece() -> None:
    streamed = AIMessageChunk("blue") + AIMessageChunk(" sky")
    assert openai_message(streamed) == openai_message(AIMessage("blue sky"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
tool_calls = st.builds(
    lambda name, args, id: {"name": name, "args": args, "id": id, "type": "tool_call"},
    st.text(min_size=1),
    st.dictionaries(st.text(), json_values, max_size=3),
    st.text(min_size=1),
)
written = st.one_of(
    st.builds(SystemMessage, st.text()),
    st.builds(HumanMessage, st.text()),
    st.builds(AIMessage, st.text(), tool_calls=st.lists(tool_calls, max_size=2)),
    st.builds(ToolMessage, st.text(), tool_call_id=st.text(min_size=1)),
)


@settings(deadline=None, max_examples=50)
@given(written)
def test_a_message_converted_there_and_back_is_the_same(message: BaseMessage) -> None:
    (back,) = convert_to_messages([openai_message(message)])
    assert type(back) is type(message)
    assert back.text == message.text
    assert getattr(back, "tool_calls", None) == getattr(message, "tool_calls", None)
    assert getattr(back, "tool_call_id", None) == getattr(message, "tool_call_id", None)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Search(BaseModel):
    """Look something up."""

    query: str


def anthropic_tool() -> dict[str, Any]:
    return {
        "name": "add",
        "description": "Add",
        "input_schema": {"type": "object", "properties": {}},
    }


@pytest.mark.parametrize(
    ("given_as", "name"),
    [
        (add, "add"),
        (Search, "Search"),
        (anthropic_tool(), "add"),
        ({"type": "function", "function": {"name": "f", "parameters": {}}}, "f"),
    ],
)
def test_tools_in_every_form_get_the_same_description(given_as: Any, name: str) -> None:
    described = openai_tool(given_as)
    assert described["type"] == "function"
    assert described["function"]["name"] == name
    json.dumps(described)


def test_a_built_in_tool_of_a_provider_is_kept() -> None:
    own = {"google_search": {}}
    assert openai_tool(own) == own


def test_an_object_that_is_not_a_tool_is_refused() -> None:
    with pytest.raises(ValueError, match="Unsupported"):
        openai_tool(3)


def test_an_id_is_read_from_the_first_place_that_has_one() -> None:
    assert (
        first_id("thread_id", None, {}, {"thread_id": None}, {"thread_id": 7}, {"thread_id": 8})
        == "7"
    )
    assert first_id("thread_id", {"user_id": "u"}) is None


# Blocks of every provider.

ODD_BLOCKS = [
    {"type": "video", "url": "https://example.org/cat.mp4"},
    {"type": "text-plain", "text": "a file", "mime_type": "text/plain"},
    {"type": "audio", "url": "https://example.org/cat.mp3"},
    {"type": "file", "url": "https://example.org/cat.pdf"},
    {"type": "image", "file_id": "f1"},
    {"type": "media", "mime_type": "video/mp4", "file_uri": "gs://bucket/cat.mp4"},
    {"type": "image", "source": {"type": "url", "url": "https://example.org/cat.png"}},
    {"type": "image", "source": {"type": "file", "file_id": "f1"}},
    {"type": "tool_use", "id": "c1"},
    {"type": "text", "text": None},
    {"type": "something new", "data": [1]},
]
TEXT = {"type": "text", "text": "what is this?"}


@pytest.mark.parametrize("block", ODD_BLOCKS)
@pytest.mark.parametrize("kind", [HumanMessage, SystemMessage, AIMessage])
def test_a_block_that_openai_does_not_have_stays_as_it_is(
    kind: type[BaseMessage], block: dict[str, Any]
) -> None:
    assert openai_message(kind([block, TEXT]))["content"] == [block, TEXT]


def test_a_result_of_a_tool_with_any_block_is_a_message_of_the_tool() -> None:
    blocks = [TEXT, ODD_BLOCKS[0]]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": blocks}
    said = {"role": "tool", "tool_call_id": "c1", "content": blocks}
    assert openai_messages([HumanMessage([result])]) == [said]
    asked = {"role": "user", "content": "what is this?"}
    assert openai_messages([HumanMessage([result, TEXT])]) == [said, asked]
    assert openai_messages([HumanMessage([TEXT, result])]) == [asked, said]
    assert openai_messages([ToolMessage(blocks, tool_call_id="c1")]) == [said]


def test_a_file_gets_no_name_that_it_did_not_have() -> None:
    file = {"type": "file", "file_id": "f1"}
    assert openai_message(HumanMessage([file]))["content"] == [
        {"type": "file", "file": {"file_id": "f1"}}
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_call", "id": "c1", "name": "add", "args": {"a": 1}},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
        {"type": "function_call", "id": "x", "call_id": "c1", "name": "add", "arguments": "{}"},
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_call_in_a_block_is_converted_once(block: dict[str, Any], told: bool) -> None:
    call = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
    body = openai_message(AIMessage([TEXT, block], tool_calls=[call] if told else []))
    assert body["content"] == "what is this?"
    (called,) = body["tool_calls"]
    assert (called["id"], called["function"]["name"]) == ("c1", "add")


def test_a_message_without_calls_has_no_list_of_calls() -> None:
    assert "tool_calls" not in openai_message(AIMessage("blue", tool_calls=[]))


def test_arguments_that_json_cannot_hold_are_left_to_the_log() -> None:
    call = {"name": "add", "args": {"when": {1}}, "id": "c1", "type": "tool_call"}
    (called,) = openai_message(AIMessage("", tool_calls=[call]))["tool_calls"]
    assert called["function"]["arguments"] == {"when": {1}}


SUMMARY = [{"type": "summary_text", "text": "One."}, {"type": "summary_text", "text": "Two."}]


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        (AIMessage("4", additional_kwargs={"reasoning_content": "sum"}), "sum"),
        (AIMessage("4", additional_kwargs={"reasoning": "sum"}), "sum"),
        (AIMessage("4", additional_kwargs={"reasoning": {"summary": SUMMARY}}), "One.\n\nTwo."),
        (AIMessage([{"type": "reasoning", "reasoning": "sum"}, "4"]), "sum"),
        (AIMessage([{"type": "thinking", "thinking": "sum", "signature": "s"}, "4"]), "sum"),
        (AIMessage([{"type": "reasoning", "id": "r", "summary": SUMMARY}, "4"]), "One.\n\nTwo."),
        (
            AIMessage([{"type": "reasoning_content", "reasoning_content": {"text": "sum"}}, "4"]),
            "sum",
        ),
        (
            AIMessage(
                [{"type": "thinking", "thinking": "sum"}, "4"],
                additional_kwargs={"reasoning_content": "sum"},
            ),
            "sum",
        ),
    ],
)
def test_reasoning_of_every_provider_becomes_a_text_beside_the_content(
    message: AIMessage, reasoning: str
) -> None:
    said = {"role": "assistant", "content": "4", "reasoning_content": reasoning}
    assert openai_message(message) == said


@pytest.mark.parametrize(
    "block",
    [
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
    ],
)
def test_reasoning_that_the_provider_hides_is_left_out(block: dict[str, Any]) -> None:
    assert openai_message(AIMessage([block, "4"])) == {"role": "assistant", "content": "4"}


def test_streamed_reasoning_equals_the_same_reasoning_in_one_piece() -> None:
    pieces = [AIMessageChunk("", additional_kwargs={"reasoning_content": t}) for t in ("a ", "b")]
    streamed = pieces[0] + pieces[1] + AIMessageChunk("4")
    assert openai_message(streamed)["reasoning_content"] == "a b"


KINDS = [
    *("text", "image", "image_url", "audio", "input_audio", "video", "file", "text-plain", "media"),
    *("json", "guard_content", "thinking", "reasoning", "redacted_thinking", "tool_use"),
    *("tool_call", "function_call", "tool_result", "server_tool_use", "new"),
]
KEYS = [
    *("text", "image", "image_url", "source", "url", "base64", "mime_type", "media_type", "data"),
    *("id", "file", "file_id", "name", "input", "args", "arguments", "call_id", "tool_use_id"),
    *("content", "json", "guard_content", "thinking", "reasoning", "summary", "format"),
]
values = st.recursive(
    st.none() | st.integers() | st.text() | st.binary() | st.builds(object),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=4,
)
any_blocks = st.builds(
    lambda kind, rest: {**rest, **({"type": kind} if kind else {})},
    st.none() | st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(any_blocks | st.text(), max_size=3))
def test_no_block_stops_the_conversion_of_a_message(blocks: list[Any]) -> None:
    kinds = (HumanMessage, SystemMessage, AIMessage, lambda b: ToolMessage(b, tool_call_id="c"))
    for body in openai_messages([kind(blocks) for kind in kinds]):
        assert body["role"] in ("user", "system", "assistant", "tool")
        assert isinstance(body["content"], str | list)
        freeze_what_can_be_kept([body], "4", *[None] * 11)
