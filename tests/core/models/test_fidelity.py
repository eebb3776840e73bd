"""What was said is in the rendering, all of it and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.models.fidelity import Piece, is_bare, lost_of_answer, lost_of_prompt
from agentpref.models.turns import read_turn


def holds(rendered: str, *parts: str, role: str = "user") -> bool:
    """Whether a rendering holds a message of some parts."""
    content = [{"type": "text", "text": part} for part in parts]
    return lost_of_prompt(rendered, [read_turn({"role": role, "content": content})], ()) is None


def messages(*texts: str) -> list[Any]:
    return [read_turn({"role": "user", "content": text}) for text in texts]


def calling(*names: str, text: str = "", **arguments: Any) -> Any:
    calls = [{"function": {"name": name, "arguments": arguments}} for name in names]
    return read_turn({"role": "assistant", "content": text, "tool_calls": calls})


@pytest.mark.parametrize(
    ("rendered", "words"),
    [
        ("<user>one two<end>", ("one two",)),
        ("<user>one two<end>", ("  one two\n",)),  # templates trim
        ("<user>one\ntwo<end>", ("one", "two")),  # and join
        ("<user>onetwo<end>", ("one", "two")),
        ('{"a": "x\\ny\\"z\\""}', ('x\ny"z"',)),  # and write JSON
        ('{"a": "one\\ntwo"}', ("one", "two")),
        ('{"a": "\\u00e9"}', ("é",)),
        ("f(x='O\\'Brien \"q\"')", ('O\'Brien "q"',)),  # and Python
        ("", ("",)),
        ("<user><end>", (" \n",)),
        ("<user>漢字<end>漢", ("漢字", "")),
    ],
)
def test_words_are_found_in_the_forms_that_templates_write(
    rendered: str, words: tuple[str, ...]
) -> None:
    assert holds(rendered, *words)


@pytest.mark.parametrize(
    ("rendered", "words"),
    [
        ("<user><end>", ("user2",)),
        ("<user>", ("use",)),  # a word within a longer one is another word
        ("one two", ("two", "one")),
        ("one, two", ("one", "two")),  # something stands between them
        ("", ("0",)),
    ],
)
def test_words_that_are_not_there_are_lost(rendered: str, words: tuple[str, ...]) -> None:
    assert not holds(rendered, *words)


def test_each_message_needs_a_place_of_its_own_after_the_one_before() -> None:
    assert lost_of_prompt("OK. OK", messages("OK.", "OK\n\n"), ()) is None
    assert lost_of_prompt("look look", messages("look", "look"), ()) is None
    found = lost_of_prompt("look", messages("look", "look"), ())
    assert found == Piece(("look",), "template_drops_text", 1)
    assert lost_of_prompt("b a", messages("a", "b"), ()) is not None


def test_system_messages_and_tools_may_stand_anywhere() -> None:
    system = read_turn({"role": "system", "content": "Be brief."})
    tool = {"type": "function", "function": {"name": "look"}}
    assert lost_of_prompt("Hi. Be brief. look", [system, *messages("Hi.")], (tool,)) is None
    found = lost_of_prompt("Hi. Be brief.", [system, *messages("Hi.")], (tool,))
    assert found is not None
    assert found.reason == "template_drops_tools"


def test_calls_may_stand_before_the_text_and_arguments_in_any_order() -> None:
    turn = calling("look", text="Let me look.", b="sea", a="sky")
    assert lost_of_answer("look(a=sky, b=sea) Let me look.", turn) == "\0(\0=\0, \0=\0) \0"


@pytest.mark.parametrize(
    ("rendered", "turn"),
    [
        ("look", calling("look", "look")),
        ("look(a=sky)", calling("look", a="sea")),
        ("Let me look.", calling("look", text="Let me look.")),
    ],
)
def test_a_call_that_is_not_there_is_lost(rendered: str, turn: Any) -> None:
    found = lost_of_answer(rendered, turn)
    assert isinstance(found, Piece)
    assert found.reason == "template_drops_tool_calls"


def test_an_answer_that_spells_the_name_of_its_channel_is_found_after_it() -> None:
    assert lost_of_answer("<c>final<m>final<e>", calling(text="final")) == "<c>final<m>\0<e>"


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_all_that_is_written_as_it_is_or_as_json_or_python_is_found(texts: list[str]) -> None:
    for write in (str, json.dumps, repr):
        assert lost_of_prompt("<|>".join(map(write, texts)), messages(*texts), ()) is None


@pytest.mark.parametrize(
    ("left", "bare"),
    [
        ("\0<e>", True),
        (" \0 <e>\n", True),
        ("<c>final<m>\0<e>", True),  # it names a channel
        (" to=user<m>\0<e>", True),
        ("<think>\n\n</think>\n\n\0<e>", False),
        ("Sure! \0<e>", False),
        ("\0 So.<e>", False),
        ("\0<e>So.<e>", False),
        ("\0<e>\nToday is Monday", False),
        ("<e>", True),
    ],
)
def test_an_answer_is_bare_if_only_special_tokens_surround_it(left: str, bare: bool) -> None:
    assert is_bare(left, ["<c>", "<m>", "<e>"]) is bare
