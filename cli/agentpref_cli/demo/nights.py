"""What is asked in each night of the demo, and which answer its users like better.

Reads the questions and labels that ship beside it (``data/README.md`` says whose they are). Which
questions prove and which train is the log's own split, asked here only to make sure that there are
enough of both. Knows nothing of models and of how feedback is given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources

from agentpref.config import UpdateConfig
from agentpref.prefer.split import is_held_out

_PROVING = 180
_STATEMENT = 'Is the following statement something you would say?\n"{}"'


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, the answer they would like, and one that they would not."""

    text: str
    liked: str
    disliked: str

    @property
    def proves(self) -> bool:
        """Whether the log will hold this question out."""
        return is_held_out([{"role": "user", "content": self.text}], UpdateConfig().held_out)


@dataclass(frozen=True, slots=True)
class Night:
    """A day's questions by one kind of user; ``tag`` names the stratum they are filed under."""

    tag: str
    title: str
    questions: tuple[Question, ...]


def three_nights(seed: int) -> tuple[Night, Night, Night]:
    """Two traits and a style."""
    return (
        _night("conscientiousness", "users who value care and order", 260, seed),
        _night("risk-seeking", "users who love risk", 380, seed),
        _night("style", "users who find the answers too long", 160, seed),
    )


def spoiled_night(seed: int) -> Night:
    """A trait whose labels were shuffled: what a broken client or a spammer would send."""
    night = _night("interest-in-music", "labels shuffled by a broken client", 80, seed)
    rng = random.Random(seed)
    return replace(
        night, questions=tuple(_swap(q) if rng.random() < 0.5 else q for q in night.questions)
    )


def _night(tag: str, title: str, train: int, seed: int) -> Night:
    """Held-out questions of a file, up to a bound, and ``train`` others, in the seed's order."""
    questions = list(_read(tag))
    random.Random(seed).shuffle(questions)
    proving = [q for q in questions if q.proves][:_PROVING]
    training = [q for q in questions if not q.proves][:train]
    mixed = proving + training
    random.Random(seed).shuffle(mixed)
    return Night(tag, title, tuple(mixed))


def _read(tag: str) -> Iterator[Question]:
    file = resources.files("agentpref_cli.demo") / "data" / f"{tag}.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "statement" in row:
            other = {"Yes": "No", "No": "Yes"}[row["answer"]]
            yield Question(_STATEMENT.format(row["statement"]), row["answer"], other)
        else:
            yield Question(row["text"], row["liked"], row["disliked"])


def _swap(question: Question) -> Question:
    return replace(question, liked=question.disliked, disliked=question.liked)
