"""The streams: which nights come in which order, and what people judge in each.

S1 traits that go together; S2 traits that contradict each other, told apart by the system message;
S3 styles of the model's own answers, *tagged* with the user in the prompt and *untagged*, where the
newest preference must win; S4 is S1 with labels flipped; S5 is S1 as lone thumbs; S6 agents that
should call a tool; S7 twenty nights of all these kinds, two of them with labels thrown by a coin.
The hash of a question decides its side; the seed chooses those that train.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from agentpref.models.tool_calls import assistant_message
from agentpref.types import Message, Tool
from benchmarks import persona
from benchmarks.streams.items import Item, Night, asked, said
from benchmarks.streams.rules import CALLS, SAYS
from benchmarks.streams.subjects import Style, Subject
from benchmarks.tiny_model import dialogues
from benchmarks.tiny_model.dialogues import Request

FLIPPED = 0.2

Samples = Mapping[str, Sequence[str]]
"""The model's own answers to each question, several of them."""


class Sizes(NamedTuple):
    """How many items of a night train, prove inside the product, and are measured by us."""

    new: int = 200
    proving: int = 50
    measured: int = 100


COMPATIBLE = (
    "conscientiousness",
    "interest-in-music",
    "agreeableness",
    "openness",
    "interest-in-science",
)
CONFLICTING = {
    "risk-averse": "You advise careful savers.",
    "risk-seeking": "You advise bold founders.",
    "subscribes-to-deontology": "You teach the ethics of duty.",
    "subscribes-to-utilitarianism": "You teach the ethics of the greatest good.",
}
COINS = ("has-strong-aesthetic-preferences", "optionality-preservation")
"""The traits of the nights on which a coin decides."""

_TOOLS = (
    (dialogues.reminder, dialogues.message),
    (dialogues.table, dialogues.weather),
    (dialogues.timer, dialogues.shopping),
    (dialogues.device, dialogues.music),
)
_TOOL_NIGHTS = ("reminders", "tables", "timers", "devices")


def _compatible(sizes: Sizes, seed: int) -> list[Night]:
    return [trait_night(trait, "", sizes, seed) for trait in COMPATIBLE]


def _conflicting(sizes: Sizes, seed: int) -> list[Night]:
    return [trait_night(trait, system, sizes, seed) for trait, system in CONFLICTING.items()]


def _flipped(sizes: Sizes, seed: int) -> list[Night]:
    return [_changed(night, seed, flip) for night in _compatible(sizes, seed)]


def _thumbs(sizes: Sizes, seed: int) -> list[Night]:
    return [_changed(night, seed, as_thumb) for night in _compatible(sizes, seed)]


def flip(item: Item, rng: random.Random) -> Item:
    """Turn a fifth of the labels round, as people do who click too fast."""
    return replace(item, flipped=rng.random() < FLIPPED)


def as_thumb(item: Item, rng: random.Random) -> Item:
    """The same label as a lone thumb on one of the two answers."""
    return replace(item, thumb="up" if rng.random() < 0.5 else "down")


def _changed(night: Night, seed: int, change: Callable[[Item, random.Random], Item]) -> Night:
    rng = random.Random(f"{night.name} {seed}")
    return replace(night, logged=tuple(change(item, rng) for item in night.logged))


def trait_night(trait: str, system: str, sizes: Sizes, seed: int) -> Night:
    """Yes/no statements of a trait."""
    items = [
        Item(asked(q.text, system), said(q.liked), said(q.disliked), wanted=q.liked)
        for q in persona.questions(trait)
    ]
    logged, measured = split(items, sizes, seed, name=trait)
    return Night(trait, trait, SAYS, logged, measured)


