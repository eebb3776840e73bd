"""What people said about one question, and which side of it carries.

An *opinion* is one side of one question, taken by somebody at some time. Two rules settle every
question. Each voter's newest word stands, and replaces what the same voter said otherwise before.
Between voters the stronger kind of signal decides, and then the number of those who gave it.

Knows nothing of runs, prompts or stores: a question and its sides are anything that can be
compared. Every row that has no say in the end leaves with a reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from agentpref.types import Origin, Source

STRENGTH: tuple[Origin, ...] = ("correction", "comparison", "thumbs", "judge")
"""The kinds of signal, strongest first."""

Voter: TypeAlias = "tuple[Source, str | None]"
"""Who said it. All rows of one source that name no user count as one voter's."""

Reason = Literal[
    "unknown_run",  # the row names a run that is not in this namespace
    "different_prompts",  # the two compared runs answer different prompts
    "identical_answers",  # both answers are the same message
    "judge_flipped",  # the judge changed its verdict when the order was swapped
    "not_a_thumb",  # no score, or a program's measurement rather than a liking
    "unknown_scale",  # the key has carried scores outside -1..1, such as stars
    "neutral_score",  # exactly in the middle of its scale
    "tie",  # judged equally good
    "superseded",  # the same voter said otherwise later
    "outvoted",  # a stronger signal, or more voters, said otherwise
    "contradicted",  # as many voters said the opposite
    "over_limit",  # the prompt already has its share of thumbs pairs
    "repeated",  # the same lone answer was judged the same way before
]
"""Why a row of feedback or a comparison made neither a pair nor a thumb."""

LeftRow: TypeAlias = "tuple[str, Reason]"
"""The id of a row, and why it was left out."""

S = TypeVar("S")
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Opinion(Generic[S]):
    """One side taken on one question; ``side`` is ``None`` for a tie.

    ``rows`` are the ids of the feedback and comparisons that say so, ``said_at`` is when the last
    of them came, and ``about`` is whatever the caller wants back if this side carries.
    """

    rows: tuple[str, ...]
    said_at: float
    voters: frozenset[Voter]
    question: Hashable
    side: Hashable | None
    origin: Origin
    about: S

    def leave(self, reason: Reason) -> list[LeftRow]:
        """Leave every row of this opinion out, for one reason."""
        return [(row, reason) for row in self.rows]


def sift(
    readings: Iterable[tuple[str, Opinion[S] | Reason]],
) -> tuple[list[Opinion[S]], list[LeftRow]]:
    """Part the rows that were read as an opinion from those that gave only a reason."""
    opinions: list[Opinion[S]] = []
    left: list[LeftRow] = []
    for row, reading in readings:
        if isinstance(reading, Opinion):
            opinions.append(reading)
        else:
            left.append((row, reading))
    return opinions, left


def settle(opinions: Iterable[Opinion[S]]) -> tuple[list[list[Opinion[S]]], list[LeftRow]]:
    """Decide every question: the agreeing opinions that carried each, and the rows that did not.

    The result depends on the opinions alone, not on their order: it is sorted by time, then id.
    """
    standing, left = _newest_words(sorted(opinions, key=lambda o: (o.said_at, o.rows)))
    carried: list[list[Opinion[S]]] = []
    for asked in grouped(standing, lambda o: o.question).values():
        winners, others = _decide(asked)
        left += others
        if winners:
            carried.append(winners)
    return carried, left


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Gather the items that share a key; groups and items keep the order they came in."""
    groups: defaultdict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _newest_words(ordered: Sequence[Opinion[S]]) -> tuple[list[Opinion[S]], list[LeftRow]]:
    newest = {(o.voters, o.question): o.side for o in ordered}
    standing: list[Opinion[S]] = []
    left: list[LeftRow] = []
    for opinion in ordered:
        if newest[opinion.voters, opinion.question] == opinion.side:
            standing.append(opinion)
        else:
            left += opinion.leave("superseded")
    return standing, left


def _decide(opinions: Sequence[Opinion[S]]) -> tuple[list[Opinion[S]], list[LeftRow]]:
    sides = grouped(opinions, lambda o: o.side)
    left = [row for opinion in sides.pop(None, []) for row in opinion.leave("tie")]
    ranked = sorted(sides.values(), key=_support, reverse=True)
    even = len(ranked) > 1 and _support(ranked[0]) == _support(ranked[1])
    winners = [] if even or not ranked else ranked[0]
    losers = ranked if even else ranked[1:]
    reason: Reason = "contradicted" if even else "outvoted"
    left += [row for side in losers for opinion in side for row in opinion.leave(reason)]
    return winners, left


def _support(side: Sequence[Opinion[S]]) -> tuple[int, ...]:
    """Count the voters behind a side per kind of signal, strongest kind first."""
    said = {(opinion.origin, voter) for opinion in side for voter in opinion.voters}
    kinds = Counter(origin for origin, _ in said)
    return tuple(kinds[origin] for origin in STRENGTH)
