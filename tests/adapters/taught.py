"""A copy of the bundled model that was taught to answer a few prompts.

The standard suites of LangChain ask for skills that a model of three million parameters has not: to
call a weather tool unasked, to tell 3 from 4, to copy Chinese. All its weights are taught, since no
adapter teaches a model to write tokens that it never saw (their embeddings are alike). Everything
else is the product's: template, engine and grammars.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from agentpref.models.base import find_base, load_base
from agentpref.types import Message, Prompt, Tool

Lesson = tuple[Sequence[Message], Sequence[Tool], Message]
STEPS, KNOWN = 60, 0.02


def teach(folder: Path, lessons: Sequence[Lesson]) -> Path:
    """Save a model, as a base, that answers each prompt as its lesson says."""
    shutil.copytree(find_base("tiny"), folder)
    base = load_base("tiny")
    model, rows = base.model, [_tokens(base, *lesson) for lesson in lessons]
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=2e-3)
    model.train()
    for _ in range(STEPS):
        worst = 0.0
        for tokens, start in rows:  # one by one: padding would cost more
            labels = torch.tensor([[-100] * start + tokens[start:]])
            loss = model(input_ids=torch.tensor([tokens]), labels=labels).loss
            loss.backward()
            worst = max(worst, float(loss.detach()))
        if worst < KNOWN:
            break
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


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