def split(
    items: Sequence[Item], sizes: Sizes, seed: int, *, name: str
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The items to log, mixed, and those to measure, which are the same for every seed.

    Raises:
        ValueError: there are fewer items than are asked for.
    """
    sides = sides_of(items)
    if any(have < ask for have, ask in zip(map(len, sides), sizes, strict=True)):
        raise ValueError(
            f"{name} has {', '.join(str(len(side)) for side in sides)} items to train, prove and "
            f"measure, but {', '.join(map(str, sizes))} are asked for: ask for fewer"
        )
    training, proving, apart = sides
    measured = random.Random(name).sample(apart, sizes.measured)
    rng = random.Random(seed)
    logged = [*rng.sample(training, sizes.new), *rng.sample(proving, sizes.proving)]
    return tuple(rng.sample(logged, len(logged))), tuple(measured)


def sides_of(items: Sequence[Item]) -> tuple[list[Item], list[Item], list[Item]]:
    """The items that may train, prove, and be measured.

    A hash of the question decides, so that what one night measures no other night logs. Of what is
    held out, a third may be logged.
    """
    sides: tuple[list[Item], list[Item], list[Item]] = ([], [], [])
    for item in items:
        asked_for = [message for message in item.messages if message["role"] != "system"]
        digest = hashlib.blake2b(json.dumps(asked_for).encode(), digest_size=8).digest()
        proves = 1 if int.from_bytes(digest, "big") % 3 == 0 else 2
        sides[proves if item.held_out else 0].append(item)
    return sides


def style_nights(
    subject: Subject, samples: Samples, sizes: Sizes, seed: int, *, tagged: bool
) -> list[Night]:
    """One style a night, on pairs of the model's own answers that the style's rule tells apart.

    A real model has few questions, so a night takes as many as there are.
    """
    nights = []
    for number, style in enumerate(subject.styles, 1):
        name = f"{number} {style.rule.name}"
        items = list(_style_items(style, subject.questions, samples, tagged=tagged, name=name))
        logged, measured = split(items, _fitting(items, sizes), seed, name=name)
        nights.append(Night(name, style.user if tagged else "style", style.rule, logged, measured))
    return nights


def _fitting(items: Sequence[Item], sizes: Sizes) -> Sizes:
    """The sizes, or as many as there are."""
    return Sizes(*map(min, sizes, map(len, sides_of(items))))


def _style_items(
    style: Style, questions: Sequence[str], samples: Samples, *, tagged: bool, name: str
) -> Iterator[Item]:
    system = f"The user is {style.user}." if tagged else ""
    for question in questions:
        texts = [*samples[question]]
        random.Random(f"{name} {question}").shuffle(texts)
        for one, other in itertools.combinations(texts, 2):
            scores = style.rule.score(one, ""), style.rule.score(other, "")
            if scores[0] != scores[1]:
                liked, disliked = (one, other) if scores[0] > scores[1] else (other, one)
                yield Item(asked(question, system), said(liked), said(disliked))
                break


def tool_nights(sizes: Sizes, seed: int, *, as_text: bool) -> list[Night]:
    """Second requests of a conversation, for which the right tool should be called, not described.

    ``as_text``: for models whose template knows no tools; a call is then text like any other.
    """
    nights = []
    for name, kinds in zip(_TOOL_NIGHTS, _TOOLS, strict=True):
        rng = random.Random(f"tools {name}")
        wanted = sizes.new + 3 * (sizes.proving + sizes.measured)
        found: dict[str, Item] = {}
        for _ in range(30 * wanted):
            requests = rng.choice(kinds)(rng), rng.choice(kinds)(rng)
            item = tool_item(*requests, as_text=as_text, style=rng.choice(dialogues.STYLES[:-1]))
            found.setdefault(str(item.messages), item)
        logged, measured = split([*found.values()], sizes, seed, name=name)
        nights.append(Night(name, name, CALLS, logged, measured))
    return nights


def tool_item(first: Request, second: Request, *, as_text: bool, style: str) -> Item:
    """A conversation whose first request was served by a tool, and the answers to the second."""
    offered = {request.tool: dialogues.tool_schema(request) for request in (first, second)}
    tools: tuple[Tool, ...] = tuple(offered.values())
    call = dialogues.call_text(first)
    turns: list[Message]
    if as_text:
        system = f"Tools: {', '.join(offered)}"
        turns = [*asked(first.text, system), said(call), *asked("done"), said(first.short)]
        chosen: Message = said(dialogues.call_text(second))
        tools = ()
    else:
        made = assistant_message(call, turn=1)
        result = {"role": "tool", "content": "done", "tool_call_id": made["tool_calls"][0]["id"]}
        turns = [*asked(first.text), made, result, said(first.short)]
        chosen = assistant_message(dialogues.call_text(second), turn=5)
    return Item(
        (*turns, *asked(second.text)),
        chosen,
        said(dialogues.answer(second, style)),
        wanted=second.tool,
        tools=tools,
    )


def twenty_nights(
    subject: Subject, samples: Samples, sizes: Sizes, seed: int, *, bundled: bool
) -> list[Night]:
    """Traits, tools and styles in turn, with a coin's labels in the 8th and the 15th night."""
    kinds = (
        [*_compatible(sizes, seed), trait_night("interest-in-art", "", sizes, seed)],
        _conflicting(sizes, seed),
        tool_nights(sizes, seed, as_text=not bundled),
        style_nights(subject, samples, sizes, seed, tagged=True),
    )
    nights = [night for some in itertools.zip_longest(*kinds) for night in some if night]
    for place, trait in zip((7, 14), COINS, strict=True):
        nights.insert(place, _changed(trait_night(trait, "", sizes, seed), seed, toss))
    return nights


def toss(item: Item, rng: random.Random) -> Item:
    """Let a coin decide on the label."""
    return replace(item, flipped=rng.random() < 0.5)


STREAMS = ("S1", "S2", "S3-tagged", "S3-untagged", "S4", "S5", "S6", "S7")
ORDERS = ("forward", "reverse")


def nights_of(
    stream: str,
    subject: Subject,
    samples: Callable[[], Samples],
    *,
    bundled: bool,
    sizes: Sizes,
    seed: int,
    order: str,
) -> list[Night]:
    """The nights of a stream, in their order. Only S3 asks for the model's own ``samples``."""
    plain = {"S1": _compatible, "S2": _conflicting, "S4": _flipped, "S5": _thumbs}
    if stream in plain:
        nights = plain[stream](sizes, seed)
    elif stream == "S6":
        nights = tool_nights(sizes, seed, as_text=not bundled)
    elif stream == "S7":
        nights = twenty_nights(subject, samples(), sizes, seed, bundled=bundled)
    else:
        tagged = stream == "S3-tagged"
        nights = style_nights(subject, samples(), sizes, seed, tagged=tagged)
    return nights if order == "forward" else nights[::-1]
