"""Logged tokens: used as they are where they are the model's own, and never otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentpref.learn.encode import EncodedPair, Encoding, encode_pairs
from agentpref.types import Pair, Prompt

ASKED: dict[str, Any] = {"role": "user", "content": "What is the tide?"}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(random_base)


def encode(tokenizer: Any, chosen: Any, ids: Any) -> Encoding[EncodedPair]:
    message = {"role": "assistant", "content": chosen} if isinstance(chosen, str) else chosen
    rejected = {"role": "assistant", "content": "No."}
    pair = Pair("id", "default", 0.0, Prompt("", (ASKED,)), message, rejected, "comparison")
    logged = None if ids is None else tuple(ids)
    return encode_pairs([replace(pair, chosen_ids=logged)], tokenizer, max_length=512)


def letters(tokenizer: Any, text: str) -> list[int]:
    """A text in other tokens than the tokenizer writes it in: one for each byte."""
    return [i for letter in text for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]


def test_other_tokens_of_the_same_text_are_used_as_they_are(tokenizer: Any) -> None:
    ids = [*letters(tokenizer, "The tide"), tokenizer.eos_token_id]
    plain = encode(tokenizer, "The tide", None)
    found = encode(tokenizer, "The tide", ids)
    assert found.rows[0].chosen == tuple(ids) != plain.rows[0].chosen
    assert found.rows[0].prompt == plain.rows[0].prompt
    assert not found.retokenised


def test_an_answer_that_was_cut_off_is_not_taught_to_stop(tokenizer: Any) -> None:
    cut = tokenizer("The tide comes", add_special_tokens=False)["input_ids"]
    (row,) = encode(tokenizer, "The tide comes", cut).rows
    assert row.chosen == tuple(cut)
    assert tokenizer.eos_token_id not in row.chosen
    assert row.rejected[-1] == tokenizer.eos_token_id


def test_white_space_that_an_engine_trimmed_stays(tokenizer: Any) -> None:
    ids = tokenizer(f" The tide\n{END}", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "The tide", ids).rows[0].chosen == tuple(ids)


def test_a_tool_call_is_compared_as_it_is_rendered(tokenizer: Any) -> None:
    text = '<tool_call>\n{"name":"look","arguments":{"at":"sea"}}\n</tool_call>'
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    ids = tokenizer(f"{text}{END}", add_special_tokens=False)["input_ids"]
    plain = encode(tokenizer, message, None).rows[0].chosen
    found = encode(tokenizer, message, ids)
    assert (found.rows[0].chosen, dict(found.retokenised)) == (tuple(ids), {})
    assert plain != tuple(ids)
    without_call = tokenizer(END, add_special_tokens=False)["input_ids"]
    found = encode(tokenizer, message, without_call)
    assert (found.rows[0].chosen, found.retokenised) == (plain, {"ids_disagree": 1})


def test_special_tokens_that_a_model_spelt_out_stay_spelt_out(tokenizer: Any) -> None:
    ids = [*letters(tokenizer, f"Write {END}"), tokenizer.eos_token_id]
    found = encode(tokenizer, f"Write {END}", ids)
    assert found.rows[0].chosen == tuple(ids)
    assert encode(tokenizer, f"Write {END}", None).left_out == {"special_token_inside": 1}


@pytest.mark.parametrize("stranger", [10**6, -1, 2**70])
def test_ids_beyond_the_vocabulary_are_not_used(tokenizer: Any, stranger: int) -> None:
    ids = (*letters(tokenizer, "The tide"), stranger)
    found = encode(tokenizer, "The tide", ids)
    assert found.retokenised == {"foreign_token_ids": 1}
    assert found.rows[0].chosen == encode(tokenizer, "The tide", None).rows[0].chosen


def test_ids_of_another_tokenizer_are_not_used(tokenizer: Any) -> None:
    found = encode(tokenizer, "The tide", letters(tokenizer, "Another"))
    assert found.retokenised == {"ids_disagree": 1}
    assert found.rows[0].chosen == encode(tokenizer, "The tide", None).rows[0].chosen


def test_no_ids_are_as_good_as_none(tokenizer: Any) -> None:
    assert encode(tokenizer, "The tide", ()).rows[0].chosen[-1] == tokenizer.eos_token_id


def test_logged_tokens_need_no_template_that_renders_the_answer(random_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | replace('think', '') }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>think{% endif %}"
    )
    ids = tokenizer(f"so.{END}", add_special_tokens=False)["input_ids"]
    no = tokenizer(f"No.{END}", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "so.", ids).left_out == {"template_rewrites_prompt": 1}
    message, other = ({"role": "assistant", "content": text} for text in ("so.", "No."))
    pair = Pair("id", "default", 0.0, Prompt("", (ASKED,)), message, other, "comparison")
    pair = replace(pair, chosen_ids=tuple(ids), rejected_ids=tuple(no))
    (row,) = encode_pairs([pair], tokenizer, max_length=512).rows
    assert (row.chosen, row.rejected) == (tuple(ids), tuple(no))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.booleans())
def test_what_is_trained_always_says_what_the_answer_says(
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
    assert found.rows[0].chosen == (*ids, tokenizer.eos_token_id)
    assert tokenizer.decode(list(found.rows[0].chosen)) == text + END


@given(st.lists(st.integers(0, 420), min_size=1, max_size=8))
def test_any_ids_are_used_or_counted(tokenizer: Any, ids: list[int]) -> None:
    found = encode(tokenizer, "The tide", ids)
    (row,) = found.rows
    said = "".join(tokenizer.decode(list(row.chosen), skip_special_tokens=True).split())
    assert said == "Thetide"
    assert (row.chosen == tuple(ids)) == (not found.retokenised)
