"""What was said is in the rendering, all of it and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.models.fidelity import Piece, is_bare, lost

TEXT = "template_drops_text"


def piece(*words: str) -> Piece:
    return Piece(words, TEXT, 0)


@pytest.mark.parametrize(
    ("rendered", "words"),
    [
        ("<user>one two<end>", ("one two",)),
        ("<user>one two<end>", ("  one two\n",)),  # templates trim
        ("<user>one\ntwo<end>", ("one", "two")),  # and join
        ("<user>onetwo<end>", ("one", "two")),
        ('{"a": "x\\ny\\"z\\""}', ('x\ny"z"',)),  # and write JSON
        ('{"a": "\\u00e9"}', ("é",)),
        ("", ("",)),
        ("<user><end>", (" \n",)),
        ("<user>漢字<end>漢", ("漢字", "")),
    ],
)
def test_words_are_found_in_the_forms_that_templates_write(
    rendered: str, words: tuple[str, ...]
) -> None:
    assert isinstance(lost(rendered, [piece(*words)]), str)


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
    assert lost(rendered, [piece(*words)]) == piece(*words)


def test_each_piece_needs_a_place_of_its_own() -> None:
    twice = [piece("look"), piece("look")]
    assert lost("look look", twice) == "\0 \0"
    assert lost("look", twice) == piece("look")
    assert lost("look around", [piece("look"), piece("look around")]) == piece("look")


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_all_that_is_written_as_it_is_or_as_json_is_found(texts: list[str]) -> None:
    pieces = [piece(text) for text in texts]
    assert isinstance(lost("<|>".join(texts), pieces), str)
    assert isinstance(lost("<|>".join(map(json.dumps, texts)), pieces), str)


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
