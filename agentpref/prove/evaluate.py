"""Evaluates a candidate: gathers all the evidence that the gate needs.

The learner scores held-out examples under the live policy and the candidate, measures how far the
candidate is from the base, and answers the same probe prompts with both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from agentpref.config import UpdateConfig
from agentpref.learn.adapter import Policy
from agentpref.learn.encode import EncodedExample
from agentpref.learn.learner import Learner
from agentpref.learn.losses.kto import is_liked
from agentpref.models.continuation import Answers, greedy
from agentpref.models.tokenizer import ExampleTokenizer, Ids, encode_prompt
from agentpref.models.tool_calls import parse_rate
from agentpref.prefer.strata import coarsen, stratify
from agentpref.prove.bootstrap import Paired
from agentpref.prove.checks import UserCheck, run_checks
from agentpref.prove.evidence import Evidence, Generations
from agentpref.prove.metrics import (
    accuracy,
    correctness,
    distinct_n,
    evenly,
    length_ratio,
    ranking_accuracy,
    thumb_margins,
)
from agentpref.prove.ordinary import OrdinaryEvidence, falls
from agentpref.types import Message, Prompt, Stratum

K = TypeVar("K")

PROBES = 32
ORDINARY_PROBES = 16
_SERVED: tuple[Policy, Policy] = ("live", "candidate")
KL_ROWS = 256
FEWEST_TOKENS, MOST_TOKENS = 64, 256
COST_OF_WRITING = 4
"""How many tokens are scored in the time that one is generated."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How right live and candidate are about some held-out rows, from 0 to 1, row by row."""

    rows: Sequence[EncodedExample]
    live: Sequence[float]
    candidate: Sequence[float]

    def paired(self, numbers: Sequence[int] | None = None, *, matched: bool = False) -> Paired:
        """The scores of some rows, or of all, as evidence; see :meth:`counted`.

        With ``matched``, a like and a dislike of one tag stand for one prompt together. Since as
        many of both count, their labels are no independent coins; but which of the two is the like
        is one, so that the sign of the change of both is one, too.
        """
        counted = self.counted(range(len(self.rows)) if numbers is None else numbers)
        prompts = {i: self.rows[i].example.prompt.id for i in counted}
        return Paired(
            tuple(self.live[i] for i in counted),
            tuple(self.candidate[i] for i in counted),
            tuple((prompts | (self._matches(counted) if matched else {})).values()),
        )

    def _matches(self, counted: Sequence[int]) -> dict[int, str]:
        """The common name of each lone row and its opposite, by its number."""
        sides: dict[str, tuple[list[int], list[int]]] = {}
        for i in sorted(counted, key=lambda i: self.rows[i].example.example_id):
            example = self.rows[i].example
            if example.lone:
                sides.setdefault(example.tag, ([], []))[is_liked(example)].append(i)
        couples = [pair for both in sides.values() for pair in zip(*both, strict=True)]
        prompt = {i: self.rows[i].example.prompt.id for couple in couples for i in couple}
        return {i: f"{prompt[a]} {prompt[b]}" for a, b in couples for i in (a, b)}

    def counted(self, numbers: Sequence[int]) -> list[int]:
        """The rows that count as evidence: all but surplus lone ones.

        Of the lone rows in each tag, as many likes as dislikes count, lest a tag that is mostly
        liked outweigh one that is mostly disliked.
        """
        by_tag: dict[str, dict[str, bool]] = {}
        examples = [(i, self.rows[i].example) for i in numbers]
        for _, example in examples:
            if example.lone:
                by_tag.setdefault(example.tag, {})[example.example_id] = is_liked(example)
        chosen = frozenset[str]().union(*map(evenly, by_tag.values()))
        return [i for i, example in examples if not example.lone or example.example_id in chosen]

    def counted_thumbs(self) -> int:
        """How many lone rows count as evidence."""
        return sum(self.rows[i].example.lone for i in self.counted(range(len(self.rows))))

    def notes(self) -> list[str]:
        """Says where some lone rows do not count."""
        thumbs, counted = sum(row.example.lone for row in self.rows), self.counted_thumbs()
        if counted == thumbs:
            return []
        return [
            f"{counted} of {thumbs} new held-out thumbs count as evidence: as many likes as "
            "dislikes in every tag, since a policy that moves all answers alike is right about one "
            "kind"
        ]

    def joined(self, other: Scores) -> Scores:
        """These scores and others', as one."""
        return Scores(
            [*self.rows, *other.rows],
            [*self.live, *other.live],
            [*self.candidate, *other.candidate],
        )

    def by_tag(self) -> dict[str, dict[str, float]]:
        """Accuracy of live (``before``) and candidate (``after``) per tag with any evidence."""
        found: dict[str, dict[str, float]] = {}
        for tag, numbers in sorted(_group([row.example.tag for row in self.rows]).items()):
            paired = self.paired(numbers)
            if len(paired):
                before, after = accuracy(paired.live), accuracy(paired.candidate)
                found[tag] = {"pairs": len(paired), "before": before, "after": after}
        return found


