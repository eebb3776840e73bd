"""What is asked of a model beside the preferences: ordinary requests, facts, general text.

The bundled model speaks the grammar of ``benchmarks/tiny_model/dialogues.py`` and nothing else, so
its capability is an ordinary request answered in good form. A real model is asked short factual
questions (``data/facts.json``), and the questions of *QA-Feedback* (``data/qa_questions.json``).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agentpref.models.base import BUNDLED
from agentpref.models.tool_calls import assistant_message
from agentpref.prefer.examples import is_held_out
from agentpref.types import Message
from benchmarks.streams.items import SHARE, asked
from benchmarks.streams.rules import BULLETS, CALLS, DIRECT, SHORTER, Rule
from benchmarks.tiny_model import dialogues
from benchmarks.tiny_model.dialogues import Request

PROBES, ORDINARY, GENERAL = 96, 100, 80
_DATA = Path(__file__).parents[1] / "data"
_RESERVED = 80
_SKY = "sunny|rainy|cloudy|windy|cold|mild"


class Probe(NamedTuple):
    """A request, and whether an answer to it is a good one."""

    messages: tuple[Message, ...]
    is_good: Callable[[str], bool]


class Style(NamedTuple):
    """How one user likes answers. ``hint`` asks a real model for an answer of that kind."""

    user: str
    rule: Rule
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model's world.

    ``questions`` are those whose answers are judged by style; ``styles`` has a night each.
    ``general`` are questions with answers whose perplexity is measured; ``ordinary(seed)`` gives
    requests that nobody judges.
    """

    questions: tuple[str, ...]
    styles: tuple[Style, ...]
    samples: int
    max_tokens: int
    probes: tuple[Probe, ...]
    general: tuple[tuple[str, str], ...]
    ordinary: Callable[[str], Iterator[str]]


def subject_of(model: str) -> Subject:
    """The world of a model, by the name that an update takes."""
    return _bundled() if model == BUNDLED else _real()


def _bundled() -> Subject:
    probes = list(distinct(requests("probes"), PROBES, held_out=True))
    taken = {request.text for request in probes}
    questions = [r.text for r in distinct(requests("styles"), 800) if r.text not in taken]
    taken |= set(questions)
    general = [r for r in distinct(requests("general"), 3 * GENERAL) if r.text not in taken]
    taken |= {request.text for request in general}
    rng = random.Random("general")

    def ordinary(seed: str) -> Iterator[str]:
        return (r.text for r in requests(f"ordinary {seed}") if r.text not in taken)

    return Subject(
        questions=tuple(questions),
        styles=(
            Style("anna", SHORTER),
            Style("ben", CALLS),
            Style("carla", DIRECT),
            Style("anna", SHORTER),
        ),
        samples=4,
        max_tokens=64,
        probes=tuple(Probe(asked(request.text), good_form(request)) for request in probes),
        general=tuple(
            (request.text, dialogues.answer(request, rng.choice(dialogues.STYLES)))
            for request in general[:GENERAL]
        ),
        ordinary=ordinary,
    )


def _real() -> Subject:
    facts = json.loads((_DATA / "facts.json").read_text(encoding="utf-8"))
    rows = json.loads((_DATA / "qa_questions.json").read_text(encoding="utf-8"))
    kept, rest = rows[:_RESERVED], rows[_RESERVED:]

    def ordinary(seed: str) -> Iterator[str]:
        half = [row["question"] for row in kept[_RESERVED // 2 :]]
        return iter(random.Random(seed).sample(half, len(half)))

    return Subject(
        questions=tuple(row["question"] for row in rest),
        styles=(
            Style("anna", SHORTER, "Answer in one short sentence."),
            Style("ben", BULLETS, "Answer with a list of three bullet points."),
            Style("carla", DIRECT, "Begin your answer with: Sure, I'd be happy to help!"),
            Style("anna", SHORTER, "Answer in one short sentence."),
        ),
        samples=2,
        max_tokens=96,
        probes=tuple(Probe(asked(q), names_one_of(answers)) for q, answers in facts),
        general=tuple((row["question"], row["gold"]) for row in kept[: _RESERVED // 2]),
        ordinary=ordinary,
    )


def requests(seed: str) -> Iterator[Request]:
    """Requests of the grammar without end."""
    rng = random.Random(seed)
    while True:
        yield dialogues.draw_request(rng)


def distinct(drawn: Iterator[Request], number: int, *, held_out: bool = False) -> list[Request]:
    """So many different requests; only of the side that proves, if asked for."""
    found: dict[str, Request] = {}
    while len(found) < number:
        request = next(drawn)
        if not held_out or is_held_out(asked(request.text), SHARE):
            found[request.text] = request
    return list(found.values())


def good_form(request: Request) -> Callable[[str], bool]:
    """Whether an answer to a request of the grammar has the form of one, whatever it names.

    Any words may stand where the request's own stand: how well a model copies is not asked here.
    """
    values = sorted(map(re.escape, request.arguments.values()), key=len, reverse=True)
    words = re.compile("|".join([*values, rf"\b(?:{_SKY})\b"]))
    forms = []
    for style in dialogues.STYLES:
        if style == "tool_call":
            continue
        answer = dialogues.answer(request, style)
        parts = words.split(answer)
        forms.append(re.compile(r"[\w': ]{1,30}?".join(map(re.escape, parts))))

    def is_good(text: str) -> bool:
        calls = assistant_message(text).get("tool_calls") or []
        if calls:
            return len(calls) == 1 and calls[0]["function"]["name"] == request.tool
        return any(form.fullmatch(text.strip()) for form in forms)

    return is_good


def names_one_of(answers: list[str]) -> Callable[[str], bool]:
    """Whether a text has one of the answers in it, as whole words."""
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, answers))})(?!\w)", re.IGNORECASE)
    return lambda text: pattern.search(text) is not None
