"""Rules that score what a model wrote, without any model: each gives a number, larger for better.

An *absolute* rule gives 0 or 1, and the behaviour of a revision is its mean. Any other rule ranks:
the behaviour is then how often the answer beats the base model's answer to the same question, with
½ for a draw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentpref.models.tool_calls import assistant_message
from agentpref.types import Message

_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_PREAMBLE = re.compile(
    r"\s*(?:certainly|sure|of course|absolutely|great question|happy to|i(?:'d| would) be (?:happy|"
    r"glad)|i(?:'m| am) (?:happy|glad)|thank you for|here (?:is|are)|as an ai)\b",
    re.IGNORECASE,
)
_FOLD = 1e9


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule by its name. ``score`` takes an answer's text and what the item wants."""

    name: str
    score: Callable[[str, str], float]
    absolute: bool = True

    def behaviour(
        self, answers: Sequence[str], wanted: Sequence[str], base: Sequence[str]
    ) -> float:
        """How well a revision behaves, from 0 to 1; ``base`` are the base model's answers."""
        own = [self.score(*each) for each in zip(answers, wanted, strict=True)]
        if self.absolute:
            return sum(own) / len(own)
        others = [self.score(*each) for each in zip(base, wanted, strict=True)]
        wins = (0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(own, others, strict=True))
        return sum(wins) / len(own)


def _says(text: str, wanted: str) -> float:
    return float(text.strip().rstrip(".").casefold() == wanted.casefold())


def _shorter(text: str, wanted: str) -> float:
    """Minus the words; an empty answer is the worst of all."""
    words = len(text.split())
    return -float(words) if words else -_FOLD


def _longer(text: str, wanted: str) -> float:
    """The different words, so that nothing is won by saying the same again."""
    return float(len(set(text.split())))


def _bullets(text: str, wanted: str) -> float:
    return float(len(_BULLET.findall(text)) >= 2)


def _preamble(text: str, wanted: str) -> float:
    return float(_PREAMBLE.match(text) is not None)


def _direct(text: str, wanted: str) -> float:
    return float(bool(text.strip()) and _PREAMBLE.match(text) is None)


def _calls(text: str, wanted: str) -> float:
    """Whether the answer is one valid call, and to the tool ``wanted`` (any one where empty)."""
    calls = assistant_message(text).get("tool_calls") or []
    if len(calls) != 1:
        return 0.0
    return float(not wanted or calls[0]["function"]["name"] == wanted)


SAYS = Rule("says the wanted word", _says)
SHORTER = Rule("shorter than the base", _shorter, absolute=False)
LONGER = Rule("longer than the base", _longer, absolute=False)
BULLETS = Rule("a bullet list", _bullets)
PREAMBLE = Rule("a preamble", _preamble)
DIRECT = Rule("no preamble", _direct)
CALLS = Rule("a valid call", _calls)


def text_of(message: Message) -> str:
    """A message as the text that the model writes for it, with its calls in Hermes form."""
    calls = [
        {
            "name": call["function"]["name"],
            "arguments": _object(call["function"]["arguments"]),
        }
        for call in message.get("tool_calls") or []
    ]
    blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
    return "\n".join([*filter(None, [str(message.get("content") or "")]), *blocks])


def _object(arguments: object) -> object:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
