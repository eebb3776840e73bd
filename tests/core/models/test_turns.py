"""The words of a message, in the shapes that providers send."""

from __future__ import annotations

from typing import Any

import pytest

from agentpref.models.turns import read_turn

CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
PARSED = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}


def read(content: Any = "So.", role: str = "assistant", **more: Any) -> Any:
    return read_turn({"role": role, "content": content, **more})


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("So.", ("So.",)),
        (None, ("",)),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], ("a", "b")),
        (["a", "b"], ("a", "b")),
        ([{"text": "of Bedrock"}], ("of Bedrock",)),
        ([{"type": "output_text", "text": "of Responses"}], ("of Responses",)),
        ([{"type": "refusal", "refusal": "No."}], ("No.",)),
        ([], ()),
    ],
)
def test_the_texts_of_a_content_are_found(content: Any, texts: tuple[str, ...]) -> None:
    assert (read(content).texts, read(content).foreign) == (texts, None)


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"thinking": "Hm."},
        {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, "So."]},
        {"content": [{"type": "reasoning", "reasoning": "Hm."}, "So."]},
        {"reasoning_content": "Hm.", "content": [{"type": "thinking", "thinking": "Hm."}, "So."]},
    ],
)
def test_reasoning_is_found_under_each_name(message: Any) -> None:
    turn = read(**{"content": "So.", **message})
    assert (turn.text, turn.reasoning, turn.others) == ("So.", "Hm.", {})


def test_parts_of_an_answer_are_one_text_and_other_parts_are_lines() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read(parts).text == "one two"
    assert read(parts, role="user").text == "one \ntwo"


@pytest.mark.parametrize(
    "message",
    [{"tool_calls": [CALL]}, {"tool_calls": (CALL,)}, {"function_call": CALL["function"]}],
)
def test_calls_are_found_with_their_arguments_parsed(message: Any) -> None:
    assert read(None, **message).calls == (PARSED,)


def test_a_part_that_repeats_a_call_is_no_foreign_part() -> None:
    part = {"type": "tool_use", "id": "c", "name": "look", "input": {"at": "sea"}}
    assert read([part], tool_calls=[CALL]).foreign is None
    assert read([part]).foreign == "tool_use", "a call that stands nowhere else would be lost"


@pytest.mark.parametrize(
    ("message", "foreign"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        ({"content": [{"type": "text", "text": 5}]}, "text"),
        ({"content": [7]}, "int"),
        ({"tool_calls": 5}, "tool_calls"),
    ],
)
def test_what_is_no_text_is_named(message: Any, foreign: str) -> None:
    assert read(**{"content": "", **message}).foreign == foreign


def test_what_is_written_has_no_empty_keys_and_the_roles_that_templates_know() -> None:
    turn = read(None, tool_calls=[], reasoning_content="", name=None)
    assert turn.write("assistant", turn.text, reasoning_key="thinking") == {
        "role": "assistant",
        "content": "",
    }
    assert read("7", role="function", name="look").role == "tool"


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("<think>\nHm.\n</think>\n\nSo.", False),
        ("<think>Hm.</think>So.", True),
        ("Hm.\n</think>\n\nSo.", True),
    ],
)
def test_reasoning_inside_the_text_can_be_taken_apart(text: str, opened: bool) -> None:
    turn = read(text).with_thought_apart(opened=opened)
    assert (turn.reasoning, turn.text) == ("Hm.", "So.")
    assert read(text).without_thought().strip() == "So."
