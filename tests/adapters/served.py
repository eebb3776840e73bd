"""Revisions of a small model, the answers of plain transformers and peft, and a blocked engine."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from agentpref.errors import GenerationFailed
from agentpref.home import Home
from agentpref.models.base import BaseModel, load_base
from agentpref.serve.backend import GenerationRequest, Revision
from agentpref.serve.registry import Registry
from agentpref.types import BASE
from agentpref_adapters.transformers import TransformersBackend

PROMPTS = ["hello", "What is the capital of France?", "tide", "Please answer briefly. " * 4, "é"]
REVISIONS = 4
LENGTH = 10


class Served(NamedTuple):
    home: Path
    base: str
    names: tuple[str, ...]
    expected: dict[tuple[str, str], tuple[int, ...]]


def ask(prompt: str, **settings) -> GenerationRequest:
    settings = {"max_tokens": LENGTH, **settings}
    return GenerationRequest(messages=({"role": "user", "content": prompt},), **settings)


def make_adapter(base: str, folder: Path, seed: int, rank: int = 8) -> Path:
    """A LoRA whose B matrices are random too, so that it changes what is generated."""
    model = get_peft_model(load_base(base).model, LoraConfig(r=rank, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


def oracle(base: BaseModel, prompt: str) -> tuple[int, ...]:
    tokenizer = base.tokenizer
    message = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = base.model.generate(**encoded, max_new_tokens=LENGTH, do_sample=False)
    return tuple(ids[0, encoded["input_ids"].shape[1] :].tolist())


def make_home(base: str, root: Path) -> Served:
    """A home with some revisions, and what each of them answers according to the oracle."""
    registry = Registry(Home.create(root / "home"))
    identity = load_base(base).identity
    plain = load_base(base)
    expected = {(BASE, prompt): oracle(plain, prompt) for prompt in PROMPTS}
    names = []
    for seed in range(REVISIONS):
        folder = make_adapter(base, root / str(seed), seed)
        revision = registry.publish(folder, parent=None, model=identity, training={})
        names.append(revision.revision_id)
        with_adapter = load_base(base)
        peft = PeftModel.from_pretrained(with_adapter.model, folder)
        for prompt in PROMPTS:
            expected[revision.revision_id, prompt] = oracle(
                replace(with_adapter, model=peft), prompt
            )
    return Served(root / "home", base, tuple(names), expected)


def get(served: Served, index: int = 0) -> Revision:
    return Registry(served.home).get(served.names[index])


class blocked:  # noqa: N801
    """Block the model's thread; call the result to wait until that many requests wait."""

    def __init__(self, backend: TransformersBackend) -> None:
        self.backend = backend
        self.may_go_on = threading.Event()

    def __enter__(self):
        entered = threading.Event()
        model = self.backend.base.model
        forward = model.forward

        def busy(*args, **kwargs):
            model.forward = forward
            entered.set()
            self.may_go_on.wait()
            return forward(*args, **kwargs)

        model.forward = busy
        self.thread = threading.Thread(target=self.occupy)
        self.thread.start()
        entered.wait()
        return self.wait_for

    def occupy(self) -> None:
        with suppress(GenerationFailed):
            self.backend.generate(BASE, ask("busy", max_tokens=1))

    def __exit__(self, *_) -> None:
        self.may_go_on.set()
        self.thread.join()

    def wait_for(self, count: int) -> None:
        while len(self.backend._thread.waiting) < count:
            threading.Event().wait(0.001)
