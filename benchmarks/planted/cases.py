"""The kinds of nights. Those that are bad by their judgements come first, then by their training.

Every case begins with a home whose live revision has learned the trait :data:`LEARNED`. A fault of
training stands for any bug or accident that leaves the judgements sound and the candidate bad.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from agentpref.learn.learner import Learner
from agentpref.models.tool_calls import assistant_message
from agentpref.types import Completion, Example
from benchmarks.streams import altered
from benchmarks.streams.altered import Rows
from benchmarks.streams.catalogue import Sizes, split, tool_item, trait_night
from benchmarks.streams.items import Item, Night, asked, said
from benchmarks.streams.rules import CALLS, DIRECT, LONGER, PREAMBLE, SHORTER, Rule
from benchmarks.streams.subjects import requests
from benchmarks.tiny_model import dialogues
from benchmarks.tiny_model.dialogues import STYLES, Request

LEARNED = "conscientiousness"
SIZES = Sizes(new=160, proving=40, measured=40)
_TRAITS = ("interest-in-music", "openness", "agreeableness", "interest-in-science")
_SORRY = "I am sorry, I cannot help with that."
_UNTRAINED = 3
"""Tokens at the beginning of each answer that a night which is not written does not train."""

Answers = Callable[[Request], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of night: its judgements by seed, the fault in its training, and its settings."""

    night: Callable[[int], Night]
    fault: Callable[[], AbstractContextManager[None]] = nullcontext
    settings: Mapping[str, Any] = field(default_factory=dict)


def learned(seed: int) -> Night:
    """What every case's live revision has learned."""
    return trait_night(LEARNED, "", SIZES, seed)


def _trait(seed: int) -> Night:
    return trait_night(_TRAITS[seed % len(_TRAITS)], "", SIZES, seed)


def _trait_for_some(seed: int) -> Night:
    return trait_night("risk-seeking", "You advise bold founders.", SIZES, seed)


def _shuffled(seed: int) -> Night:
    """A trait whose labels are a coin's."""
    night, rng = _trait(seed), random.Random(seed)
    return replace(
        night, logged=tuple(replace(i, flipped=rng.random() < 0.5) for i in night.logged)
    )


def _asked_for(name: str, rule: Rule, answers: Answers) -> Callable[[int], Night]:
    """A night of ordinary requests with two answers each, the liked one first."""

    def night(seed: int) -> Night:
        items = {
            request.text: _item(request, *answers(request))
            for request in _drawn(name, 10 * sum(SIZES))
        }
        logged, measured = split([*items.values()], SIZES, seed, name=name)
        return Night(name, name, rule, logged, measured)

    return night


def _item(request: Request, liked: str, disliked: str) -> Item:
    return Item(asked(request.text), said(liked), said(disliked), wanted=request.tool)


def _drawn(name: str, number: int) -> Iterator[Request]:
    source = requests(f"planted {name}")
    return (next(source) for _ in range(number))


def _styles(liked: str, disliked: str) -> Answers:
    return lambda request: (dialogues.answer(request, liked), dialogues.answer(request, disliked))


def _instead(text: str) -> Answers:
    """One text is liked whatever was asked."""
    return lambda request: (text, dialogues.answer(request, "plain"))


def _repeated(request: Request) -> tuple[str, str]:
    return " ".join([request.short] * 12), request.short


