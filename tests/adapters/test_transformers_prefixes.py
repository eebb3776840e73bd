"""Prompts that begin alike are read once, and answered as if they were read whole."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch
from served import Served, ask, get

from agentpref.models.base import load_base
from agentpref.models.continuation import Continuation
from agentpref.serve.backend import GenerationRequest
from agentpref.types import BASE
from agentpref_adapters import _transformers_prefixes as prefixes
from agentpref_adapters._transformers_adapters import Layers
from agentpref_adapters._transformers_prefixes import Prefixes
from agentpref_adapters.transformers import TransformersBackend
from tests.core.learn.families import random_model

RULES = "Be brief. " * 12
SYSTEM = tuple(range(10, 20)) * 5


def with_rules(question: str) -> GenerationRequest:
    asked = ask(question)
    system = {"role": "system", "content": RULES}
    return GenerationRequest((system, *asked.messages), max_tokens=asked.max_tokens)


class Read:
    """How many tokens each pass of a model reads, (rows, tokens)."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, given: Any, inputs: Any) -> None:
        self.shapes.append(tuple(inputs["input_ids"].shape))

    def prompts(self) -> list[tuple[int, ...]]:
        """The passes that read prompts; and all are forgotten."""
        found = [shape for shape in self.shapes if shape[1] > 1]
        self.shapes.clear()
        return found


@pytest.fixture
def backend(served: Served) -> Iterator[TransformersBackend]:
    with closing(TransformersBackend(served.base, precision="float32")) as backend:
        for number in range(2):
            backend.load(get(served, number))
        yield backend


def test_a_system_prompt_is_read_once_and_answers_stay_the_same(
    backend: TransformersBackend, served: Served
) -> None:
    questions = ["hello", "tide", "Why is the sky blue?", "é"]
    read, names = Read(backend.base.model), (BASE, *served.names[:2])
    with closing(TransformersBackend(served.base, precision="float32")) as fresh:
        for number in range(2):
            fresh.load(get(served, number))
        for name in names:
            for question in questions:
                fresh._thread._engine._prefixes._shares = False
                expected = fresh.generate(name, with_rules(question))
                found = backend.generate(name, with_rules(question))
                assert found.token_ids == expected.token_ids
                assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
                assert found.prompt_tokens == expected.prompt_tokens
    widths = [shape[1] for shape in read.prompts()]
    # Of each revision the first prompt is read whole, the second in two parts, and then ends only.
    for own in (widths[:5], widths[5:10], widths[10:]):
        whole, rules, *ends = own
        assert rules > whole / 2
        assert max(ends) < whole / 3


def test_requests_that_come_together_share_what_they_begin_with(
    backend: TransformersBackend,
) -> None:
    questions = [f"What is {number}?" for number in range(6)]
    alone = [backend.generate(BASE, with_rules(question)).token_ids for question in questions]
    backend._thread._engine._prefixes = Prefixes(backend.base.model, backend._layers)
    with ThreadPoolExecutor(6) as pool:
        replies = pool.map(lambda q: backend.generate(BASE, with_rules(q)), questions)
        assert [reply.token_ids for reply in replies] == alone


@pytest.fixture
def kept() -> Prefixes:
    model = random_model("llama")
    return Prefixes(model, Layers(model))


def common(kept: Prefixes, *prompts: tuple[int, ...], adapter: Any = None) -> list[int]:
    found = kept.common([(adapter, prompt) for prompt in prompts])
    for prompt, tokens in zip(prompts, found, strict=True):
        assert prompt[: len(tokens)] == tokens
        assert len(tokens) < len(prompt), "something is left to read"
        kept.read(adapter, tokens)
    return [len(tokens) for tokens in found]


def test_what_is_alike_is_found_in_prompts_that_come_together_and_one_after_another(
    kept: Prefixes,
) -> None:
    assert common(kept, (*SYSTEM, 1, 2), (*SYSTEM, 3), (*SYSTEM, 1, 4)) == [50, 50, 50]
    assert common(kept, (*SYSTEM, 7, 8)) == [50]
    assert common(kept, (5, 6, 7)) == [0], "too short to be worth a pass"
    assert common(kept, (*SYSTEM, 1, 2)) == [50], "another prompt came between"


