"""Whether a log says anything of a policy, and in which words it does not.

Estimates are numbers on any log; most libraries print them. Here one that rests on a few answers,
or on none, is refused, with what is wrong and what would help.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from agentpref.prove.ope.estimators import Numbers

LEAST_ROWS = 50
"""With fewer, even weights that differ little have one that is more than a twentieth of all."""

LEAST_GROUPS = 10
"""Conversations, below which nobody can say how far these differ."""

LEAST_EFFECTIVE = 0.1
"""The effective sample size must be such a share of the answers."""

LARGEST_WEIGHT = 0.05
"""No answer may have more than this share of all weight."""

LARGEST_GAP = 0.1
"""The share of the target's answers that the log may lack."""


class Support(NamedTuple):
    """How far a log covers a policy.

    ``effective`` is (Σw)² / Σw², the number of answers of equal weight that tell as much (Kish),
    ``largest`` the largest share of the weight, and ``mean`` the mean weight, which is 1 where the
    log covers all that the policy would answer; ``error`` is its standard error.
    """

    rows: int
    effective: float
    largest: float
    mean: float
    error: float

    @classmethod
    def of(cls, weights: Numbers) -> Support:
        """The support of some answers, by their weights, which may all be 0.

        Raises:
            ValueError: a weight is negative, or no number.
        """
        weights = np.asarray(weights, float)
        if np.isnan(weights).any() or (weights < 0).any():
            raise ValueError("a weight is negative or no number; it is a ratio of probabilities")
        n, total = len(weights), float(np.sum(weights))
        if n == 0 or not np.isfinite(weights).all() or total <= 0:
            return cls(n, 0.0, 1.0 if n else 0.0, 0.0, 0.0)
        shares = weights / total
        error = float(np.std(weights, ddof=1)) / n**0.5 if n > 1 else float("inf")
        return cls(n, float(1 / np.sum(shares**2)), float(shares.max()), total / n, error)

    @property
    def unsupported(self) -> float:
        """The share of the policy's answers that the log provably lacks: 1 less the mean weight."""
        return max(0.0, 1 - self.mean - 2 * self.error)


def refusals(
    support: Support,
    *,
    missing: int = 0,
    greedy: int = 0,
    groups: int | None = None,
    distinct: int | None = None,
    things: str = "answers",
) -> Iterator[str]:
    """Why no number is said of a policy, in words; nothing where one may be.

    Args:
        support: of the answers that can be weighed.
        missing: how many others have no log-probabilities.
        greedy: how many others were written at temperature 0, where nothing else could have been.
        groups: of how many conversations the answers are; ``None``: each is one.
        distinct: how many different rewards there are; ``None`` is not known.
        things: what is weighed: answers, or whole conversations.
    """
    if greedy and support.rows < LEAST_ROWS:
        yield (
            f"{greedy:,} {things} were written at temperature 0, which says nothing of any other "
            "answer: serve some requests at temperature 1"
        )
    if missing and support.rows < LEAST_ROWS:
        yield (
            f"{missing:,} {things} have no tokens of what served: record token_ids and logprobs, "
            "as agentpref's own engines do"
        )
    if support.rows < LEAST_ROWS:
        yield (
            f"{support.rows:,} {things} can be weighed, and it takes {LEAST_ROWS}: collect more "
            "rewards"
        )
        return
    if groups is not None and groups < LEAST_GROUPS:
        yield (
            f"the {support.rows:,} {things} are of {groups:,} conversations, and it takes "
            f"{LEAST_GROUPS} to say how far they differ"
        )
    if distinct == 1:
        yield f"all {things} earned the same, so nothing can be told from what they earned"
    if support.mean == 0.0:
        yield (
            "no logged answer is one that the revision would give, or a weight is not finite: it "
            "is too far from what served for this log to tell"
        )
        return
    if support.effective < LEAST_EFFECTIVE * support.rows:
        yield (
            f"the {support.rows:,} {things} tell as much as {support.effective:.1f} would "
            f"(effective sample size below {LEAST_EFFECTIVE:.0%}): the revision is too far from "
            "what served for this log to tell"
        )
    if support.largest > LARGEST_WEIGHT:
        yield (
            f"one of the {things} has {support.largest:.0%} of all weight, more than "
            f"{LARGEST_WEIGHT:.0%}, so the number would hang on it: collect more"
        )
    if support.unsupported > LARGEST_GAP:
        yield (
            f"at least {support.unsupported:.0%} of what the revision would answer was never "
            "logged, so nothing is known of it: serve some requests at temperature 1"
        )
