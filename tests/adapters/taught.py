"""A revision of the bundled model that was taught to answer a few prompts, served in this process.

The standard suites of LangChain ask for skills that a model of three million parameters has not: to
call a weather tool unasked, to tell 3 from 4, to copy Chinese. An adapter teaches it those answers,
as corrections teach a larger model, and everything else is the product's: the adapter is published,
made live, and answers through the router, under the grammars that the suites ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from agentpref.home import Home
from agentpref.models.base import load_base
from agentpref.serve.registry import Registry
from agentpref.types import Message, Prompt, Tool

Lesson = tuple[Sequence[Message], Sequence[Tool], Message]
STEPS = 36


def teach(root: Path, lessons: Sequence[Lesson], steps: int = STEPS) -> Home:
    """A home whose live revision of ``tiny`` answers each prompt as its lesson says."""
    base = load_base("tiny")
    rows = [_tokens(base, *lesson) for lesson in lessons]
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, steps)
    model.train()
    for _ in range(steps):
        for tokens, start in rows:  # one by one: padding would cost more
            ids = torch.tensor([tokens])
            labels = torch.tensor([[-100] * start + tokens[start:]])
            (model(input_ids=ids, labels=labels).loss / len(rows)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "adapter")
    home = Home.create(root / "home")
    registry = Registry(home)
    revision = registry.publish(
        root / "adapter", parent=None, model=load_base("tiny").identity, training={}
    )
    registry.promote(revision.revision_id)
    return home


def _tokens(base, messages, tools, answer) -> tuple[list[int], int]:
    """The tokens of a prompt and its answer, and where the answer starts."""
    prompt = Prompt("", tuple(messages), tuple(tools))
    asked = base.template.render(prompt)
    written = base.template.try_complete(prompt, asked, answer)
    assert isinstance(written, str), written
    before, after = (
        base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, written)
    )
    return before + after, len(before)
