"""What a set of judged answers asks for, and what nobody can have meant by it.

A feature is *asked for* if its direction in the pairs is not by chance: chosen answers are shorter
than rejected ones, say. The gate then lets a candidate move that way as far as it likes, and wants
to see some of it in what the candidate writes. Harm is never asked for: some chosen answers are
blank, cut or repeated because a program made them so, and the report counts these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from agentpref.models.tool_calls import has_broken_call
from agentpref.prove.bootstrap import scipy
from agentpref.prove.features import (
    HARM,
    LANGUAGE,
    Features,
    is_blank,
    is_broken_off,
    is_canned,
    is_cut_from,
    is_degenerate,
    most_common,
)
from agentpref.prove.signs import sign_test

ERROR = 0.05
"""The chance that pairs of random labels ask for anything, over all features together."""

FEWEST = 5
"""Prompts whose answers differ in a feature, below which nothing can be said of it."""

LEAST = 0.05
"""A difference below this share of the larger mean is no wish, however certain."""


class JudgedAnswers(NamedTuple):
    """The features of a chosen and a rejected answer to one prompt.

    Of a lone thumb only one of them is there: the liked or the disliked answer.
    """

    prompt: str
    chosen: Features | None
    rejected: Features | None


@dataclass(frozen=True, slots=True)
class Asked:
    """A feature that people ask for: more of it (``direction`` 1) or less (−1).

    ``chosen`` and ``rejected`` are its means over the answers that were chosen or liked, and over
    the others; ``prompts`` is how many prompts have answers that differ in it, and ``p`` how likely
    a difference like this would be of random labels, were it the only one of ``tests`` features.
    """

    feature: str
    direction: int
    chosen: float
    rejected: float
    prompts: int
    p: float
    tests: int = 1

    @property
    def chance(self) -> float:
        """At most how likely random labels ask for this, or for any other feature, as plainly."""
        return min(1.0, self.p * self.tests)

    @property
    def size(self) -> float:
        """How far the chosen answers are from the rejected ones."""
        return abs(self.chosen - self.rejected)


def asked(judged: Sequence[JudgedAnswers]) -> tuple[Asked, ...]:
    """The features whose direction in some judged answers is not by chance, the surest first.

    A prompt counts once. Pairs are tested by an exact sign test of chosen minus rejected, lone
    thumbs by Mann and Whitney's test of the liked against the disliked ones. Holm's correction
    covers all of them: random labels ask for nothing, but once in twenty sets.

    Raises:
        MissingDependency: scipy is not installed.
    """
    whole = [(o.prompt, o.chosen, o.rejected) for o in judged]
    pairs = [(prompt, yes, no) for prompt, yes, no in whole if yes and no]
    liked = [(prompt, yes) for prompt, yes, no in whole if yes and not no]
    disliked = [(prompt, no) for prompt, yes, no in whole if no and not yes]
    of_pairs = _features_of(side for _, *sides in pairs for side in sides)
    of_thumbs = _features_of(side for _, side in (*liked, *disliked))
    tests = [_sign_test(name, pairs) for name in of_pairs]
    tests += [_rank_test(name, liked, disliked) for name in of_thumbs]
    sure = _holm([test for test in tests if test is not None])
    opposed = {(one.feature, -one.direction) for one in sure}
    found: dict[str, Asked] = {}
    for one in sure:  # of a feature that pairs and thumbs ask for, the surer of both
        is_wish = one.size >= LEAST * max(abs(one.chosen), abs(one.rejected))
        if is_wish and (one.feature, one.direction) not in opposed and one.feature not in HARM:
            found.setdefault(one.feature, one)
    return tuple(found.values())


def _features_of(sides: Iterable[Features]) -> list[str]:
    return sorted({name for side in sides for name in side})


def _sign_test(name: str, pairs: Sequence[tuple[str, Features, Features]]) -> Asked | None:
    changes: dict[str, float] = {}
    if name.startswith(LANGUAGE):  # a short answer, which has none, is in no other language
        pairs = [pair for pair in pairs if all(map(_has_language, pair[1:]))]
    for prompt, chosen, rejected in pairs:
        change = chosen.get(name, 0.0) - rejected.get(name, 0.0)
        changes[prompt] = changes.get(prompt, 0.0) + change
    up, down = (sum(c * sign > 0 for c in changes.values()) for sign in (1, -1))
    if up + down < FEWEST or up == down:
        return None
    better = _mean([chosen.get(name, 0.0) for _, chosen, _ in pairs])
    worse = _mean([rejected.get(name, 0.0) for _, _, rejected in pairs])
    direction = 1 if up > down else -1
    if (better - worse) * direction <= 0:  # most prompts one way, and the mean the other
        return None
    return Asked(name, direction, better, worse, up + down, sign_test(up, down))


def _has_language(answer: Features) -> bool:
    return any(name.startswith(LANGUAGE) for name in answer)


def _rank_test(
    name: str, liked: Sequence[tuple[str, Features]], disliked: Sequence[tuple[str, Features]]
) -> Asked | None:
    if name.startswith(LANGUAGE):
        liked, disliked = ([one for one in s if _has_language(one[1])] for s in (liked, disliked))
    sides = [_by_prompt(name, side) for side in (liked, disliked)]
    if min(map(len, sides)) < FEWEST or len({*sides[0], *sides[1]}) == 1:
        return None
    better, worse = map(_mean, sides)
    direction = 1 if better > worse else -1
    p = float(scipy("stats").mannwhitneyu(*sides, alternative="two-sided").pvalue)
    return Asked(name, direction, better, worse, sum(map(len, sides)), p)


def _by_prompt(name: str, side: Sequence[tuple[str, Features]]) -> list[float]:
    """The means of a feature over the answers to each prompt."""
    found: dict[str, list[float]] = {}
    for prompt, own in side:
        found.setdefault(prompt, []).append(own.get(name, 0.0))
    return [_mean(values) for values in found.values()]


def _holm(tests: Sequence[Asked]) -> list[Asked]:
    """Those that Holm's correction leaves, the surest first."""
    ordered = sorted(tests, key=lambda test: (test.p, test.feature))
    sure: list[Asked] = []
    for number, test in enumerate(ordered):
        if test.p > ERROR / (len(ordered) - number):
            break
        sure.append(replace(test, tests=len(ordered)))
    return sure


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


