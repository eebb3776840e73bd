"""Tool calls in generated text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.models.tool_calls import (
    CallStream,
    assistant_message,
    has_broken_call,
    parse_rate,
)

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "tide"}}\n</tool_call>'

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_text_without_calls_stays_as_it_is() -> None:
    text = "  The tide turns at six.\n"
    assert assistant_message(text) == {"role": "assistant", "content": text}


def test_a_call_becomes_a_tool_call_and_is_removed_from_the_text() -> None:
    message = assistant_message(f"Let me see.\n{CALL}\n")
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "search"
    assert json.loads(call["function"]["arguments"]) == {"query": "tide"}


def test_calls_keep_their_order_and_get_unique_ids() -> None:
    other = CALL.replace("tide", "moon")
    message = assistant_message(CALL + other + CALL, turn=3)
    queries = [json.loads(c["function"]["arguments"])["query"] for c in message["tool_calls"]]
    assert queries == ["tide", "moon", "tide"]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 3
    assert ids == [c["id"] for c in assistant_message(CALL + other + CALL, turn=3)["tool_calls"]]
    assert not {*ids} & {c["id"] for c in assistant_message(CALL, turn=5)["tool_calls"]}


@pytest.mark.parametrize(
    "block",
    [
        "not json",
        "[]",
        '{"arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "search", "arguments": "tide"}',
        '{"name": "search", "arguments": {"query": "tide"}',
        '{"name": "search", "arguments": {"limit": NaN}}',
        '{"name": "search", "arguments": {"query": "\\ud800"}}',
        '{"name": "search", "arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
    ],
)
def test_a_call_that_does_not_parse_stays_in_the_text(block: str) -> None:
    text = f"<tool_call>{block}</tool_call>"
    assert assistant_message(text) == {"role": "assistant", "content": text}
    mixed = assistant_message(f"{text}{CALL}")
    assert mixed["content"] == text
    assert len(mixed["tool_calls"]) == 1


def test_arguments_keep_the_form_they_were_written_in() -> None:
    written = '{"query": "marée", "depth": 123456789012345678901234, "all": [1, 2.5, null]}'
    message = assistant_message(f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>')
    assert message["tool_calls"][0]["function"]["arguments"] == written


def test_an_unfinished_call_stays_in_the_text() -> None:
    cut = CALL[: -len("</tool_call>")]
    assert assistant_message(cut) == {"role": "assistant", "content": cut}


def test_a_call_without_arguments_gets_an_empty_object() -> None:
    (call,) = assistant_message('<tool_call>{"name": "now"}</tool_call>')["tool_calls"]
    assert call["function"]["arguments"] == "{}"


@given(name=st.text(min_size=1), arguments=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_call_is_read_back_as_it_was_written(name: str, arguments: dict) -> None:
    # A value that itself holds the closing tag cannot be told from the end of the call.
    block = json.dumps({"name": name, "arguments": arguments})
    if "</tool_call>" in block:
        return
    (call,) = assistant_message(f"<tool_call>{block}</tool_call>")["tool_calls"]
    assert call["function"]["name"] == name
    assert json.loads(call["function"]["arguments"]) == arguments


def test_the_parse_rate_is_the_share_of_written_calls_that_are_json_objects() -> None:
    assert parse_rate(["no call", ""]) is None
    assert parse_rate([CALL, f"{CALL} and <tool_call>[]</tool_call>"]) == pytest.approx(2 / 3)
    assert parse_rate([CALL, '<tool_call>{"name": "search", "arg']) == 0.5


@given(
    st.lists(
        st.sampled_from(
            [
                *(CALL, CALL.replace("search", "shout"), "<tool_call>", "</tool_call>", " ", "\n"),
                *("<tool_call>{no}</tool_call>", "Sure.", "<", "<tool", "text ", "é", "{}"),
            ]
        ),
        max_size=7,
    ),
    st.integers(1, 30),
)
def test_the_pieces_of_a_stream_are_the_content_and_the_calls_of_the_whole(
    parts: list[str], size: int
) -> None:
    text = "".join(parts)
    stream = CallStream(turn=2)
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    found = [item for piece in pieces for item in stream.push(piece)] + [*stream.finish()]
    whole = assistant_message(text, turn=2)
    assert "".join(item for item in found if isinstance(item, str)) == whole["content"]
    assert [item for item in found if isinstance(item, dict)] == whole.get("tool_calls", [])


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("The tide turns at six.", False),
        (CALL, False),
        (f"{CALL} and {CALL[:-20]}", True),
        ('<tool_call>{"name": "search", "arguments": {"query": "tide"</tool_call>', True),
        ("<tool_call>[1]</tool_call>", True),
        ("<tool_call></tool_call>", True),
        ("<tool_call>\n<function=search>\ntide\n</function>\n</tool_call>", False),
    ],
)
def test_a_call_is_broken_if_it_begins_as_json_and_is_no_object(text: str, broken: bool) -> None:
    assert has_broken_call(text) is broken
