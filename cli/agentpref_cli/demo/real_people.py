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
    answer beats an older one, as in "*shorter* than before". ``compare`` chooses two of a
    question's answers that they compare, the better one first; ``None`` if it has no such two.
    """

    tag: str
    title: str
    better: str
    score: Callable[[Answer], float]
    compare: Callable[[Sequence[Answer]], tuple[Answer, Answer] | None]

    def comparisons(self) -> Iterator[dict[str, Any]]:
        """One row of a preference file for each question that has two answers to compare."""
        for asked in questions(self.tag):
            if found := self.compare(asked.answers):
                better, worse = ([{"role": "assistant", "content": a.text}] for a in found)
                yield {"prompt": asked.messages, "chosen": better, "rejected": worse}

    def win_rate(self, before: Sequence[Answer], after: Sequence[Answer]) -> float:
        """The share of answers that became better, where equal ones count half."""
        pairs = [(self.score(old), self.score(new)) for old, new in zip(before, after, strict=True)]
        return sum((new > old) + (new == old) / 2 for old, new in pairs) / len(pairs)


def _brevity(answer: Answer) -> float:
    """Minus the words; an answer that was cut off is longer than any other."""
    return -answer.words if answer.whole else -_CUT


def _shortest_and_longest(answers: Sequence[Answer]) -> tuple[Answer, Answer] | None:
    best, worst = (pick(answers, key=_brevity) for pick in (max, min))
    return (best, worst) if _brevity(best) > _brevity(worst) else None


def _list_and_prose(answers: Sequence[Answer]) -> tuple[Answer, Answer] | None:
    """A whole list and the prose that is most like it in length: the first night was of length."""
    pairs = [(a, b) for a in answers for b in answers if a.is_list and a.whole and not b.is_list]
    return min(pairs, key=lambda pair: abs(pair[0].words - pair[1].words), default=None)


SHORTER = Preference(
    "facts", "people prefer the shorter of two answers", "shorter", _brevity, _shortest_and_longest
)
LISTS = Preference(
    "advice",
    "people who ask for advice like a list",
    "more like a list",
    lambda answer: answer.is_list,
    _list_and_prose,
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
