"""A home, some adapters of one base, and the answers of each adapter.

The answers come from plain transformers and peft, one prompt at a time, without agentpref. Prompts
are longer than a block of a paged cache, and begin alike, so that an engine which confuses the
caches of two revisions gives wrong answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentpref.home import Home
from agentpref.models.base import BaseModel, load_base
from agentpref.serve.backend import GenerationRequest
from agentpref.types import BASE

MAX_TOKENS = 32
RANK = 8
SPREAD = 0.2
"""Standard deviation of the adapters' B matrices: their answers are no English, but distinct."""

CLOSE_CALL = 5e-4
"""In nats; prompts with two tokens closer than this are left out, since rounding may decide."""

Ids = tuple[int, ...]

_SYSTEM = (
    "You are the assistant of a small hotel by the sea. Breakfast is from seven to ten in the "
    "morning, the kitchen closes at nine in the evening, and the sauna is open on weekends only. "
    "The ferry leaves from the old harbour twice a day, at eight and at four, and takes no cars. "
    "Guests may borrow bicycles, umbrellas and board games at the desk for as long as they like. "
    "Dogs are welcome in the garden and in the hall, but not in the dining room. Answer politely, "
    "in one or two short sentences, and say so when you do not know something."
)
_QUESTIONS = (
    "When is breakfast?",
    "May I bring my dog to dinner?",
    "How do I get to the island with my car?",
    "Is the sauna open on Tuesday?",
    "Where can I find an umbrella?",
    "What can we do when it rains?",
    "Can I still eat at half past nine?",
    "Which ferry should I take to be back for lunch?",
    "Do you rent bicycles?",
    "Is there a room with a view of the sea?",
    "What is the capital of France?",
    "Please write a short poem about the tide.",
    "Turn off the lamp in the hall.",
    "Set a timer of 5 minutes for the tea.",
)


@dataclass(slots=True)
class Stage:
    """A home whose namespace has no revision yet, and adapters that can be published into it.

    ``expected`` maps an adapter (a number, ``None`` for the base) and a prompt to the answer.
    """

    home: Home
    base: str
    identity: Mapping[str, str]
    folders: Sequence[Path]
    prompts: Sequence[str]
    expected: Mapping[tuple[int | None, str], Ids]
    lengths: Sequence[int]
    left_out: int
    _adapters: dict[str, int | None] = field(default_factory=lambda: {BASE: None})

    def note(self, revision: str, adapter: int) -> None:
        """Note the adapter that was published as a revision."""
        self._adapters[revision] = adapter

    def answer(self, revision: str, prompt: str) -> Ids:
        """What a revision answers."""
        return self.expected[self._adapters[revision], prompt]


def request(prompt: str) -> GenerationRequest:
    """Ask a prompt greedily."""
    return GenerationRequest(messages=tuple(_messages(prompt)), max_tokens=MAX_TOKENS)


def build(root: Path, base: str, adapters: int) -> Stage:
    """Make adapters and their answers; keep the prompts that they all answer differently."""
    began = time.monotonic()
    folders = [adapter_of(base, root / f"adapter-{number}", number) for number in range(adapters)]
    plain = load_base(base)
    answers: dict[tuple[int | None, str], tuple[Ids, float]] = {}
    answers |= {(None, prompt): answer for prompt, answer in _ask_all(plain, None).items()}
    for number, folder in enumerate(folders):
        found = _ask_all(load_base(base), folder)
        answers |= {(number, prompt): answer for prompt, answer in found.items()}
    prompts = [prompt for prompt in _QUESTIONS if _tells_apart(prompt, answers)]
    if len(prompts) < 4:
        raise SystemExit(f"error: only {len(prompts)} prompts tell the adapters apart")
    print(f"the expected answers took {time.monotonic() - began:.0f} s for {len(prompts)} prompts")
    return Stage(
        home=Home.create(root / "home"),
        base=base,
        identity=plain.identity,
        folders=folders,
        prompts=prompts,
        expected={key: ids for key, (ids, _) in answers.items()},
        lengths=[len(encoded(plain, prompt)["input_ids"][0]) for prompt in prompts],
        left_out=len(_QUESTIONS) - len(prompts),
    )


def encoded(base: BaseModel, prompt: str) -> Any:
    """A prompt as plain transformers encodes it."""
    return base.tokenizer.apply_chat_template(
        _messages(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]


def adapter_of(base: str, folder: Path, seed: int) -> Path:
    """A LoRA of random matrices, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(load_base(base).model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=SPREAD, generator=generator)
        elif "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(str(folder))
    return folder


def _ask_all(base: BaseModel, folder: Path | None) -> dict[str, tuple[Ids, float]]:
    """Each prompt's greedy answer, and the smallest margin between its two best tokens."""
    from peft import PeftModel

    model: Any = base.model
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    return {prompt: _ask(model, encoded(base, prompt)) for prompt in _QUESTIONS}


def _ask(model: Any, prompt: Any) -> tuple[Ids, float]:
    import torch

    found = model.generate(
        **prompt,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = found.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    best = torch.cat(found.logits).topk(2).values
    return tuple(ids), float((best[:, 0] - best[:, 1]).min())


def _tells_apart(prompt: str, answers: Mapping[tuple[int | None, str], tuple[Ids, float]]) -> bool:
    found = [answer for (_, asked), answer in answers.items() if asked == prompt]
    return len({ids for ids, _ in found}) == len(found) and min(m for _, m in found) > CLOSE_CALL