# Wishes that no one means


@dataclass(frozen=True, slots=True)
class Odd:
    """Chosen answers that nobody can have meant: how many of them, and what to say of it.

    ``tags`` are those of the examples among which they are so many; none if it is all of them.
    """

    count: int
    total: int
    message: str
    tags: frozenset[str] = frozenset()

    @property
    def rules(self) -> bool:
        """Whether they are half of all: to learn from such pairs is to learn harm."""
        return 2 * self.count >= self.total

    @property
    def warning(self) -> str:
        """What to tell people of it."""
        return f"{self.message}; a candidate that writes so is refused"


_MANY = 0.01
_ENDS = 0.05  # a preposition at the end looks broken off, too
_FEWEST_CHOSEN = 8

Texts: TypeAlias = tuple[str | None, str | None]
"""A chosen and a rejected answer; of a lone thumb one is ``None``."""


def odd_by_tag(judged: Sequence[tuple[str, Texts]]) -> Iterator[Odd]:
    """The odd wishes that rule in a tag, and those among the examples of all other tags.

    So what no one means is seen however much else there is. Tags with fewer than eight chosen
    answers are looked at together. Each of ``judged`` has a tag and two answers.
    """
    by_tag: dict[str, list[Texts]] = {}
    for tag, texts in judged:
        by_tag.setdefault(tag, []).append(texts)
    groups: dict[frozenset[str], list[Texts]] = {}
    small = frozenset(tag for tag, own in by_tag.items() if _chosen(own) < _FEWEST_CHOSEN)
    for tag, own in sorted(by_tag.items()):
        groups.setdefault(small if tag in small else frozenset([tag]), []).extend(own)
    rest = list[Texts]()
    for tags, own in groups.items():
        found, alone = [*odd_wishes(own)], len(groups) == 1
        if not any(odd.rules for odd in found) or not (alone or _chosen(own) >= _FEWEST_CHOSEN):
            rest += own
            continue
        name = f"tag {min(tags)}" if len(tags) == 1 else f"{len(tags)} small tags"
        where = "" if alone else f"{name}: "
        yield from (replace(odd, message=f"{where}{odd.message}", tags=tags) for odd in found)
    yield from odd_wishes(rest)


def _chosen(judged: Sequence[Texts]) -> int:
    return sum(yes is not None for yes, _ in judged)


def odd_wishes(judged: Sequence[Texts]) -> Iterator[Odd]:
    """Count the chosen answers that nobody means, by what is wrong with them, if there are many.

    They are blank, repeat themselves, call tools in broken JSON, break off, or are all one text.

    The sentences quote nothing.
    """
    chosen = [yes for yes, _ in judged if yes is not None]
    rejected = [no for _, no in judged if no is not None]
    blank, repeated, calls, broken = (
        sum(map(is_odd, chosen))
        for is_odd in (is_blank, is_degenerate, has_broken_call, is_broken_off)
    )
    cut = sum(is_cut_from(yes, no) for yes, no in judged if yes is not None and no is not None)
    total = len(chosen)
    kinds = [
        (blank, _MANY, "are blank: an app that logs before the answer is there makes such"),
        (repeated, _MANY, "repeat themselves: look at what writes them"),
        (calls, _MANY, "call tools in JSON that does not parse: look at what writes or cuts them"),
        (max(broken, cut), _ENDS, "break off within a sentence: raise the app's limit of tokens"),
    ]
    for count, least, what in kinds:
        if count > least * total:
            yield Odd(count, total, f"{count} of {total} chosen answers {what}")
    chosen = [text for text in chosen if not is_blank(text)]
    share, words_of_it = most_common(chosen)
    usual = most_common(rejected)[0]
    compared = min(len(chosen), len(rejected)) >= 8  # likes alone say not what else an app answers
    if compared and is_canned(share, words_of_it, usual, share):
        count = round(share * len(chosen))
        what = f"{count} of {total} chosen answers are one and the same text: it answers nothing"
        yield Odd(count, total, what)
