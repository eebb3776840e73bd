"""Encoding: the assistant's own tokens and no others, and no pair lost unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from agentpref.learn.encode import encode_pairs, encode_prompt, sequence_key
from agentpref.types import Prompt


@pytest.fixture
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


def encode_one(pair, tokenizer, max_length=512):
    (row,), left_out = encode_pairs([pair], tokenizer, max_length=max_length)
    assert not left_out
    return row


def test_prompt_ends_where_the_assistant_begins(pairs, tokenizer):
    row = encode_one(pairs[3], tokenizer)
    assert tokenizer.decode(list(row.prompt)).endswith("<|im_start|>assistant\n")
    assert row.prompt == encode_prompt(pairs[3].prompt, tokenizer)


def test_completions_end_with_the_turn_and_not_after_it(pairs, tokenizer):
    row = encode_one(pairs[3], tokenizer)
    assert tokenizer.decode(list(row.chosen)) == "yes, 3 it is<|im_end|>"
    assert tokenizer.decode(list(row.rejected)) == "no<|im_end|>"


def test_tool_calls_are_completions_too(pairs, tokenizer):
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    pair = replace(pairs[0], chosen={"role": "assistant", "content": None, "tool_calls": [call]})
    assert '"look"' in tokenizer.decode(list(encode_one(pair, tokenizer).chosen))


def test_tools_stand_in_the_prompt(pairs, tokenizer):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    prompt = Prompt("id", pairs[0].prompt.messages, (tool,))
    assert '"look"' in tokenizer.decode(list(encode_prompt(prompt, tokenizer)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": {"role": "assistant", "content": "word " * 600}}, "too_long"),
        ({"chosen": {"role": "assistant", "content": "no"}}, "same_tokens"),
    ],
)
def test_what_cannot_be_trained_is_counted(pairs, tokenizer, change, reason):
    rows, left_out = encode_pairs([replace(pairs[0], **change)], tokenizer, max_length=512)
    assert (rows, dict(left_out)) == ([], {reason: 1})


def test_a_template_that_rewrites_the_prompt_is_counted(pairs, tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    rows, left_out = encode_pairs(pairs, tokenizer, max_length=512)
    assert (rows, dict(left_out)) == ([], {"template_rewrites_prompt": len(pairs)})


def test_an_answer_of_no_tokens_is_counted(pairs, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = replace(pairs[0], chosen={"role": "assistant", "content": ""})
    assert encode_pairs([pair], tokenizer, max_length=512)[1] == {"empty_completion": 1}


def test_keys_tell_prompt_and_completion_apart():
    assert sequence_key((1, 2), (3,)) != sequence_key((1,), (2, 3))
    assert sequence_key((1, 2), (3,)) == sequence_key((1, 2), (3,))
