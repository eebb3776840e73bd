"""A row of a lone thumb has its answer, and another thumb's for KTO's reference point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentpref.learn import encode as encoding
from agentpref.learn.encode import Encoding
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import encode_prompt
from agentpref.prefer.examples import example_id_of
from agentpref.record.messages import prompt_of
from agentpref.types import Example
from tests.core.learn import examples
from tests.core.learn.examples import make_pair, with_completions


def make_thumb(question: str, content: str) -> Example:
    prompt = prompt_of([{"role": "user", "content": question}])
    thumb = examples.make_thumb(0, content, prompt=prompt)
    return replace(thumb, example_id=example_id_of(prompt.id, thumb.completions))


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(random_base)


def encode(tokenizer: Any, thumbs: list[Example], max_length: int = 256) -> Encoding:
    return encoding.encode(thumbs, ChatTemplate(tokenizer), max_length=max_length)


THUMBS = [make_thumb(f"Question {n}?", f"answer {n}") for n in range(9)]


def test_a_row_of_a_thumb_has_its_answer_and_that_of_another_thumb(tokenizer: Any) -> None:
    found = encode(tokenizer, THUMBS)
    assert [row.example for row in found.rows] == THUMBS
    for row in found.rows:
        assert row.prompt == encode_prompt(row.example.prompt, ChatTemplate(tokenizer))
        own = row.example.completions[0].message["content"] + "<|im_end|>"
        assert tokenizer.decode(list(row.completions[0])) == own
        assert row.own == row.completions[:1]
        assert (len(row.completions), row.masks) == (2, (None, None))
        assert row.width == len(row.prompt) + sum(map(len, row.completions))
    assert not found.left_out


def test_each_answer_is_the_mismatch_of_one_other_thumb(tokenizer: Any) -> None:
    """So the estimate of the reference point sees every answer equally often."""
    rows = encode(tokenizer, THUMBS).rows
    assert sorted(row.completions[1] for row in rows) == sorted(row.completions[0] for row in rows)
    assert all(row.completions[1] != row.completions[0] for row in rows)


def test_one_more_thumb_changes_one_mismatch(tokenizer: Any) -> None:
    before = {row.example.example_id: row for row in encode(tokenizer, THUMBS[:-1]).rows}
    after = {row.example.example_id: row for row in encode(tokenizer, THUMBS).rows}
    assert sum(after[name] != row for name, row in before.items()) == 1


@given(st.randoms())
def test_the_order_of_thumbs_changes_no_row(tokenizer: Any, random: Any) -> None:
    shuffled = random.sample(THUMBS, len(THUMBS))
    rows = {row.example.example_id: row for row in encode(tokenizer, shuffled).rows}
    assert rows == {row.example.example_id: row for row in encode(tokenizer, THUMBS).rows}


@pytest.mark.parametrize(
    "thumbs",
    [THUMBS[:1], [make_thumb("One?", "a"), make_thumb("One?", "b")]],
    ids=["one thumb", "one prompt"],
)
def test_thumbs_on_no_other_prompt_are_left_out(tokenizer: Any, thumbs: list[Example]) -> None:
    found = encode(tokenizer, thumbs)
    assert (found.rows, found.left_out) == ([], {"no_mismatch": len(thumbs)})


def test_where_all_give_the_same_answer_that_is_the_mismatch(tokenizer: Any) -> None:
    """Likes and dislikes of one answer say when it is right: an app whose model says "No"."""
    thumbs = [make_thumb(f"Question {n}?", "No") for n in range(4)]
    found = encode(tokenizer, thumbs)
    assert [row.completions[1] for row in found.rows] == [found.rows[0].completions[0]] * 4
    other = make_thumb("And this?", "Yes")
    mixed = {row.example.example_id: row for row in encode(tokenizer, [*thumbs, other]).rows}
    yes = mixed[other.example_id].completions[0]
    assert all(mixed[thumb.example_id].completions[1] == yes for thumb in thumbs)


def test_a_mismatch_that_does_not_fit_is_skipped(tokenizer: Any) -> None:
    long = make_thumb("Q?", "word " * 20)
    short = [make_thumb("A rather long question " * 2, "x"), make_thumb("Q2?", "y")]
    rows = encode(tokenizer, [long, *short], max_length=10_000).rows
    room = max(len(row.prompt) + len(row.completions[0]) for row in rows)
    found = encode(tokenizer, [long, *short], max_length=room)
    assert len(found.rows) == 3
    assert all(len(r.prompt) + max(map(len, r.completions)) <= room for r in found.rows)
    assert any(len(r.prompt) + max(map(len, r.completions)) > room for r in rows)


def test_logged_tokens_of_thumbs_are_used(tokenizer: Any) -> None:
    cut = tuple(tokenizer("answer 0", add_special_tokens=False)["input_ids"])
    found = encode(tokenizer, [with_completions(THUMBS[0], {"token_ids": cut}), *THUMBS[1:]])
    assert found.rows[0].completions[0] == cut
    assert cut in {row.completions[1] for row in found.rows}


def test_thumbs_that_cannot_be_encoded_are_counted(tokenizer: Any) -> None:
    found = encode(tokenizer, [*THUMBS, make_thumb("Q?", "word " * 300)])
    assert (len(found.rows), found.left_out) == (len(THUMBS), {"too_long": 1})


def test_pairs_among_thumbs_keep_their_place_and_lend_no_mismatch(tokenizer: Any) -> None:
    pair = make_pair(0, "answer 100", "answer 101")
    mixed = encode(tokenizer, [THUMBS[0], pair, *THUMBS[1:]]).rows
    assert [row.example for row in mixed] == [THUMBS[0], pair, *THUMBS[1:]]
    assert [row for row in mixed if row.example.lone] == encode(tokenizer, THUMBS).rows
