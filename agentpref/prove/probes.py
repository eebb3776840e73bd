"""What live and the candidate write on the same prompts, and what people chose there.

Probes are prompts of held-out examples. Half of them are new ones, where the pairs ask for
something, and half are old; where there are too few, new prompts of training fill them up. Every
probe is answered greedily, as servers answer by default, and some again at a temperature.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from agentpref.learn.adapter import Policy
from agentpref.learn.encode import EncodedExample
from agentpref.learn.learner import Learner
from agentpref.models.continuation import Ask, answered
from agentpref.models.instructions import instructed_example
from agentpref.models.tokenizer import ExampleTokenizer, Ids
from agentpref.models.tool_calls import has_broken_call, parse_rate
from agentpref.prove.asked import JudgedAnswers, Odd, odd_by_tag
from agentpref.prove.evidence import Generations
from agentpref.prove.features import (
    features,
    is_blank,
    is_broken_off,
    is_degenerate,
    most_common,
    set_phrases,
)
from agentpref.prove.metrics import distinct_n

PROBES = 32
SAMPLED = 16
"""How many of the probes are answered a second time, at a temperature."""

SHOWN = 10
"""How many answers to probes the home keeps, to show them to people."""

JUDGED = 2000
"""Of more new examples than these, a sample says what is asked for."""

FEWEST_TOKENS, MOST_TOKENS = 64, 256


def token_limit(rows: Sequence[EncodedExample]) -> int:
    """How long an answer may be before it counts as endless: twice the longest that was logged."""
    longest = max(len(ids) for row in rows for ids in row.completions)
    return min(MOST_TOKENS, max(FEWEST_TOKENS, 2 * longest))


class Probes(NamedTuple):
    """The prompts that live and candidate answer, with their rows.

    The first ``fresh`` of them are of new examples, and the first ``unseen`` of these were held
    out. ``asked`` are the same rows with the prompts that leave room for an answer. ``notes`` tell
    of those that were changed.
    """

    rows: list[EncodedExample]
    asked: list[EncodedExample]
    fresh: int
    unseen: int
    notes: tuple[str, ...] = ()

    def prompts_of(self, learner: Learner, policy: Policy) -> list[Ids]:
        """What a policy is given: with its instructions, if it has any."""
        return [row.prompt for row in learner.asked(policy, self.asked)]


def choose_probes(
    learner: Learner,
    new: Sequence[EncodedExample],
    old: Sequence[EncodedExample] = (),
    trained: Sequence[EncodedExample] = (),
    *,
    limit: int,
    seed: int,
) -> Probes:
    """Choose prompts of some rows, each with room for an answer of ``limit`` tokens.

    New and old prompts are held out; ``trained`` ones are new too, and are taken where these are
    fewer than there are to be probes. Where the model's positions leave less room, a prompt is
    asked without its oldest turns. If it has none to spare it is asked whole, and its answers are
    cut where the positions end.
    """
    source, seen = random.Random(seed), set[str]()
    fresh, kept, more = (
        source.sample(distinct, len(distinct))
        for distinct in (_distinct(rows, seen) for rows in (new, old, trained))
    )
    fresh = fresh[: max(PROBES // 2, PROBES - len(kept))]
    kept, unseen = kept[: PROBES - len(fresh)], len(fresh)
    fresh += more[: PROBES - len(fresh) - len(kept)]
    chosen = fresh + kept
    positions = learner.decoding.positions
    if positions is None:
        return Probes(chosen, chosen, len(fresh), unseen)
    room = positions - limit
    tokenizer = ExampleTokenizer(learner.base.template, learner.max_length)
    shorter: dict[int, bool] = {}
    asked = []
    for number, row in enumerate(chosen):
        with_room: dict[str, Ids] = {}
        for text, prompt in {"": row.prompt, **row.told}.items():
            with_room[text] = prompt
            if len(prompt) > room:
                found = tokenizer.shortened(instructed_example(row.example, text), room)
                with_room[text] = found or prompt
                shorter[number] = found is not None and shorter.get(number, True)
        asked.append(replace(row, prompt=with_room.pop(""), told=with_room))
    if not shorter:
        return Probes(chosen, chosen, len(fresh), unseen)
    cut = sum(not found for found in shorter.values())
    note = (
        f"{len(shorter)} of {len(chosen)} prompts leave no room for an answer of {limit} tokens in "
        f"the model's {positions} positions: {len(shorter) - cut} were asked without their oldest "
        f"turns, and the answers to {cut} are cut where the positions end"
    )
    return Probes(chosen, asked, len(fresh), unseen, (note,))


def _distinct(rows: Iterable[EncodedExample], seen: set[str]) -> list[EncodedExample]:
    """One row of each prompt that was not seen before."""
    found = {row.example.prompt.id: row for row in rows if row.example.prompt.id not in seen}
    seen.update(found)
    return list(found.values())


class Writing(NamedTuple):
    """Prompts to answer in at most ``limit`` tokens each: greedily, or drawn at a temperature.

    ``phrases`` are set phrases to look for at the beginning of answers.
    """

    prompts: Sequence[Ids]
    limit: int
    phrases: frozenset[str] = frozenset()
    temperature: float = 0.0
    seed: int = 0


def generations(learner: Learner, policy: Policy, writings: Sequence[Writing]) -> list[Generations]:
    """What a policy writes on some sets of prompts, all of them at once.

    An answer that is cut before its limit, where the model's positions end, is not endless: it may
    be as long as people want it.
    """
    sets = [
        [
            Ask(prompt, one.limit, one.temperature, one.seed + number)
            for number, prompt in enumerate(one.prompts)
        ]
        for one in writings
    ]
    with learner.policy(policy) as model:
        found = answered(model, sets, learner.decoding)
    return [
        _described(
            learner, answers.tokens, limit=one.limit, phrases=one.phrases, finite=answers.finite
        )
        for one, answers in zip(writings, found, strict=True)
    ]


def _described(
    learner: Learner,
    answers: Sequence[Ids],
    *,
    limit: int | None,
    phrases: frozenset[str],
    finite: bool = True,
) -> Generations:
    """Statistics of some answers; without a limit none is endless."""
    decoding = learner.decoding
    texts = tuple(decoding.text(ids) for ids in answers)
    ended = [limit is None or ids[-1] in decoding.end_tokens for ids in answers]
    endless = [len(ids) == limit and not end for ids, end in zip(answers, ended, strict=True)]
    broken = [end and is_broken_off(text) for text, end in zip(texts, ended, strict=True)]
    blank, repeated = ([*map(is_harmed, texts)] for is_harmed in (is_blank, is_degenerate))
    common, common_words = most_common(texts)
    return Generations(
        distinct_2=distinct_n(answers, 2),
        mean_length=sum(map(len, answers)) / max(1, len(answers)),
        empty=sum(blank),
        endless=sum(endless),
        tool_parse=parse_rate(texts),
        broken_calls=sum(map(has_broken_call, texts)),
        finite=finite,
        repeated=sum(repeated),
        broken=sum(broken),
        harmed=sum(map(any, zip(blank, endless, repeated, broken, strict=True))),
        common=common,
        common_words=common_words,
        answers=tuple(
            features(text, tokens=len(ids), phrases=phrases)
            for text, ids in zip(texts, answers, strict=True)
        ),
        texts=texts,
    )


class Judged(NamedTuple):
    """The features of judged answers, the set phrases that they begin with, and odd wishes."""

    answers: list[JudgedAnswers]
    phrases: frozenset[str]
    odd: tuple[Odd, ...]


def judged(learner: Learner, rows: Sequence[EncodedExample], *, seed: int) -> Judged:
    """Read what people judged: the best and the worst answer of each row, or the only one."""
    if len(rows) > JUDGED:
        rows = random.Random(seed).sample(list(rows), JUDGED)
    sides = [[None if ids is None else _read(learner, ids) for ids in _sides(row)] for row in rows]
    phrases = set_phrases([side[0] for both in sides for side in both if side is not None])
    found = [
        [None if side is None else features(side[0], tokens=side[1], phrases=phrases) for side in b]
        for b in sides
    ]
    prompts = [row.example.prompt.id for row in rows]
    answers = [JudgedAnswers(prompt, *both) for prompt, both in zip(prompts, found, strict=True)]
    texts = [(yes[0] if yes else None, no[0] if no else None) for yes, no in sides]
    tags = [row.example.tag for row in rows]
    return Judged(answers, phrases, tuple(odd_by_tag([*zip(tags, texts, strict=True)])))


def _read(learner: Learner, ids: Ids) -> tuple[str, int]:
    return learner.decoding.text(ids), len(ids)


def judged_probes(
    learner: Learner, rows: Sequence[EncodedExample], phrases: frozenset[str]
) -> tuple[Generations | None, Generations | None]:
    """Statistics of the chosen and of the rejected answers to the probes."""
    chosen, rejected = ([ids for row in rows if (ids := _sides(row)[n])] for n in (0, 1))
    return tuple(  # type: ignore[return-value]
        _described(learner, answers, limit=None, phrases=phrases) if answers else None
        for answers in (chosen, rejected)
    )


def sides_of(rows: Sequence[EncodedExample]) -> tuple[int, int]:
    """How many of some rows have a chosen answer, and how many a rejected one."""
    found = [_sides(row) for row in rows]
    return sum(yes is not None for yes, _ in found), sum(no is not None for _, no in found)


def _sides(row: EncodedExample) -> tuple[Ids | None, Ids | None]:
    """The best and the worst completion of a row; of a lone one, the liked or the disliked."""
    labels = [c.label or 0.0 for c in row.example.completions]
    if row.example.lone:
        return (row.own[0], None) if labels[0] else (None, row.own[0])
    return row.own[labels.index(max(labels))], row.own[labels.index(min(labels))]
