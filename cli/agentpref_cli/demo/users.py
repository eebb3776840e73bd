"""The users of the demo: what they ask, which answer they like, and the feedback they give.

Questions and labels are read from the files in ``data/`` (``data/README.md`` names their sources).
Feedback goes through the public ``Log``, as in any app.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from typing import NamedTuple

import orjson

from agentpref import Log
from agentpref.prefer.examples import is_held_out
from agentpref.types import HELD_OUT

_HELD_OUT = 180
_STATEMENT = 'Is the following statement something you would say?\n"{}"'


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, an answer that they like, and one that they dislike."""

    text: str
    liked: str
    disliked: str

    @property
    def held_out(self) -> bool:
        """Whether an update holds this question out."""
        return is_held_out([{"role": "user", "content": self.text}], HELD_OUT)


class Reply(NamedTuple):
    """What the agent said, the run it was logged as, and the revision that wrote it."""

    run_id: str
    text: str
    revision: str


@dataclass(frozen=True, slots=True)
class Round:
    """The questions of one kind of user before one update; ``tag`` is the tag of their runs."""

    tag: str
    title: str
    questions: tuple[Question, ...]


def three_rounds(seed: int) -> tuple[Round, Round, Round]:
    """Two traits and a style."""
    return (
        _round("conscientiousness", "users who value care and order", 260, seed),
        _round("risk-seeking", "users who love risk", 380, seed),
        _round("style", "users who find the answers too long", 160, seed),
    )


def shuffled_round(seed: int) -> Round:
    """A trait with half of its labels flipped, as a broken client or a spammer would send them."""
    clean = _round("interest-in-music", "labels shuffled by a broken client", 80, seed)
    rng = random.Random(seed)
    flipped = (
        replace(q, liked=q.disliked, disliked=q.liked) if rng.random() < 0.5 else q
        for q in clean.questions
    )
    return replace(clean, questions=tuple(flipped))


def give_feedback(log: Log, tag: str, question: Question, reply: Reply, number: int) -> None:
    """Judge one reply, in turn by a correction, by a comparison with a draft, or by thumbs on both.

    A liked reply is put beside the draft that the data dislikes, any other reply beside the draft
    that the data likes. A correction needs no draft.
    """
    good = reply.text == question.liked
    if number % 3 == 0 and not good:
        log.correct(reply.run_id, question.liked, user_id=tag)
        return
    draft = log.record(
        [{"role": "user", "content": question.text}],
        question.disliked if good else question.liked,
        model="second draft",
        tags=[tag],
        user_id=tag,
    )
    if number % 3 == 1:
        log.compare(reply.run_id, draft, winner="a" if good else "b", user_id=tag)
        return
    log.feedback(reply.run_id, key="thumbs", score=good, user_id=tag)
    log.feedback(draft, key="thumbs", score=not good, user_id=tag)


def _round(tag: str, title: str, train: int, seed: int) -> Round:
    """Up to 180 held-out questions of a file and ``train`` others, in the seed's order."""
    questions = list(_read(tag))
    random.Random(seed).shuffle(questions)
    held_out = [q for q in questions if q.held_out][:_HELD_OUT]
    mixed = held_out + [q for q in questions if not q.held_out][:train]
    random.Random(seed).shuffle(mixed)
    return Round(tag, title, tuple(mixed))


def _read(tag: str) -> Iterator[Question]:
    file = resources.files("agentpref_cli.demo") / "data" / f"{tag}.jsonl"
    for row in map(orjson.loads, file.read_bytes().splitlines()):
        if "statement" in row:
            other = {"Yes": "No", "No": "Yes"}[row["answer"]]
            yield Question(_STATEMENT.format(row["statement"]), row["answer"], other)
        else:
            yield Question(row["text"], row["liked"], row["disliked"])
