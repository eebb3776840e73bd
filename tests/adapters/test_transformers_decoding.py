"""What the evaluation writes is what the in-process engine serves, whatever a base's defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import PROMPTS, Served, ask, get
from transformers import AutoTokenizer

from agentpref.config import UpdateConfig
from agentpref.learn.learner import Learner
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from agentpref.models.tokenizer import encode_prompt
from agentpref.prove import evaluate, probes
from agentpref.prove.metrics import distinct_n
from agentpref.serve.backend import Reply
from agentpref.types import BASE, Message, Prompt
from agentpref_adapters.transformers import TransformersBackend

END = 2  # the tokenizer's end token, which the template writes after each turn
LIMIT = 24
CHATS: list[tuple[Message, ...]] = [({"role": "user", "content": prompt},) for prompt in PROMPTS]
DEFAULTS: dict[str, dict[str, Any]] = {
    "a repetition penalty": {"repetition_penalty": 1.3},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    "stop strings": {"stop_strings": ["e", " "]},
    "several answers": {"num_return_sequences": 3, "num_beams": 3},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "a minimum length": {"min_length": 500, "min_new_tokens": 20},
    "a short limit": {"max_new_tokens": 2, "max_length": 20},
    "suppressed tokens": {"suppress_tokens": [*range(0, 500, 2)]},
    "begin-suppressed tokens": {"begin_suppress_tokens": [*range(3, 500)]},
    "forced tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 6},
    "no cache": {"use_cache": False, "cache_implementation": "static"},
    "guidance": {"guidance_scale": 2.0},
    "a pad token that ends": {"pad_token_id": END},
}


@contextmanager
def serving(base: str, served: Served) -> Iterator[TransformersBackend]:
    """A backend with a revision of the shared home, whose weights are those of ``base``."""
    backend = TransformersBackend(base, precision="float32")
    backend.load(get(served))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[str, list[Reply]]:
    """What the revision and the base answer with no defaults but the end token."""
    with serving(served.base, served) as backend:
        return {
            name: [backend.generate(name, ask(p, max_tokens=LIMIT)) for p in PROMPTS]
            for name in (served.names[0], BASE)
        }


def with_settings(served: Served, folder: Path, settings: dict[str, Any]) -> str:
    shutil.copytree(served.base, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return str(folder)


def check_evaluation(base: str, served: Served, replies: dict[str, list[Reply]]) -> None:
    """Statistics and texts of the evaluation are those of these replies."""
    learner = Learner(load_base(base), read_adapter(get(served).path), UpdateConfig())
    prompts = [encode_prompt(Prompt("", chat), learner.base.template) for chat in CHATS]
    for policy, name in (("live", served.names[0]), ("candidate", served.names[0]), ("base", BASE)):
        writing = [probes.Writing(prompts, LIMIT)]
        (found,) = probes.generations(learner, policy, writing)  # type: ignore[arg-type]
        tokens = [reply.token_ids for reply in replies[name]]
        assert found.mean_length == sum(map(len, tokens)) / len(tokens)
        assert found.distinct_2 == distinct_n(tokens, 2)
        assert found.endless == sum(reply.finish_reason == "length" for reply in replies[name])
        assert found.empty == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "MOST_TOKENS", LIMIT)
        said = [evaluate.answer(learner, chat) for chat in CHATS]
    assert said == [reply.message["content"] for reply in replies[served.names[0]]]


@pytest.mark.guarantee("proof")
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_a_bases_defaults_change_neither_what_is_proven_nor_what_is_served(
    served: Served, expected: dict[str, list[Reply]], tmp_path: Path, defaults: str
) -> None:
    base = with_settings(served, tmp_path / "base", DEFAULTS[defaults])
    check_evaluation(base, served, expected)
    with serving(base, served) as backend:
        for name, replies in expected.items():
            found = [backend.generate(name, ask(p, max_tokens=LIMIT)) for p in PROMPTS]
            assert [reply.token_ids for reply in found] == [reply.token_ids for reply in replies]


def test_every_end_token_ends_an_answer_in_the_evaluation_as_in_serving(
    served: Served, expected: dict[str, list[Reply]], tmp_path: Path
) -> None:
    """An answer that ends early is padded in its batch; padding has no part in any figure."""
    others = sorted({reply.token_ids[4] for replies in expected.values() for reply in replies})
    base = with_settings(served, tmp_path / "base", {"eos_token_id": [END, *others]})
    with serving(base, served) as backend:
        replies = {
            name: [backend.generate(name, ask(p, max_tokens=LIMIT)) for p in PROMPTS]
            for name in expected
        }
    for name, found in replies.items():
        for reply, whole in zip(found, expected[name], strict=True):
            ends = [i for i, token in enumerate(whole.token_ids) if token in {END, *others}]
            assert reply.token_ids == whole.token_ids[: ends[0] + 1]
            assert reply.finish_reason == "stop"
    assert len({len(reply.token_ids) for found in replies.values() for reply in found}) > 1
    check_evaluation(base, served, replies)


def test_the_templates_end_of_turn_ends_an_answer_where_it_is_not_the_tokenizers(
    served: Served, tmp_path: Path
) -> None:
    """As with Gemma, whose template ends turns with another token than ``<eos>``."""
    folder = with_settings(served, tmp_path / "base", {"eos_token_id": 1})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    script = [7, 8, END, 9, 10, 11]
    base = load_base(folder)
    follow(base.model, script)
    learner = Learner(base, None, UpdateConfig())
    prompts = [encode_prompt(Prompt("", chat), learner.base.template) for chat in CHATS[:1]]
    writing = [probes.Writing(prompts, len(script))]
    (found,) = probes.generations(learner, "candidate", writing)
    assert (found.mean_length, found.endless) == (3, 0)

    backend = TransformersBackend(folder, precision="float32")
    follow(backend.base.model, script)
    reply = backend.generate(BASE, ask(PROMPTS[0], max_tokens=len(script)))
    backend.close()
    assert (reply.token_ids, reply.finish_reason) == ((7, 8, END), "stop")


def follow(model: Any, script: list[int]) -> None:
    """Make a model write these tokens, from the next forward pass on."""
    forward, tokens = model.forward, iter(script)

    def scripted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[:, -1, next(tokens)] = 100.0
        return output

    model.forward = scripted