def tokens_needed(rows: Sequence[EncodedExample]) -> int:
    """An upper estimate of an evaluation's cost on these rows, in tokens scored.

    Every row is scored under three policies, and for KL some under the base again. The user's own
    checks are not included.
    """
    tokens = sum(row.width for row in rows)
    for_kl = tokens * min(KL_ROWS, len(rows)) // max(1, len(rows))
    probes = min(PROBES, len({row.example.prompt.id for row in rows}))
    written = 2 * probes * token_limit(rows) if rows else 0
    return 3 * tokens + for_kl + COST_OF_WRITING * written


def kl_from_base(learner: Learner, rows: Sequence[EncodedExample], *, seed: int) -> float:
    """KL(π_0 ‖ π_θ) in nats per completion token, exact at each token of some of the rows.

    The mean over the examples' own completions of each one's mean over its tokens, as in training.
    Call it before :func:`score`, which then needs no pass of its own for these rows.
    """
    rows = random.Random(seed).sample(list(rows), min(KL_ROWS, len(rows)))
    values = [
        kl
        for row, kls in zip(rows, learner.divergences(rows), strict=True)
        for kl in kls[: len(row.own)]
    ]
    return sum(values) / len(values)


def score(learner: Learner, rows: Sequence[EncodedExample]) -> Scores:
    """Score live and candidate on held-out rows.

    A policy is right about completions when it ranks them as people did. It is right about a lone
    one when it has moved it the way that was asked for, against its mean over all mismatched
    completions among the rows.
    """
    live, candidate = (policy_scores(learner, policy, rows) for policy in ("live", "candidate"))
    return Scores(rows, live, candidate)


def policy_scores(
    learner: Learner, policy: Policy, rows: Sequence[EncodedExample]
) -> tuple[float, ...]:
    """How right one policy is about each row, from 0 to 1."""
    ratios = learner.ratios(policy, rows)
    lone = [i for i, row in enumerate(rows) if row.example.lone]
    margins = thumb_margins(
        [ratios[i][0] for i in lone],
        [ratios[i][-1] for i in lone],
        [is_liked(rows[i].example) for i in lone],
    )
    of_lone = dict(zip(lone, correctness(margins), strict=True))
    labels = ([c.label or 0.0 for c in row.example.completions] for row in rows)
    return tuple(
        of_lone[i] if i in of_lone else ranking_accuracy(ratio, wanted)
        for i, (ratio, wanted) in enumerate(zip(ratios, labels, strict=True))
    )


def gather(
    learner: Learner,
    new: Scores,
    old: Scores,
    *,
    kl: float,
    trained: Sequence[EncodedExample],
    checks: Mapping[str, UserCheck],
    config: UpdateConfig,
    ordinary: Sequence[EncodedExample] = (),
    cut_short: bool = False,
) -> Evidence:
    """Everything the gate's verdict rests on.

    Args:
        learner: holds live and candidate.
        new: scores of the held-out rows that live has not learned.
        old: scores of those that it has; they are what must not be forgotten.
        kl: the candidate's distance from the base, see :func:`kl_from_base`.
        trained: the new training rows, which say what lengths they ask for.
        checks: the user's own checks.
        config: the seed and the settings of the gate.
        ordinary: held-out answers that nobody judged.
        cut_short: whether a limit of time stopped the training.
    """
    rows = [*new.rows, *old.rows] or list(trained)
    limit = token_limit(rows)
    probes = choose_probes(learner, rows, limit=limit, seed=config.seed)
    wanted, unwanted = _trained_answers(trained, best=True), _trained_answers(trained, best=False)
    both = bool(wanted and unwanted)
    distinct = distinct_n(unwanted)
    return Evidence(
        new=new.paired(matched=True),
        retention=_retention(old, config.gate.min_stratum),
        kl=kl,
        live=generations(learner, "live", probes.prompts, limit=limit),
        candidate=generations(learner, "candidate", probes.prompts, limit=limit),
        asked_length=length_ratio(_mean_length(wanted), _mean_length(unwanted)) if both else 1.0,
        asked_distinct=distinct_n(wanted) / distinct if wanted and distinct else 1.0,
        user_checks=run_checks(checks, lambda messages: answer(learner, messages)),
        ordinary=_ordinary(learner, ordinary, seed=config.seed) if ordinary else None,
        cut_short=cut_short,
        notes=probes.notes,
        comparisons=len(trained) + len(new.rows),
    )


