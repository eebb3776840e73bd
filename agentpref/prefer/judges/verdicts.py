"""What a judge is asked and what it says: the values that everything about judges is made of.

A *judge* compares two answers to one prompt: it is given prompts and completions, and returns a
verdict for each, as TRL's pairwise judges do. A judge is asked every question twice, with the
answers in both orders. What it says both times is its *opinion*; a verdict that follows the
position of an answer makes the opinion a tie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import orjson

from agentpref.record.messages import canonical
from agentpref.types import Message, Source, Winner

_SWAPPED: Mapping[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}


def swapped(winner: Winner) -> Winner:
    """The winner where the answers are in the other order.

    >>> swapped("a")
    'b'
    """
    return _SWAPPED[winner]


class Question(NamedTuple):
    """Which of two answers to a prompt is better? ``a`` is shown first."""

    prompt: tuple[Message, ...]
    a: Message
    b: Message

    def swap(self) -> Question:
        """The same question with the answers in the other order."""
        return Question(self.prompt, self.b, self.a)

    @property
    def digest(self) -> str:
        """The content address of the question, 32 hex digits; the order of the answers counts."""
        parts = (orjson.dumps([canonical(message).decode() for message in one]) for one in (
            self.prompt, (self.a,), (self.b,)
        ))  # fmt: skip
        return hashlib.blake2b(b"\n".join(parts), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of one question, about the answers as they were shown to it.

    ``confidence`` is the probability, from .5 to 1, that it would say so again, where it is known.
    ``principle`` names what of its rubric decided, and ``rationale`` has the judge's own words.
    ``prompt_tokens`` and ``completion_tokens`` are what it took to say it.
    """

    winner: Winner
    confidence: float | None = None
    principle: str | None = None
    rationale: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def swap(self) -> Verdict:
        """The verdict about the answers in the other order.

        >>> Verdict("a").swap().winner
        'b'
        """
        return replace(self, winner=swapped(self.winner))


@runtime_checkable
class Judge(Protocol):
    """Compares pairs of answers.

    A package offers one by a function in the entry-point group ``agentpref.judges``, which is given
    a :class:`~agentpref.prefer.judges.rubric.Rubric` and returns the judge. A judge may have an
    attribute ``source``: ``"code"`` for a rule that is right by definition and needs no
    calibration, else ``"model"``. One whose attribute ``controls`` is true can be steered by what
    it judges, and is asked control questions beside. ``judge`` may be called from several threads
    at once.
    """

    def judge(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[tuple[Message, Message]],
    ) -> Sequence[Verdict]:
        """Say of each pair of completions which is better for its prompt.

        Raises:
            JudgeError: it has no verdict to give.
        """


def source_of(judge: Judge) -> Source:
    """The kind of voter that a judge is."""
    source: Source = getattr(judge, "source", "model")
    return source


class Opinion(NamedTuple):
    """What a judge says of two answers after both orders, about ``a`` and ``b`` as they were given.

    ``follows`` is ``"first"`` or ``"second"`` where both verdicts name the answer in that place.
    ``steered`` says that the answer which they named wins beside the point, too, so that it does
    not win here: the other one does, or neither, if that steers as well.
    """

    winner: Winner
    follows: str | None
    as_given: Verdict
    swapped: Verdict
    steered: bool = False

    @property
    def confidence(self) -> float | None:
        """The lower confidence of the two verdicts; ``None`` if one has none."""
        both = (self.as_given.confidence, self.swapped.confidence)
        known = [one for one in both if one is not None]
        return min(known) if len(known) == len(both) else None


def opinion(as_given: Verdict, swapped: Verdict) -> Opinion:
    """Unite the verdicts on a question and on the same question swapped.

    >>> opinion(Verdict("a"), Verdict("b")).winner
    'a'
    >>> opinion(Verdict("a"), Verdict("a"))[:2]
    ('tie', 'first')

    Args:
        as_given: the verdict on the question.
        swapped: the verdict on its swap, about the answers as they were shown.
    """
    same = as_given.winner == swapped.swap().winner
    follows = None
    if not same and as_given.winner == swapped.winner:
        follows = "first" if as_given.winner == "a" else "second"
    return Opinion(as_given.winner if same else "tie", follows, as_given, swapped)


STEERED = "the answer speaks to its judge"
"""The principle of a verdict that a control question turned."""


def overruled(found: Opinion, winner: Winner) -> Opinion:
    """The opinion where the answer that won has steered its judge.

    >>> overruled(opinion(Verdict("a"), Verdict("b")), "b").winner
    'b'
    """
    as_given = replace(found.as_given, winner=winner, confidence=None, principle=STEERED)
    turned = replace(found.swapped, winner=swapped(winner), confidence=None, principle=STEERED)
    return Opinion(winner, None, as_given, turned, steered=True)
