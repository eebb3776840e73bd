"""Thumbs: one answer of their own, and another thumb's to estimate the reference point from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentpref.learn.encode import encode_prompt, encode_thumbs
from agentpref.prefer.pairs import thumb_id_of
from agentpref.record.messages import prompt_of
from agentpref.types import Thumb


def make_thumb(question: str, answer: str, **changes: Any) -> Thumb:
    prompt = prompt_of([{"role": "user", "content": question}])
    said = {"role": "assistant", "content": answer}
    thumb = Thumb(f"run-{question}", "default", 0.0, prompt, said, desirable=True)
    return replace(thumb, thumb_id=thumb_id_of(prompt.id, said, True), **changes)


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(random_base)


def encode(tokenizer: Any, thumbs: list[Thumb], max_length: int = 256) -> Any:
    return encode_thumbs(thumbs, tokenizer, max_length=max_length)


THUMBS = [make_thumb(f"Question {n}?", f"answer {n}") for n in range(9)]


def test_a_thumb_is_its_prompt_its_answer_and_anothers(tokenizer: Any) -> None:
    found = encode(tokenizer, THUMBS)
    assert [row.thumb for row in found.rows] == THUMBS
    for row in found.rows:
        assert row.prompt == encode_prompt(row.thumb.prompt, tokenizer)
        own = row.thumb.completion["content"] + "<|im_end|>"
        assert tokenizer.decode(list(row.completion)) == own
        assert row.completions == (row.completion, row.mismatched)
        assert row.width == len(row.prompt) + len(row.completion) + len(row.mismatched)
    assert not found.left_out


def test_each_answer_is_the_mismatch_of_one_other(tokenizer: Any) -> None:
    """A fixed circle: the estimate sees every answer as often as the others."""
    rows = encode(tokenizer, THUMBS).rows
    assert sorted(row.mismatched for row in rows) == sorted(row.completion for row in rows)
    assert all(row.mismatched != row.completion for row in rows)


def test_a_thumb_more_changes_one_mismatch(tokenizer: Any) -> None:
    before = {row.thumb.thumb_id: row for row in encode(tokenizer, THUMBS[:-1]).rows}
    after = {row.thumb.thumb_id: row for row in encode(tokenizer, THUMBS).rows}
    assert sum(after[name] != row for name, row in before.items()) == 1


@given(st.randoms())
def test_the_order_of_thumbs_changes_no_row(tokenizer: Any, random: Any) -> None:
    shuffled = random.sample(THUMBS, len(THUMBS))
    rows = {row.thumb.thumb_id: row for row in encode(tokenizer, shuffled).rows}
    assert rows == {row.thumb.thumb_id: row for row in encode(tokenizer, THUMBS).rows}


@pytest.mark.parametrize(
    "thumbs",
    [
        THUMBS[:1],
        [make_thumb("One?", "a"), make_thumb("One?", "b")],
        [make_thumb("One?", "a"), make_thumb("Two?", "a")],
    ],
    ids=["one thumb", "one prompt", "one answer"],
)
def test_without_another_answer_to_another_prompt_none_is_trained(
    tokenizer: Any, thumbs: list[Thumb]
) -> None:
    found = encode(tokenizer, thumbs)
    assert (found.rows, found.left_out) == ([], {"no_mismatch": len(thumbs)})


def test_a_mismatch_that_does_not_fit_is_passed_over(tokenizer: Any) -> None:
    long = make_thumb("Q?", "word " * 20)
    short = [make_thumb("A rather long question " * 2, "x"), make_thumb("Q2?", "y")]
    rows = encode(tokenizer, [long, *short], max_length=10_000).rows
    room = max(len(row.prompt) + len(row.completion) for row in rows)
    found = encode(tokenizer, [long, *short], max_length=room)
    assert len(found.rows) == 3
    assert all(len(r.prompt) + max(map(len, r.completions)) <= room for r in found.rows)
    assert any(len(r.prompt) + max(map(len, r.completions)) > room for r in rows)


def test_logged_tokens_of_thumbs_are_used_too(tokenizer: Any) -> None:
    cut = tuple(tokenizer("answer 0", add_special_tokens=False)["input_ids"])
    found = encode(tokenizer, [replace(THUMBS[0], token_ids=cut), *THUMBS[1:]])
    assert found.rows[0].completion == cut
    assert cut in {row.mismatched for row in found.rows}


def test_thumbs_that_cannot_be_encoded_are_counted(tokenizer: Any) -> None:
    found = encode(tokenizer, [*THUMBS, make_thumb("Q?", "word " * 300)])
    assert (len(found.rows), found.left_out) == (len(THUMBS), {"too_long": 1})