def test_the_first_prompt_is_read_whole_and_the_same_one_again_but_for_its_end(
    kept: Prefixes,
) -> None:
    assert common(kept, (*SYSTEM, 1)) == [0]
    assert common(kept, (*SYSTEM, 1)) == [50]
    assert common(kept, (*SYSTEM, 1), (*SYSTEM, 1)) == [50, 50]


def test_a_conversation_that_goes_on_is_read_from_where_it_was(kept: Prefixes) -> None:
    turns = [SYSTEM + tuple(range(20, 30)) * 8 * n for n in range(1, 4)]
    assert [common(kept, turn)[0] for turn in turns] == [0, 130, 210]


def test_a_revision_has_prefixes_of_its_own_and_takes_them_along(served: Served) -> None:
    base = load_base(served.base)
    layers = Layers(base.model)
    kept, one, other = (
        Prefixes(base.model, layers),
        *(layers.read(f"r{n}", _files(served, n)) for n in range(2)),
    )
    assert common(kept, (*SYSTEM, 1), (*SYSTEM, 2), adapter=one) == [50, 50]
    assert common(kept, (*SYSTEM, 1), adapter=other) == [0]
    assert common(kept, (*SYSTEM, 1)) == [0]
    assert len(kept._kept) == 1
    del one
    assert common(kept, (*SYSTEM, 3), adapter=other) == [50]
    assert [each.adapter() for each in kept._kept] == [other]


def _files(served: Served, number: int) -> Any:
    from agentpref.models.adapter_files import read_adapter

    return read_adapter(get(served, number).path)


def test_what_was_used_last_is_kept(kept: Prefixes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MOST", 120)
    starts = [tuple(range(begin, begin + 10)) * 5 for begin in (10, 20, 30)]
    for start in starts[:2]:
        common(kept, (*start, 1), (*start, 2))
    assert common(kept, (*starts[0], 3)) == [50]
    common(kept, (*starts[2], 1), (*starts[2], 2))
    assert [one.prefix.tokens for one in kept._kept] == [starts[0], starts[2]]


def test_where_a_cache_cannot_be_cut_prompts_are_read_whole() -> None:
    model = random_model("mistral, wide window")
    kept = Prefixes(model, Layers(model))
    prompts = [(*SYSTEM, 1), (*SYSTEM, 2)]
    assert kept.common([(None, prompt) for prompt in prompts]) == [SYSTEM, SYSTEM]
    assert kept.read(None, SYSTEM) is None
    assert kept.common([(None, prompt) for prompt in prompts]) == [(), ()]


def test_rows_with_a_prefix_have_the_logits_of_whole_rows() -> None:
    model = random_model("llama")
    kept = Prefixes(model, Layers(model))
    prompts = [(*SYSTEM, 1), (*SYSTEM, 2, 3, 4), (*SYSTEM, 5, 6)]
    with torch.inference_mode():
        whole, parts = (
            Continuation(prompts, 0, model.device, prefix)
            for prefix in (None, kept.read(None, SYSTEM))
        )
        for token in (7, 8, 9):
            expected, found = (each.logits(model) for each in (whole, parts))
            assert torch.allclose(found, expected, atol=1e-5)
            for each in (whole, parts):
                each.append(torch.tensor([token] * 3))
            if token == 7:
                whole.keep([2, 0])
                parts.keep([2, 0])
                assert len(parts.mask) == 2
                break
        for token in (8, 9):
            expected, found = (each.logits(model) for each in (whole, parts))
            assert torch.allclose(found, expected, atol=1e-5)
            for each in (whole, parts):
                each.append(torch.tensor([token] * 2))


def test_a_longer_beginning_is_read_from_where_a_shorter_one_ends(kept: Prefixes) -> None:
    read = Read(kept._model)
    turn = SYSTEM + tuple(range(20, 30)) * 8
    common(kept, (*SYSTEM, 1), (*SYSTEM, 2))
    common(kept, (*turn, 1), (*turn, 2))
    assert read.prompts() == [(1, 50), (1, 80)]
