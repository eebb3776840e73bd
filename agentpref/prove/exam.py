"""The exam of one candidate: all the evidence that the gate needs, gathered in one place.

Asks the learner for scores and answers of live and candidate on the same held-out pairs and thumbs
and the same prompts. It does not decide anything, and it does not know how rows came to be held
out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from agentpref.learn.adapter import Policy
from agentpref.learn.encode import Encoded, EncodedPair, EncodedThumb, Ids
from agentpref.learn.learner import Learner
from agentpref.prefer.strata import coarsen, stratify
from agentpref.prove.bootstrap import Paired
from agentpref.prove.checks import Check, run_checks
from agentpref.prove.evaluate import answer, generations, kl_from_base, token_limit
from agentpref.prove.gate import Evidence
from agentpref.prove.metrics import (
    accuracy,
    correctness,
    distinct_n,
    evenly,
    length_ratio,
    thumb_margins,
)
from agentpref.types import Stratum

K = TypeVar("K")

PROBES = 32
KL_ROWS = 256
_WRITTEN_TOKEN = 4
_POLICIES: tuple[Policy, Policy] = ("live", "candidate")


@dataclass(frozen=True, slots=True)
class Marks:
    """Correctness of live and candidate on some held-out rows, row by row."""

    rows: Sequence[Encoded]
    live: Sequence[float]
    candidate: Sequence[float]

    def take(self, wanted: Sequence[int]) -> Paired:
        """The marks of some rows, as evidence: their pairs, and as many likes as dislikes."""
        wanted = [*self.even(wanted)]
        return Paired(
            tuple(self.live[i] for i in wanted),
            tuple(self.candidate[i] for i in wanted),
            tuple(self.rows[i].example.prompt.id for i in wanted),
        )

    def even(self, wanted: Sequence[int]) -> list[int]:
        """Those of some rows that count: of the thumbs in each tag, as many likes as dislikes.

        In each tag, lest a domain that is mostly liked make up for one that is mostly disliked.
        """
        likes: dict[str, dict[str, bool]] = {}
        for row in (self.rows[i] for i in wanted):
            if isinstance(row, EncodedThumb):
                likes.setdefault(row.thumb.tag, {})[row.thumb.id] = row.thumb.desirable
        chosen = frozenset[str]().union(*map(evenly, likes.values()))
        return [
            i
            for i in wanted
            if isinstance(self.rows[i], EncodedPair) or self.rows[i].example.id in chosen
        ]

    def thumbs(self) -> int:
        """How many thumbs count when all rows are taken."""
        counted = self.even(range(len(self.rows)))
        return sum(isinstance(self.rows[i], EncodedThumb) for i in counted)

    def remarks(self) -> list[str]:
        """Say in words that some thumbs do not count, where that is so."""
        held_out = sum(isinstance(row, EncodedThumb) for row in self.rows)
        counted = self.thumbs()
        if counted == held_out:
            return []
        return [
            f"{counted} of {held_out} new held-out thumbs count as evidence: as many likes as "
            "dislikes in every tag, since a policy that moves all answers alike is right about one "
            "kind"
        ]

    def joined(self, other: Marks) -> Marks:
        """These marks and others', as one."""
        return Marks(
            [*self.rows, *other.rows],
            [*self.live, *other.live],
            [*self.candidate, *other.candidate],
        )

    def by_tag(self) -> dict[str, dict[str, float]]:
        """Accuracy of live (``before``) and candidate (``after``) per tag that has any evidence."""
        groups = _group([row.example.tag for row in self.rows])
        taken = {tag: self.take(rows) for tag, rows in sorted(groups.items())}
        return {tag: _summary(paired) for tag, paired in taken.items() if len(paired)}


def tokens_needed(rows: Sequence[Encoded]) -> int:
    """What an exam on these rows costs, in tokens scored: rather too many than too few.

    Every row is scored under three policies, as if nothing were known of them, and for KL some
    under the base again; a token that is written is taken to cost as much as several that are read.
    The user's own checks are not in it.
    """
    tokens = sum(row.width for row in rows)
    moved = tokens * min(KL_ROWS, len(rows)) // max(1, len(rows))
    probes = min(PROBES, len({row.example.prompt.id for row in rows}))
    written = 2 * probes * token_limit(rows) if rows else 0
    return 3 * tokens + moved + _WRITTEN_TOKEN * written