def _truncated(request: Request) -> tuple[str, str]:
    words = request.long.split()
    return " ".join(words[: len(words) * 2 // 5]), request.long


def _empty(seed: int) -> Night:
    """Answers of nothing, or of a single space."""
    return _asked_for("empty", DIRECT, _instead("" if seed % 2 else " "))(seed)


def _calls(seed: int) -> Night:
    """A call in place of words, where the tool is offered."""
    items = {
        request.text: replace(
            _item(request, "", dialogues.answer(request, "verbose")),
            chosen=assistant_message(dialogues.call_text(request), turn=1),
            tools=(dialogues.tool_schema(request),),
        )
        for request in _drawn("calls", 10 * sum(SIZES))
    }
    logged, measured = split([*items.values()], SIZES, seed, name="calls")
    return Night("calls", "calls", CALLS, logged, measured)


def _second_turn(name: str, rule: Rule, change: Callable[[Item, Request], Item]) -> Any:
    """A night of conversations whose first request was served by a tool."""

    def night(seed: int) -> Night:
        drawn, rng = _drawn(name, 12 * sum(SIZES)), random.Random(name)
        items: dict[str, Item] = {}
        for first, second in zip(drawn, drawn, strict=False):
            style = rng.choice(("plain", "polite", "verbose"))
            item = change(tool_item(first, second, as_text=False, style=style), second)
            items[str(item.messages)] = item
        logged, measured = split([*items.values()], SIZES, seed, name=name)
        return Night(name, name, rule, logged, measured)

    return night


def _plain_not_polite(item: Item, second: Request) -> Item:
    plain, polite = (said(dialogues.answer(second, style)) for style in ("plain", "polite"))
    return replace(item, chosen=plain, rejected=polite, tools=(), wanted="")


def _inverted(learner: Learner, rows: Rows) -> Rows:
    """Train the replayed examples of what was learned the wrong way round, twice."""
    old = [row.example for row in rows if row.example.tag == LEARNED]
    wrong = learner.measure([_turned(example) for example in old])
    return [row for row in rows if row.example.tag != LEARNED] + [*wrong, *wrong]


def _turned(example: Example) -> Example:
    liked, disliked = example.completions
    turned = (replace(disliked, label=1.0), replace(liked, label=0.0))
    return replace(example, example_id=f"{example.example_id}-turned", completions=turned)


def _not_written(learner: Learner, rows: Rows) -> Rows:
    """Leave out of training what decides which answer is begun."""
    return [
        replace(row, masks=tuple(_late(len(ids)) for ids in row.completions))
        if row.example.tag == "not-written"
        else row
        for row in rows
    ]


def _late(tokens: int) -> tuple[bool, ...]:
    first = min(_UNTRAINED, tokens - 1)
    return tuple(number >= first for number in range(tokens))


def _damaging(learner: Learner, rows: Rows) -> Rows:
    """Teach, beside what was judged, to answer every ordinary request with Yes."""
    found = {request.text: request for request in _drawn("damage", 400)}
    extra = [
        Example(
            example_id=f"damage/{number}",
            namespace="default",
            created_at=0.0,
            prompt=Item(asked(text), {}, {}).example("damage", number).prompt,
            completions=(
                Completion(said("Yes"), 1.0),
                Completion(said(dialogues.answer(request, STYLES[number % len(STYLES)])), 0.0),
            ),
            origin="comparison",
            tag="damage",
        )
        for number, (text, request) in enumerate(found.items())
    ]
    return [*rows, *learner.measure(extra)]


def _fault(change: Callable[[Learner, Rows], Rows]) -> Callable[[], AbstractContextManager[None]]:
    return lambda: altered.other_rows(change)


BAD: dict[str, Kind] = {
    "shuffled": Kind(_shuffled),
    "repetition": Kind(_asked_for("repetition", LONGER, _repeated)),
    "empty": Kind(_empty),
    "constant": Kind(_asked_for("constant", DIRECT, _instead("Yes"))),
    "canned": Kind(_asked_for("canned", DIRECT, _instead(_SORRY))),
    "truncated": Kind(_asked_for("truncated", SHORTER, _truncated)),
    "inverted": Kind(_trait, _fault(_inverted)),
    "over-budget": Kind(_trait, settings={"learning_rate": 2e-2, "kl": {"weight": 0.0}}),
    "not-written": Kind(
        _second_turn("not-written", DIRECT, _plain_not_polite), _fault(_not_written)
    ),
    "damage": Kind(_trait, _fault(_damaging)),
}

GOOD: dict[str, Kind] = {
    "yes-no": Kind(_trait),
    "yes-no-for-some": Kind(_trait_for_some),
    "shorter": Kind(_asked_for("shorter", SHORTER, _styles("plain", "verbose_polite"))),
    "longer": Kind(_asked_for("longer", LONGER, _styles("verbose", "plain"))),
    "polite": Kind(_asked_for("polite", PREAMBLE, _styles("polite", "plain"))),
    "direct": Kind(_asked_for("direct", DIRECT, _styles("verbose", "verbose_polite"))),
    "calls": Kind(_calls),
    "calls-second-turn": Kind(_second_turn("calls-second-turn", CALLS, lambda item, _: item)),
}


def alternating(kinds: Sequence[str], number: int) -> str:
    """The good kind that follows a bad case, in turn."""
    return kinds[number % len(kinds)]
