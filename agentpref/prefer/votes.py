"""Settles what people and judges said about one question.

A *vote* is one side of one question, taken by somebody at some time. Two rules settle a question.
The newest vote of each voter counts and supersedes the voter's older ones. Between voters, the
stronger kind of signal wins; among equally strong signals, the number of voters does.

A question and its sides are any values that can be compared. Every row of feedback that has no
effect is returned with the reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from agentpref.types import Origin, Source

STRENGTH: tuple[Origin, ...] = (
    "correction", "comparison", "thumbs", "comment", "critique", "judge"
)  # fmt: skip
"""The kinds of signal, strongest first."""

Voter: TypeAlias = "tuple[Source, str | None]"
"""Who voted. All rows of one source that name no user count as one voter."""

Reason = Literal[
    "uncalibrated_judge",  # a model's, and nobody knows how right it is about this tag
    "unknown_run",  # the row names a run that is not in this namespace
    "incomplete_answer",  # the answer broke off, or one of the two
    "incomplete_prompt",  # the log has not seen the beginning of the conversation
    "different_prompts",  # the two compared runs answer different prompts
    "identical_answers",  # both answers are the same message
    "judge_flipped",  # the judge changed its verdict when the order was swapped
    "no_score",  # words or values only: a comment, say
    "undeclared_key",  # a score under a key that nobody declared to be a preference
    "unknown_scale",  # the score is on no scale that is known
    "neutral_score",  # exactly in the middle of its scale
    "tie",  # judged equally good
    "superseded",  # the same voter said otherwise later
    "retracted",  # the same voter took it back later
    "retraction",  # takes back other rows, which are counted as retracted
    "nothing_to_retract",  # takes something back that the voter had not said
    "outvoted",  # a stronger signal, or more voters, said otherwise
    "contradicted",  # as many voters said the opposite
    "over_limit",  # the prompt already has its share of thumbs pairs
    "repeated",  # the same lone answer was judged the same way before
]
"""Why a row of feedback or a comparison made no example."""

LeftOut: TypeAlias = "tuple[str, Reason]"
"""The id of a row, and why it was left out."""

S = TypeVar("S")
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Vote(Generic[S]):
    """One side taken on one question; ``side`` is ``None`` for a tie or a neutral score.

    ``rows`` are the ids of the feedback and comparisons that say so, ``created_at`` is the time of
    the newest of them, ``noise`` the probability ε that it is wrong, and ``subject`` is what the
    caller gets back when this side wins.
    """

    rows: tuple[str, ...]
    created_at: float
    voters: frozenset[Voter]
    question: Hashable
    side: Hashable | None
    origin: Origin
    subject: S
    noise: float = 0.05

    def left_out(self, reason: Reason) -> list[LeftOut]:
        """Every row of this vote, with one reason."""
        return [(row, reason) for row in self.rows]


def separate(
    readings: Iterable[tuple[str, Vote[S] | Reason]],
) -> tuple[list[Vote[S]], list[LeftOut]]:
    """Separate the rows that were read as a vote from those that gave only a reason."""
    read = list(readings)
    votes = [reading for _, reading in read if isinstance(reading, Vote)]
    return votes, [(row, reading) for row, reading in read if not isinstance(reading, Vote)]


def settle(
    votes: Iterable[Vote[S]], undecided: Reason = "tie"
) -> tuple[list[list[Vote[S]]], list[LeftOut]]:
    """Decide every question.

    Returns the agreeing votes that won each question, sorted by time and then id, and the rows
    that lost. ``undecided`` is why a vote without a side is left out. The order of the input does
    not matter.
    """
    ordered = sorted(votes, key=lambda vote: (vote.created_at, vote.rows))
    newest = {(vote.voters, vote.question): vote.side for vote in ordered}
    counted: list[Vote[S]] = []
    left: list[LeftOut] = []
    for vote in ordered:
        if newest[vote.voters, vote.question] == vote.side:
            counted.append(vote)
        else:
            left += vote.left_out("superseded")
    won: list[list[Vote[S]]] = []
    for same_question in grouped(counted, lambda vote: vote.question).values():
        sides = grouped(same_question, lambda vote: vote.side)
        left += [row for vote in sides.pop(None, []) for row in vote.left_out(undecided)]
        ranked = sorted(sides.values(), key=_support, reverse=True)
        reason: Reason = "outvoted"
        if len(ranked) > 1 and _support(ranked[0]) == _support(ranked[1]):
            reason = "contradicted"
        elif ranked:
            won.append(ranked.pop(0))
        left += [row for side in ranked for vote in side for row in vote.left_out(reason)]
    return won, left


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Gather the items that share a key; groups and items keep the order they came in."""
    groups: defaultdict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _support(side: Sequence[Vote[S]]) -> tuple[int, ...]:
    """Count the voters behind a side per kind of signal, strongest kind first."""
    kinds = Counter(
        origin for origin, _ in {(vote.origin, voter) for vote in side for voter in vote.voters}
    )
    return tuple(kinds[origin] for origin in STRENGTH)
