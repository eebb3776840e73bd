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
    found = encode_pairs([pair], tokenizer, max_length=max_length)
    assert not found.left_out
    (row,) = found.rows
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
        ({"chosen": {"role": "assistant", "content": "a<|im_end|>b"}}, "special_token_inside"),
    ],
)
def test_what_cannot_be_trained_is_counted(pairs, tokenizer, change, reason):
    found = encode_pairs([replace(pairs[0], **change)], tokenizer, max_length=512)
    assert (found.rows, found.left_out) == ([], {reason: 1})


def test_a_template_that_rewrites_the_prompt_is_counted(pairs, tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    found = encode_pairs(pairs, tokenizer, max_length=512)
    assert (found.rows, found.left_out) == ([], {"template_rewrites_prompt": len(pairs)})


def test_a_template_that_refuses_a_conversation_is_counted(pairs, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    (asked,) = pairs[1].prompt.messages
    refused = replace(pairs[0].prompt, messages=({"role": "system", "content": "Hi"}, asked))
    in_parts = replace(pairs[2].prompt, messages=({"role": "user", "content": [{"text": "Hi"}]},))
    said = [
        replace(pairs[0], prompt=refused),
        pairs[1],
        replace(pairs[2], prompt=in_parts),
    ]
    found = encode_pairs(said, tokenizer, max_length=512)
    assert [row.pair for row in found.rows] == [pairs[1]]
    assert found.left_out == {"template_refuses": 2}


def test_an_answer_of_no_tokens_is_counted(pairs, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = replace(pairs[0], chosen={"role": "assistant", "content": ""})
    assert encode_pairs([pair], tokenizer, max_length=512).left_out == {"empty_completion": 1}


def test_keys_tell_prompt_and_completion_apart():
    assert sequence_key((1, 2), (3,)) != sequence_key((1,), (2, 3))
    assert sequence_key((1, 2), (3,)) == sequence_key((1, 2), (3,))


def test_prompts_are_told_apart_by_what_they_say(pairs, tokenizer):
    """Their ids are hashes where a log gives them, and may be anything elsewhere."""
    alike = [replace(pair, prompt=replace(pair.prompt, id="")) for pair in pairs]
    rows = encode_pairs(alike, tokenizer, max_length=512).rows
    assert [row.prompt for row in rows] == [encode_prompt(p.prompt, tokenizer) for p in pairs]


def test_a_prompt_is_rendered_and_tokenised_once(pairs, tokenizer, monkeypatch):
    rendered, texts = [], []
    template, call = type(tokenizer).apply_chat_template, type(tokenizer).__call__

    def render(self, conversation, **how):
        rendered.append(how.get("add_generation_prompt", False))
        return template(self, conversation, **how)

    def tokenise(self, text, **how):
        texts.append(text)
        return call(self, text, **how)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", render)
    monkeypatch.setattr(type(tokenizer), "__call__", tokenise)
    same = [replace(pair, prompt=replace(pairs[0].prompt)) for pair in pairs]
    assert len(encode_pairs(same, tokenizer, max_length=512).rows) == len(pairs)
    assert rendered.count(True) == 1
    assert [len(batch) for batch in texts][:2] == [1, 1]  # the prompt, and its tail
    assert len(texts) == 3  # all answers in one call