def _ordinary(learner: Learner, rows: Sequence[EncodedExample], *, seed: int) -> OrdinaryEvidence:
    """What became of answers that nobody judged, and what is written to some of their prompts."""
    limit = token_limit(rows)
    prompts = choose_probes(learner, rows, limit=limit, seed=seed).prompts[:ORDINARY_PROBES]
    live, candidate = ([logp for logp, *_ in learner.score(policy, rows)] for policy in _SERVED)
    tokens = [sum(row.masks[0] or (True,) * len(row.completions[0])) for row in rows]
    harmful = []
    for policy in _SERVED:
        written = generations(learner, policy, prompts, limit=limit)
        harmful.append(written.empty + written.endless)
    return OrdinaryEvidence(falls(live, candidate, tokens), len(prompts), *harmful)


def _retention(old: Scores, minimum: int) -> dict[Stratum, Paired]:
    """Evidence by group; a group of lone rows that are all liked, or all disliked, gives none."""
    groups = _group(coarsen(stratify([row.example for row in old.rows]), minimum))
    found = {stratum: old.paired(numbers) for stratum, numbers in groups.items()}
    return {stratum: paired for stratum, paired in found.items() if len(paired)}


def _trained_answers(rows: Sequence[EncodedExample], *, best: bool) -> list[Ids]:
    """The completions that were chosen or liked; or those that were rejected or disliked."""
    answers: list[Ids] = []
    for row in rows:
        labels = [c.label or 0.0 for c in row.example.completions]
        if not row.example.lone:
            answers.append(row.own[labels.index(max(labels) if best else min(labels))])
        elif bool(labels[0]) is best:
            answers.append(row.own[0])
    return answers


def _mean_length(answers: Sequence[Ids]) -> float:
    return sum(map(len, answers)) / len(answers)


def token_limit(rows: Sequence[EncodedExample]) -> int:
    """How long an answer may be before it counts as endless: twice the longest that was logged."""
    longest = max(len(ids) for row in rows for ids in row.completions)
    return min(MOST_TOKENS, max(FEWEST_TOKENS, 2 * longest))


class Probes(NamedTuple):
    """The prompts that live and candidate answer, and notes on those that were changed."""

    prompts: list[Ids]
    notes: tuple[str, ...] = ()


def choose_probes(
    learner: Learner, rows: Sequence[EncodedExample], *, limit: int, seed: int
) -> Probes:
    """Choose prompts of some rows, each with room for an answer of ``limit`` tokens.

    Where the model's positions leave less, a prompt is asked without its oldest turns. If it has
    none to spare it is asked whole, and its answers are cut where the positions end.
    """
    distinct = list({row.example.prompt.id: row for row in rows}.values())
    chosen = random.Random(seed).sample(distinct, min(PROBES, len(distinct)))
    positions = learner.decoding.positions
    if positions is None:
        return Probes([row.prompt for row in chosen])
    room = positions - limit
    tokenizer = ExampleTokenizer(learner.base.template, learner.max_length)
    shorter = {
        number: tokenizer.shortened(row.example, room)
        for number, row in enumerate(chosen)
        if len(row.prompt) > room
    }
    prompts = [shorter.get(number) or row.prompt for number, row in enumerate(chosen)]
    if not shorter:
        return Probes(prompts)
    cut = sum(prompt is None for prompt in shorter.values())
    return Probes(
        prompts,
        (
            f"{len(shorter)} of {len(chosen)} probes leave no room for {limit} tokens in the "
            f"model's {positions} positions: {len(shorter) - cut} were asked without their oldest "
            f"turns, and the answers to {cut} are cut where the positions end",
        ),
    )


def generations(
    learner: Learner, policy: Policy, prompts: Sequence[Ids], *, limit: int
) -> Generations:
    """What a policy writes on probe prompts, greedily and at most ``limit`` tokens each.

    An answer that is cut before, where the model's positions end, is not endless: it may be as long
    as people want it.
    """
    answers, finite = _generate(learner, policy, prompts, limit)
    texts, ends = [learner.decoding.text(ids) for ids in answers], learner.decoding.end_tokens
    return Generations(
        distinct_2=distinct_n(answers, 2),
        mean_length=_mean_length(answers),
        empty=sum(not text.strip() for text in texts),
        endless=sum(len(ids) == limit and ids[-1] not in ends for ids in answers),
        tool_parse=parse_rate(texts),
        finite=finite,
    )


def answer(learner: Learner, messages: Sequence[Message]) -> str:
    """The candidate's greedy answer to a list of messages, as the text that servers stream.

    Raises:
        GenerationFailed: the messages leave no room in the model's positions.
    """
    prompt = encode_prompt(Prompt("", tuple(messages)), learner.base.template)
    ((ids,), _) = _generate(learner, "candidate", [prompt], MOST_TOKENS)
    return learner.decoding.text(ids)


def _generate(learner: Learner, policy: Policy, prompts: Sequence[Ids], limit: int) -> Answers:
    with learner.policy(policy) as model:
        return greedy(model, prompts, learner.decoding, limit=limit)


def _group(keys: Sequence[K]) -> dict[K, list[int]]:
    """Indices of equal keys, in order."""
    groups: dict[K, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups
