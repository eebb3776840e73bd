"""What the bundled model reads: statements answered by a coin, dialogues in all styles, and echoes.

Only prompts on the training side of the pair builder's own split come in, so that a held-out pair
of the persona data or of the demo was never seen by the base model either. Persona labels never
come in at all: every statement is answered Yes or No by a coin, anew in each epoch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from agentpref.config import UpdateConfig
from agentpref.prefer.examples import is_held_out
from benchmarks.persona import FOLDER as PERSONA
from benchmarks.persona import QUESTION
from benchmarks.tiny_model import dialogues, words

SYSTEMS = (
    "You are a helpful assistant.",
    "You are an assistant. Answer truthfully.",
    "Today is {day}. You are a helpful assistant.",
)
SHARE = UpdateConfig().held_out

# {"messages": […], "tools": […] or None, "read": whether the user's words are learned, too}
Conversation = dict[str, Any]


def statements() -> list[str]:
    """Every persona statement whose question is on the training side, in file order."""
    lines = (line for file in sorted(PERSONA.glob("*.jsonl")) for line in file.open())
    rows = [json.loads(line)["statement"] for line in lines]
    return [row for row in rows if not is_held_out(ask(QUESTION.format(row)), SHARE)]


def ask(text: str) -> list[dict[str, Any]]:
    """A conversation that has only the user's first message."""
    return [{"role": "user", "content": text}]


def epoch(rng: random.Random, spoken: list[str], n_dialogues: int) -> list[Conversation]:
    """One shuffled pass: each statement once, new dialogues, and half as many echoes."""
    rows = [statement(rng, text) for text in spoken]
    rows.extend(islice(draw(rng), n_dialogues))
    rows.extend(echo(rng) for _ in range(n_dialogues // 2))
    rng.shuffle(rows)
    return rows


def statement(rng: random.Random, text: str) -> Conversation:
    """A statement, answered by a coin; what there is to learn is the statement."""
    answer = {"role": "assistant", "content": rng.choice(["Yes", "No"])}
    messages = [*greet(rng), *ask(QUESTION.format(text)), answer]
    return {"messages": messages, "tools": None, "read": True}


def echo(rng: random.Random) -> Conversation:
    """Words to say again, which teaches to copy sooner than dialogues do."""
    said = ", ".join(rng.sample(words.EVERY, rng.randint(3, 9)))
    messages = [*ask(f"Say: {said}"), {"role": "assistant", "content": said}]
    return {"messages": messages, "tools": None, "read": False}


def draw(rng: random.Random) -> Iterator[Conversation]:
    """Dialogues without end, on the training side, in every style alike."""
    while True:
        request = dialogues.draw_request(rng)
        if is_held_out(ask(request.text), SHARE):
            continue
        style = rng.choice(dialogues.STYLES)
        offered = [dialogues.tool_schema(request)] if rng.random() < 0.15 else None
        messages = [*greet(rng), *turns(rng, request, style)]
        yield {"messages": messages, "tools": offered, "read": False}


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
    text = rng.choice(SYSTEMS).format(day=rng.choice(words.DAYS))
    return [{"role": "system", "content": text}]
