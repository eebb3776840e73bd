"""The people of the demo on a real model: what they asked, and which answers they prefer.

``data/smollm2.jsonl.gz`` has everyday questions with two answers each that SmolLM2-135M-Instruct
wrote itself (``python -m benchmarks.real_answers``). Which of two is preferred follows a rule that
anybody can check by eye. Questions whose answers the rule ranks alike make no comparison.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import orjson

from agentpref.prefer.examples import is_held_out
from agentpref.types import Message

_CUT = 1e6
"""More words than any answer has."""

_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote; ``whole`` is false where it was cut off at the limit of tokens."""

    text: str
    whole: bool = True

    @property
    def words(self) -> int:
        """How many words it has."""
        return len(self.text.split())

    @property
    def is_list(self) -> bool:
        """Whether it has two or more items, each on a line of its own."""
        return len(_ITEM.findall(self.text)) >= 2


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the answers that people compare."""

    question: str
    answers: tuple[Answer, ...]

    @property
    def messages(self) -> tuple[Message, ...]:
        """The question as a conversation."""
        return ({"role": "user", "content": self.question},)

    def is_held_out(self, share: float) -> bool:
        """Whether an update holds the question out, and so never trains on it."""
        return is_held_out(self.messages, share)


@dataclass(frozen=True, slots=True)
class Preference:
    """What the people of one night prefer: of two answers the one with the larger ``score``.

    ``tag`` is that of their questions; ``title`` says what they like; ``better`` is how a newer
    answer beats an older one, as in "*shorter* than before".
    """

    tag: str
    title: str
    better: str
    score: Callable[[Answer], float]

    def comparisons(self) -> Iterator[dict[str, Any]]:
        """One row of a preference file for each question, unless all its answers are alike."""
        for asked in questions(self.tag):
            best, worst = (pick(asked.answers, key=self.score) for pick in (max, min))
            if self.score(best) > self.score(worst):
                yield {
                    "prompt": asked.messages,
                    "chosen": [{"role": "assistant", "content": best.text}],
                    "rejected": [{"role": "assistant", "content": worst.text}],
                }

    def win_rate(self, before: Sequence[Answer], after: Sequence[Answer]) -> float:
        """The share of answers that became better, where equal ones count half."""
        pairs = [(self.score(old), self.score(new)) for old, new in zip(before, after, strict=True)]
        return sum((new > old) + (new == old) / 2 for old, new in pairs) / len(pairs)


def _brevity(answer: Answer) -> float:
    """Minus the words; an answer that was cut off is longer than any other."""
    return -answer.words if answer.whole else -_CUT


def _short_list(answer: Answer) -> float:
    """Minus the words of a list; prose is longer than any list, and what was cut off is worst."""
    if not answer.whole:
        return -2 * _CUT
    return -answer.words if answer.is_list else -_CUT - answer.words


SHORTER = Preference("facts", "people prefer the shorter of two answers", "shorter", _brevity)
LISTS = Preference(
    "advice",
    "people who ask for advice like a short list",
    "a list, or a shorter one,",
    _short_list,
)


def questions(tag: str) -> list[Asked]:
    """The questions of a tag, in the order of the file."""
    file = resources.files("agentpref_cli.demo") / "data" / "smollm2.jsonl.gz"
    rows = map(orjson.loads, gzip.decompress(file.read_bytes()).splitlines())
    return [
        Asked(row["question"], tuple(Answer(a["text"], a["whole"]) for a in row["answers"]))
        for row in rows
        if row["tag"] == tag
    ]