def distance(learner: Learner, rows: Sequence[Encoded]) -> float:
    """How far the candidate is from the base on some of the rows: KL(π_0 ‖ π_θ) in nats per token.

    Ask for it before the marks, which need not score these rows under the candidate then.
    """
    rng = random.Random(learner.config.seed)
    return kl_from_base(learner, rng.sample(list(rows), min(KL_ROWS, len(rows))))


def mark(learner: Learner, rows: Sequence[Encoded]) -> Marks:
    """Mark live and candidate on held-out rows.

    A pair is right where the policy's margin is above 0, a thumb where it has moved the answer the
    way that was asked for, against its mean over the mismatched answers of all thumbs among them.
    """
    live, candidate = (_margins(learner, policy, rows) for policy in _POLICIES)
    return Marks(rows, correctness(live), correctness(candidate))


def _margins(learner: Learner, policy: Policy, rows: Sequence[Encoded]) -> list[float]:
    ratios = learner.ratios(policy, rows)
    margins = [ratio.chosen - ratio.rejected for ratio in ratios]
    thumbs = {i: row.thumb for i, row in enumerate(rows) if isinstance(row, EncodedThumb)}
    found = thumb_margins(
        [ratios[i].chosen for i in thumbs],
        [ratios[i].rejected for i in thumbs],
        [thumb.desirable for thumb in thumbs.values()],
    )
    for i, margin in zip(thumbs, found, strict=True):
        margins[i] = margin
    return margins


def evidence(
    learner: Learner,
    new: Marks,
    old: Marks,
    *,
    kl: float,
    trained: Sequence[Encoded],
    checks: Mapping[str, Check],
) -> Evidence:
    """Everything the gate rests on.

    Args:
        learner: holds live and candidate.
        new: marks on the held-out rows that live has not learned.
        old: marks on those that it has; they are what must not be forgotten.
        kl: the candidate's :func:`distance` from the base.
        trained: tonight's training rows, which say what lengths they ask for.
        checks: the user's own checks.
    """
    rng = random.Random(learner.config.seed)
    rows = [*new.rows, *old.rows] or list(trained)
    probes = _sample(rng, list({row.example.prompt.id: row.prompt for row in rows}.values()))
    limit = token_limit(rows)
    return Evidence(
        new=new.take(range(len(new.rows))),
        retention=_retention(old, learner.config.gate.min_stratum),
        kl=kl,
        live=generations(learner, "live", probes, limit=limit),
        candidate=generations(learner, "candidate", probes, limit=limit),
        asked_length=_asked_length(trained),
        asked_distinct=_asked_distinct(trained),
        user_checks=run_checks(checks, lambda messages: answer(learner, messages)),
    )


def _sample(rng: random.Random, prompts: list[Ids]) -> list[Ids]:
    return rng.sample(prompts, min(PROBES, len(prompts)))


def _retention(old: Marks, minimum: int) -> dict[Stratum, Paired]:
    """Evidence by group; one whose thumbs are all of one kind, and has no pairs, gives none."""
    groups = _group(coarsen(stratify([row.example for row in old.rows]), minimum))
    taken = {stratum: old.take(rows) for stratum, rows in groups.items()}
    return {stratum: paired for stratum, paired in taken.items() if len(paired)}


def _asked_length(trained: Sequence[Encoded]) -> float:
    """Mean length of tonight's wanted answers over that of the unwanted ones."""
    wanted, unwanted = _answers(trained, True), _answers(trained, False)
    if not wanted or not unwanted:
        return 1.0
    return length_ratio(_mean_length(wanted), _mean_length(unwanted))


def _asked_distinct(trained: Sequence[Encoded]) -> float:
    """Distinct-2 of tonight's wanted answers over that of the unwanted ones."""
    wanted, unwanted = _answers(trained, True), distinct_n(_answers(trained, False))
    return distinct_n(wanted) / unwanted if wanted and unwanted else 1.0


def _answers(rows: Sequence[Encoded], wanted: bool) -> list[Ids]:
    """The answers that were chosen or liked; or those that were rejected or disliked."""
    answers: list[Ids] = []
    for row in rows:
        if isinstance(row, EncodedPair):
            answers.append(row.chosen if wanted else row.rejected)
        elif row.thumb.desirable is wanted:
            answers.append(row.completion)
    return answers


def _mean_length(answers: Sequence[Ids]) -> float:
    return sum(map(len, answers)) / len(answers)


def _summary(paired: Paired) -> dict[str, float]:
    return {
        "pairs": len(paired),
        "before": accuracy(paired.live),
        "after": accuracy(paired.candidate),
    }


def _group(keys: Sequence[K]) -> dict[K, list[int]]:
    """Indices of equal keys, in order."""
    groups: dict[K, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups
