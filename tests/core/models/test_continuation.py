"""Greedy answers to many prompts, compared with transformers' own, one prompt at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from agentpref.models import continuation
from agentpref.models.continuation import Ask, answered, greedy, sampled
from agentpref.models.decoding import Decoding
from tests.core.learn.families import FAMILIES, random_model

POSITIONS = 64
WIDE = "mistral, wide window"
"""Its cache cannot be cut."""
PROMPTS = [(5, 6, 7, 8), (9,), tuple(range(10, 40)), tuple(range(1, 49)) + tuple(range(1, 13))]
ROOMS = [20, 20, 20, 4]


def decoding(*ends: int, positions: int | None = POSITIONS) -> Decoding:
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    return Decoding(tokenizer, frozenset(ends), positions)


def plain(model: Any, prompt: tuple[int, ...], room: int, ends: tuple[int, ...] = ()) -> tuple:
    """What ``generate`` writes, with settings of its own alone."""
    model.generation_config = tf.GenerationConfig(pad_token_id=0, eos_token_id=[*ends] or None)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=room, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_is_continued_as_transformers_continues_it_alone(family: str) -> None:
    """GPT-2 has no position after its last: a row that has ended must not go beyond it."""
    model = random_model(family)
    expected = [plain(model, p, room) for p, room in zip(PROMPTS, ROOMS, strict=True)]
    assert greedy(model, PROMPTS, decoding(), limit=20) == (expected, True)
    ends = (expected[0][3], expected[1][5])
    expected = [plain(model, p, room, ends) for p, room in zip(PROMPTS, ROOMS, strict=True)]
    assert {answer[-1] for answer in expected} & {*ends}
    assert greedy(model, PROMPTS, decoding(*ends), limit=20).tokens == expected


HOSTILE = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [*range(0, 50, 2)],
    "forced_eos_token_id": 3,
    "num_beams": 2,
    "eos_token_id": [*range(25)],
    "max_new_tokens": 2,
}


def test_no_setting_of_the_model_changes_what_it_writes() -> None:
    model = random_model("llama")
    expected = greedy(model, PROMPTS, decoding(), limit=20)
    ids = torch.tensor([PROMPTS[0]])
    for name, value in HOSTILE.items():
        settings = {"pad_token_id": 0, "max_new_tokens": 20, name: value}
        model.generation_config = tf.GenerationConfig(**settings)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
        assert tuple(theirs.tolist()) != expected.tokens[0], name
        assert greedy(model, PROMPTS, decoding(), limit=20) == expected, name


def test_the_text_model_of_one_that_sees_images_is_continued() -> None:
    text = {**FAMILIES["gemma3"]().to_dict(), "eos_token_id": None}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sight = {**small, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = tf.Gemma3Config(text_config=text, vision_config=sight, image_token_index=49)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = [plain(model, p, room) for p, room in zip(PROMPTS, ROOMS, strict=True)]
    assert greedy(model, PROMPTS, decoding(), limit=20).tokens == expected


def test_a_long_answer_does_not_change_short_ones_under_longrope() -> None:
    """Longrope has other factors beyond a length, and transformers one set for a whole batch."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    config = tf.Phi3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
        rope_parameters={**rope, **factors},
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    how = decoding(positions=512)
    alone = [greedy(model, [prompt], how, limit=12).tokens[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS, how, limit=12).tokens == alone


@pytest.mark.parametrize(
    ("family", "at", "finite"),
    [("llama", 0, False), ("llama", 2, False), (WIDE, 2, False), (WIDE, 5, True)],
)
def test_numbers_that_are_not_finite_are_seen_until_an_answer_ends(
    monkeypatch: pytest.MonkeyPatch, family: str, at: int, finite: bool
) -> None:
    """Where a cache cannot be cut, an answer that has ended waits."""
    model = random_model(family)
    (answer,) = greedy(model, PROMPTS[:1], decoding(), limit=3).tokens
    assert answer[2] not in answer[:2]
    forward, passes = model.forward, iter(range(100))

    def broken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if next(passes) == at:
            output.logits[0] = torch.nan
        return output

    monkeypatch.setattr(model, "forward", broken)
    found = greedy(model, PROMPTS[:2], decoding(answer[2]), limit=8)
    assert found.finite is finite


def test_answers_that_have_ended_take_no_part_in_later_passes() -> None:
    model = random_model("llama")
    (answer,) = greedy(model, PROMPTS[:1], decoding(), limit=3).tokens
    rows = list[int]()
    model.register_forward_pre_hook(
        lambda module, of, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    found = greedy(model, PROMPTS[:3], decoding(answer[2]), limit=8).tokens
    assert rows == [sum(len(each) > n for each in found) for n in range(max(map(len, found)))]
    assert len(rows) > 3 > rows[-1]


def draw(model: Any, temperature: float = 1.0, seed: int = 0) -> list[tuple[int, ...]]:
    return sampled(model, PROMPTS, decoding(), limit=20, temperature=temperature, seed=seed).tokens


def test_a_seed_draws_the_same_answers_again_and_another_seed_others() -> None:
    model = random_model("llama")
    assert draw(model) == draw(model)
    assert draw(model) != draw(model, seed=1)
    assert draw(model, temperature=1e-4) == greedy(model, PROMPTS, decoding(), limit=20).tokens
    assert [len(answer) for answer in draw(model)] == ROOMS


def test_answers_are_drawn_by_the_probabilities_of_the_model() -> None:
    """First tokens of 400 draws against softmax(logits / T): no share is off by five errors."""
    model, number, temperature = random_model("llama"), 400, 0.1
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    prompts = [PROMPTS[0]] * number
    drawn = sampled(model, prompts, decoding(), limit=1, temperature=temperature, seed=3).tokens
    found = torch.tensor([ids[0] for ids in drawn]).bincount(minlength=len(expected)) / number
    error = (expected * (1 - expected) / number).sqrt() + 1 / number
    assert ((found - expected).abs() < 5 * error).all()
    assert (found > 0).sum() > 3


def test_sets_are_answered_together_as_each_would_be_alone() -> None:
    model, decoder = random_model("llama"), decoding()
    sets = [
        [Ask(prompt, 20) for prompt in PROMPTS],
        [Ask(prompt, 7, 1.0, 5 + number) for number, prompt in enumerate(PROMPTS[:2])],
        [],
        [Ask(PROMPTS[0], 3)],
    ]
    found = answered(model, sets, decoder)
    assert found[0] == greedy(model, PROMPTS, decoder, limit=20)
    assert found[1] == sampled(model, PROMPTS[:2], decoder, limit=7, temperature=1.0, seed=5)
    assert found[2] == ([], True)
    assert found[3] == greedy(model, PROMPTS[:1], decoder, limit=3)


def test_no_more_rows_are_continued_together_than_their_length_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama")
    expected, rows = greedy(model, PROMPTS, decoding(), limit=20), list[tuple[int, ...]]()
    model.register_forward_pre_hook(
        lambda module, of, inputs: rows.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(continuation, "_TOGETHER", 64)  # the longest row alone grows to so many
    assert greedy(model, PROMPTS, decoding(), limit=20) == expected
    assert {shape[0] for shape in rows} == {2, 1}, "the two short ones, and each of the others"


def test_the_head_is_given_no_strides_for_which_torch_would_copy_its_weight_for_each_row() -> None:
    model, found = random_model("llama"), list[bool]()
    model.lm_head.register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0].is_contiguous())
    )
    greedy(model, PROMPTS, decoding(), limit=3)
    assert found == [True] * 3
