"""Encoding separates prompt and completions, and counts what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from transformers import AutoTokenizer

from agentpref.learn.cache import sequence_key
from agentpref.learn.encode import EncodedExample, encode
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import encode_prompt
from agentpref.types import Prompt
from tests.core.learn.examples import answer, make_group, with_completions


@pytest.fixture
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


def encode_one(pair, tokenizer, max_length=512):
    found = encode([pair], ChatTemplate(tokenizer), max_length=max_length)
    assert not found.left_out
    (row,) = found.rows
    return row


def test_the_prompt_ends_where_the_assistant_begins(pairs, tokenizer):
    row = encode_one(pairs[3], tokenizer)
    assert tokenizer.decode(list(row.prompt)).endswith("<|im_start|>assistant\n")
    assert row.prompt == encode_prompt(pairs[3].prompt, ChatTemplate(tokenizer))


def test_completions_end_with_the_token_that_ends_the_turn(pairs, tokenizer):
    row = encode_one(pairs[3], tokenizer)
    assert tokenizer.decode(list(row.completions[0])) == "yes, 3 it is<|im_end|>"
    assert tokenizer.decode(list(row.completions[1])) == "no<|im_end|>"


def test_a_tool_call_is_encoded_as_a_completion(pairs, tokenizer):
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    pair = with_completions(pairs[0], {"message": message})
    assert '"look"' in tokenizer.decode(list(encode_one(pair, tokenizer).completions[0]))


def test_tools_are_encoded_in_the_prompt(pairs, tokenizer):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    prompt = Prompt("id", pairs[0].prompt.messages, (tool,))
    assert '"look"' in tokenizer.decode(list(encode_prompt(prompt, ChatTemplate(tokenizer))))


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("word " * 600, "too_long"),
        ("no", "same_tokens"),
        ("a<|im_end|>b", "special_token_inside"),
    ],
)
def test_examples_that_cannot_be_trained_are_counted_by_reason(pairs, tokenizer, chosen, reason):
    message = {"role": "assistant", "content": chosen}
    changed = with_completions(pairs[0], {"message": message})
    found = encode([changed], ChatTemplate(tokenizer), max_length=512)
    assert (found.rows, found.left_out) == ([], {reason: 1})


def test_a_template_that_rewrites_the_prompt_is_counted(pairs, tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    found = encode(pairs, ChatTemplate(tokenizer), max_length=512)
    assert (found.rows, found.left_out) == ([], {"template_rewrites_prompt": len(pairs)})


def test_a_template_that_refuses_a_conversation_is_counted(pairs, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    (asked,) = pairs[1].prompt.messages
    refused = replace(pairs[0].prompt, messages=({"role": "system", "content": "Hi"}, asked))
    said = [replace(pairs[0], prompt=refused), pairs[1]]
    found = encode(said, ChatTemplate(tokenizer), max_length=512)
    assert [row.example for row in found.rows] == [pairs[1]]
    assert found.left_out == {"template_refuses": 1}


def test_an_answer_without_tokens_is_counted(pairs, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = with_completions(pairs[0], {"message": {"role": "assistant", "content": ""}})
    assert encode([pair], ChatTemplate(tokenizer), max_length=512).left_out == {
        "empty_completion": 1
    }


def test_keys_differ_where_the_boundary_of_prompt_and_completion_differs():
    assert sequence_key((1, 2), (3,)) != sequence_key((1,), (2, 3))
    assert sequence_key((1, 2), (3,)) == sequence_key((1, 2), (3,))


def test_prompts_with_the_same_id_and_different_texts_are_encoded_apart(pairs, tokenizer):
    alike = [replace(pair, prompt=replace(pair.prompt, id="")) for pair in pairs]
    rows = encode(alike, ChatTemplate(tokenizer), max_length=512).rows
    assert [row.prompt for row in rows] == [
        encode_prompt(p.prompt, ChatTemplate(tokenizer)) for p in pairs
    ]


def test_a_prompt_is_rendered_and_tokenized_once(pairs, tokenizer, monkeypatch):
    rendered, texts = [], []
    try_render, call = ChatTemplate.try_render, type(tokenizer).__call__

    def render(self, prompt, **how):
        rendered.append(prompt)
        return try_render(self, prompt, **how)

    def tokenize(self, text, **how):
        texts.append(text)
        return call(self, text, **how)

    monkeypatch.setattr(ChatTemplate, "try_render", render)
    monkeypatch.setattr(type(tokenizer), "__call__", tokenize)
    same = [replace(pair, prompt=replace(pairs[0].prompt)) for pair in pairs]
    assert len(encode(same, ChatTemplate(tokenizer), max_length=512).rows) == len(pairs)
    assert len(rendered) == 1
    assert [len(batch) for batch in texts][:2] == [1, 1]  # the prompt, and its tail
    assert len(texts) == 3  # all answers in one call


def test_a_group_has_one_prompt_and_all_its_completions(tokenizer):
    answers = {"four": 1.0, "about four": 0.7, "five": 0.2, "no idea": 0.0}
    row = encode_one(make_group(1, answers), tokenizer)
    assert [tokenizer.decode(list(ids)) for ids in row.completions] == [
        f"{text}<|im_end|>" for text in answers
    ]
    assert row.own == row.completions
    assert row.masks == (None,) * 4
    assert row.width == len(row.prompt) + sum(map(len, row.completions))


def test_a_group_with_two_equal_completions_is_counted(tokenizer):
    group = make_group(1, {"four": 1.0, "five": 0.0})
    twice = replace(group, completions=(*group.completions, answer("four", 0.5)))
    found = encode([twice], ChatTemplate(tokenizer), max_length=512)
    assert (found.rows, found.left_out) == ([], {"same_tokens": 1})


def test_a_loss_mask_is_kept_with_the_logged_tokens_it_belongs_to(pairs, tokenizer):
    ids = encode_one(pairs[0], tokenizer).completions[0]
    mask = (False, True) * (len(ids) // 2) + (True,) * (len(ids) % 2)
    masked = with_completions(pairs[0], {"token_ids": ids, "loss_mask": mask})
    assert encode_one(masked, tokenizer).masks == (mask, None)


@pytest.mark.parametrize("change", ["another length", "other tokens", "no tokens"])
def test_an_example_whose_loss_mask_does_not_fit_is_left_out(pairs, tokenizer, change):
    ids = encode_one(pairs[0], tokenizer).completions[0]
    logged = {"another length": ids, "other tokens": (*ids[:-1], 10**6), "no tokens": None}[change]
    mask = (True,) * (len(ids) + (change == "another length"))
    masked = with_completions(pairs[0], {"token_ids": logged, "loss_mask": mask})
    found = encode([masked], ChatTemplate(tokenizer), max_length=512)
    assert (found.rows, found.left_out) == ([], {"loss_mask_does_not_fit": 1})


def test_a_loss_mask_that_trains_no_token_is_counted(pairs, tokenizer):
    ids = encode_one(pairs[0], tokenizer).completions[0]
    masked = with_completions(pairs[0], {"token_ids": ids, "loss_mask": (False,) * len(ids)})
    assert encode([masked], ChatTemplate(tokenizer), max_length=512).left_out == {
        "empty_loss_mask": 1
    }


@pytest.mark.parametrize("label", [None, float("nan"), float("inf")])
def test_an_example_without_a_finite_label_is_left_out(pairs, tokenizer, label):
    unlabelled = with_completions(pairs[0], {"label": label})
    assert encode([unlabelled], ChatTemplate(tokenizer), max_length=512).left_out == {"no_label": 1}


def test_a_frozen_row_keeps_its_tokens_and_what_losses_read_but_no_text(pairs, tokenizer):
    ids = encode_one(pairs[0], tokenizer).completions[0]
    masked = {
        "token_ids": ids,
        "logprobs": (-0.5,) * len(ids),
        "loss_mask": (True,) * (len(ids) - 1) + (False,),
        "author": "rev-1",
    }
    changes = {"weight": 0.3, "noise": 0.21, "tag": "style", "trace_id": "t", "run_at": 7.0}
    example = replace(with_completions(pairs[0], masked), origin="judge", **changes)
    row = encode_one(example, tokenizer)
    frozen = orjson.dumps(row.freeze())
    found = EncodedExample.thaw(orjson.loads(frozen))
    assert (found.prompt, found.completions, found.masks) == (
        row.prompt,
        row.completions,
        row.masks,
    )
    assert (found.width, found.own) == (row.width, row.own)
    for name in ("example_id", "namespace", "created_at", "origin", "lone", *changes):
        assert getattr(found.example, name) == getattr(row.example, name), name
    for mine, other in zip(found.example.completions, example.completions, strict=True):
        assert mine == replace(other, message={})
    assert orjson.dumps(found.freeze()) == frozen
    assert not any(text in frozen for text in (b"yes", b"Question"))


def test_a_token_that_has_no_embedding_is_left_out(pairs, tokenizer):
    row = encode_one(pairs[0], tokenizer)
    highest = max(map(max, (row.prompt, *row.completions)))
    for embedded, left_out in ((highest + 1, {}), (highest, {"no_embedding": 1})):
        found = encode([pairs[0]], ChatTemplate(tokenizer), max_length=512, embedded=embedded)
        assert found.left_out == left_out
