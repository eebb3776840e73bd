"""The exam of one candidate: all the evidence that the gate needs, gathered in one place.

Asks the learner for scores and answers of live and candidate on the same held-out pairs and the
same prompts. It does not decide anything, and it does not know how pairs came to be held out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from agentpref.learn.encode import EncodedPair, Ids
from agentpref.learn.learner import Learner
from agentpref.prove.bootstrap import Paired
from agentpref.prove.checks import Check, run_checks
from agentpref.prove.evaluate import answer, generations, kl_from_base, token_limit
from agentpref.prove.gate import Evidence
from agentpref.prove.metrics import accuracy, correctness, distinct_n, length_ratio
from agentpref.prove.strata import coarsen, stratify
from agentpref.types import Stratum

K = TypeVar("K")

PROBES = 32
KL_ROWS = 256
_WRITTEN_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Marks:
    """Correctness of live and candidate on some held-out rows, row by row."""

    rows: Sequence[EncodedPair]
    live: Sequence[float]
    candidate: Sequence[float]

    def take(self, wanted: Sequence[int]) -> Paired:
        """The marks of some rows, as evidence."""
        return Paired(
            tuple(self.live[i] for i in wanted),
            tuple(self.candidate[i] for i in wanted),
            tuple(self.rows[i].pair.prompt.id for i in wanted),
        )

    def joined(self, other: Marks) -> Marks:
        """These marks and others', as one."""
        return Marks(
            [*self.rows, *other.rows],
            [*self.live, *other.live],
            [*self.candidate, *other.candidate],
        )

    def by_tag(self) -> dict[str, dict[str, float]]:
        """Accuracy of live (``before``) and candidate (``after``) per tag."""
        groups = _group([row.pair.tag for row in self.rows])
        return {tag: _summary(self.take(rows)) for tag, rows in sorted(groups.items())}


def tokens_needed(rows: Sequence[EncodedPair]) -> int:
    """What an exam on these rows costs, in tokens scored: rather too many than too few.

    Every row is scored under three policies, as if nothing were known of them, and some again for
    KL; a token that is written is taken to cost as much as several that are read. The user's own
    checks are not in it.
    """
    tokens = sum(row.width for row in rows)
    moved = 2 * tokens * min(KL_ROWS, len(rows)) // max(1, len(rows))
    probes = min(PROBES, len({row.pair.prompt.id for row in rows}))
    written = 2 * probes * token_limit(rows) if rows else 0
    return 3 * tokens + moved + _WRITTEN_TOKEN * written


def mark(learner: Learner, rows: Sequence[EncodedPair]) -> Marks:
    """Mark live and candidate on held-out rows."""
    live, candidate = learner.margins("live", rows), learner.margins("candidate", rows)
    return Marks(rows, correctness(live), correctness(candidate))


def evidence(
    learner: Learner,
    new: Marks,
    old: Marks,
    *,
    trained: Sequence[EncodedPair],
    checks: Mapping[str, Check],
) -> Evidence:
    """Everything the gate rests on.

    Args:
        learner: holds live and candidate.
        new: marks on the held-out pairs that live has not learned.
        old: marks on those that it has; they are what must not be forgotten.
        trained: tonight's training pairs, which say what lengths they ask for.
        checks: the user's own checks.
    """
    rng = random.Random(learner.config.seed)
    rows = [*new.rows, *old.rows] or list(trained)
    probes = _sample(rng, list({row.pair.prompt.id: row.prompt for row in rows}.values()))
    limit = token_limit(rows)
    return Evidence(
        new=new.take(range(len(new.rows))),
        retention=_retention(old, learner.config.gate.min_stratum),
        kl=kl_from_base(learner, rng.sample(rows, min(KL_ROWS, len(rows)))),
        live=generations(learner, "live", probes, limit=limit),
        candidate=generations(learner, "candidate", probes, limit=limit),
        asked_length=_asked_length(trained),
        asked_distinct=_asked_distinct(trained),
        user_checks=run_checks(checks, lambda messages: answer(learner, messages)),
    )


def _sample(rng: random.Random, prompts: list[Ids]) -> list[Ids]:
    return rng.sample(prompts, min(PROBES, len(prompts)))


def _retention(old: Marks, minimum: int) -> dict[Stratum, Paired]:
    groups = _group(coarsen(stratify([row.pair for row in old.rows]), minimum))
    return {stratum: old.take(rows) for stratum, rows in groups.items()}


def _asked_length(trained: Sequence[EncodedPair]) -> float:
    """Mean length of tonight's chosen answers over that of the rejected ones."""
    chosen, rejected = (sum(len(r.chosen) for r in trained), sum(len(r.rejected) for r in trained))
    return length_ratio(chosen / len(trained), rejected / len(trained))


def _asked_distinct(trained: Sequence[EncodedPair]) -> float:
    """Distinct-2 of tonight's chosen answers over that of the rejected ones."""
    rejected = distinct_n([row.rejected for row in trained])
    return distinct_n([row.chosen for row in trained]) / rejected if rejected else 1.0


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
