"""Logged tokens are used as they are where they are this model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentpref.learn import encode as encoding
from agentpref.learn.encode import Encoding
from agentpref.models.template import ChatTemplate
from agentpref.types import Prompt
from tests.core.learn.examples import make_pair, with_completions

ASKED: dict[str, Any] = {"role": "user", "content": "What is the tide?"}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(random_base)


def encode(tokenizer: Any, chosen: Any, ids: Any) -> Encoding:
    pair = make_pair(0, chosen, "No.", prompt=Prompt("", (ASKED,)))
    logged = None if ids is None else tuple(ids)
    pair = with_completions(pair, {"token_ids": logged})
    return encoding.encode([pair], ChatTemplate(tokenizer), max_length=512)


def letters(tokenizer: Any, text: str) -> list[int]:
    """A text in other tokens than the tokenizer writes it in: one for each byte."""
    return [i for letter in text for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]


def test_logged_tokens_that_spell_the_same_text_otherwise_are_used(tokenizer: Any) -> None:
    ids = [*letters(tokenizer, "The tide"), tokenizer.eos_token_id]
    plain = encode(tokenizer, "The tide", None)
    found = encode(tokenizer, "The tide", ids)
    assert found.rows[0].completions[0] == tuple(ids) != plain.rows[0].completions[0]
    assert found.rows[0].prompt == plain.rows[0].prompt
    assert not found.retokenized


def test_a_logged_answer_that_was_cut_off_gets_no_end_of_turn(tokenizer: Any) -> None:
    cut = tokenizer("The tide comes", add_special_tokens=False)["input_ids"]
    (row,) = encode(tokenizer, "The tide comes", cut).rows
    assert row.completions[0] == tuple(cut)
    assert tokenizer.eos_token_id not in row.completions[0]
    assert row.completions[1][-1] == tokenizer.eos_token_id


def test_white_space_that_an_engine_trimmed_stays_in_the_logged_tokens(tokenizer: Any) -> None:
    ids = tokenizer(f" The tide\n{END}", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "The tide", ids).rows[0].completions[0] == tuple(ids)


def test_logged_tokens_of_a_tool_call_are_compared_with_its_rendering(tokenizer: Any) -> None:
    text = '<tool_call>\n{"name":"look","arguments":{"at":"sea"}}\n</tool_call>'
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    ids = tokenizer(f"{text}{END}", add_special_tokens=False)["input_ids"]
    plain = encode(tokenizer, message, None).rows[0].completions[0]
    found = encode(tokenizer, message, ids)
    assert (found.rows[0].completions[0], dict(found.retokenized)) == (tuple(ids), {})
    assert plain != tuple(ids)
    without_call = tokenizer(END, add_special_tokens=False)["input_ids"]
    found = encode(tokenizer, message, without_call)
    assert (found.rows[0].completions[0], found.retokenized) == (plain, {"ids_disagree": 1})


def test_special_tokens_that_a_model_spelled_as_text_stay_text(tokenizer: Any) -> None:
    ids = [*letters(tokenizer, f"Write {END}"), tokenizer.eos_token_id]
    found = encode(tokenizer, f"Write {END}", ids)
    assert found.rows[0].completions[0] == tuple(ids)
    assert encode(tokenizer, f"Write {END}", None).left_out == {"special_token_inside": 1}


@pytest.mark.parametrize("stranger", [10**6, -1, 2**70])
def test_token_ids_outside_the_vocabulary_are_not_used(tokenizer: Any, stranger: int) -> None:
    ids = (*letters(tokenizer, "The tide"), stranger)
    found = encode(tokenizer, "The tide", ids)
    assert found.retokenized == {"foreign_token_ids": 1}
    assert (
        found.rows[0].completions[0] == encode(tokenizer, "The tide", None).rows[0].completions[0]
    )


def test_token_ids_that_decode_to_another_text_are_not_used(tokenizer: Any) -> None:
    found = encode(tokenizer, "The tide", letters(tokenizer, "Another"))
    assert found.retokenized == {"ids_disagree": 1}
    assert (
        found.rows[0].completions[0] == encode(tokenizer, "The tide", None).rows[0].completions[0]
    )


def test_empty_token_ids_count_as_none(tokenizer: Any) -> None:
    assert encode(tokenizer, "The tide", ()).rows[0].completions[0][-1] == tokenizer.eos_token_id


def test_logged_tokens_are_used_where_the_template_cannot_render_the_answer(
    random_base: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | replace('think', '') }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>think{% endif %}"
    )
    ids = tokenizer(f"so.{END}", add_special_tokens=False)["input_ids"]
    no = tokenizer(f"No.{END}", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "so.", ids).left_out == {"template_rewrites_prompt": 1}
    pair = make_pair(0, "so.", "No.", prompt=Prompt("", (ASKED,)))
    pair = with_completions(pair, {"token_ids": tuple(ids)}, {"token_ids": tuple(no)})
    (row,) = encoding.encode([pair], ChatTemplate(tokenizer), max_length=512).rows
    assert row.completions == (tuple(ids), tuple(no))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.booleans())
def test_logged_tokens_that_are_used_decode_to_the_answer(
    tokenizer: Any, text: str, split: bool
) -> None:
    ids = (
        letters(tokenizer, text)
        if split
        else tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    found = encode(tokenizer, text, [*ids, tokenizer.eos_token_id])
    if found.left_out:  # "No." on both sides, in the same tokens
        assert text == "No."
        return
    assert found.rows[0].completions[0] == (*ids, tokenizer.eos_token_id)
    assert tokenizer.decode(list(found.rows[0].completions[0])) == text + END


@given(st.lists(st.integers(0, 420), min_size=1, max_size=8))
def test_any_token_ids_are_used_or_counted(tokenizer: Any, ids: list[int]) -> None:
    found = encode(tokenizer, "The tide", ids)
    (row,) = found.rows
    said = "".join(tokenizer.decode(list(row.completions[0]), skip_special_tokens=True).split())
    assert said == "Thetide"
    assert (row.completions[0] == tuple(ids)) == (not found.retokenized)
