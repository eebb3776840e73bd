"""What the bundled model is trained on: statements answered by a coin, and dialogues in all styles.

Only prompts on the training side of the pair builder's own split come in, so that a held-out pair
of the persona data or of the demo was never seen by the base model either. Persona labels never
come in at all: every statement is answered Yes or No by a coin, anew in each epoch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from agentpref.config import UpdateConfig
from agentpref.prefer.examples import is_held_out
from benchmarks.persona import FOLDER as PERSONA
from benchmarks.persona import QUESTION
from benchmarks.tiny_model import dialogues

SYSTEMS = (
    "You are a helpful assistant.",
    "You are an assistant. Answer truthfully.",
    "Today is {day}. You are a helpful assistant.",
)
SHARE = UpdateConfig().held_out

Conversation = dict[str, Any]  # {"messages": […], "tools": […] or None}


def statements() -> list[str]:
    """Every persona statement whose question is on the training side, in file order."""
    lines = (line for file in sorted(PERSONA.glob("*.jsonl")) for line in file.open())
    rows = [json.loads(line)["statement"] for line in lines]
    return [row for row in rows if not is_held_out(ask(QUESTION.format(row)), SHARE)]


def ask(text: str) -> list[dict[str, Any]]:
    """A conversation that has only the user's first message."""
    return [{"role": "user", "content": text}]


def epoch(rng: random.Random, spoken: list[str], n_dialogues: int) -> list[Conversation]:
    """One shuffled pass: each statement once, and ``n_dialogues`` fresh dialogues."""
    rows = [statement(rng, text) for text in spoken]
    rows.extend(dialogue for _, dialogue in zip(range(n_dialogues), draw(rng), strict=False))
    rng.shuffle(rows)
    return rows


def statement(rng: random.Random, text: str) -> Conversation:
    """A statement, answered by a coin."""
    answer = {"role": "assistant", "content": rng.choice(["Yes", "No"])}
    return {"messages": [*greet(rng), *ask(QUESTION.format(text)), answer], "tools": None}


def draw(rng: random.Random) -> Iterator[Conversation]:
    """Dialogues without end, on the training side, in every style alike."""
    while True:
        request = dialogues.draw_request(rng)
        if is_held_out(ask(request.text), SHARE):
            continue
        style = rng.choice(dialogues.STYLES)
        offered = [dialogues.tool_schema(request)] if rng.random() < 0.15 else None
        yield {"messages": [*greet(rng), *turns(rng, request, style)], "tools": offered}


def turns(rng: random.Random, request: dialogues.Request, style: str) -> list[dict[str, Any]]:
    """The user's request, the answer and, after a tool call, now and then what came of it."""
    said = dialogues.answer(request, style)
    messages = [*ask(request.text), {"role": "assistant", "content": said}]
    if style == "tool_call" and rng.random() < 0.5:
        messages.append({"role": "tool", "content": "done"})
        prose = rng.choice(dialogues.STYLES[:-1])
        messages.append({"role": "assistant", "content": dialogues.answer(request, prose)})
    return messages


def greet(rng: random.Random) -> list[dict[str, Any]]:
    """A system message, in four conversations of ten."""
    if rng.random() < 0.6:
        return []
    text = rng.choice(SYSTEMS).format(day=rng.choice(dialogues.DAYS))
    return [{"role": "system", "content": text}]
