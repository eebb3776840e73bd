"""Removes what its voter took back from feedback and comparisons.

A retraction is feedback of its own (see :data:`~agentpref.types.RETRACTION`). It takes back what
the same voter said of the same run until then. What the voter says later counts again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agentpref.prefer.votes import LeftOut, grouped
from agentpref.types import RETRACTION, Comparison, Feedback


class Standing(NamedTuple):
    """The judgements that still count, and the rows that do not: retracted ones, retractions."""

    feedback: list[Feedback]
    comparisons: list[Comparison]
    left_out: list[LeftOut]


def withdraw(feedback: Sequence[Feedback], comparisons: Sequence[Comparison]) -> Standing:
    """Separate what still counts from what was taken back.

    A retraction that found nothing is told apart: its key, run or voter may be a mistake.
    """
    retractions = [row for row in feedback if _taken_back(row) is not None]
    by_voter = grouped(retractions, lambda row: (row.source, row.user_id, row.run_id))
    effective: set[str] = set()
    left: list[LeftOut] = []

    def stands(row: Feedback | Comparison, row_id: str, *runs: str) -> bool:
        met = [each for run in runs for each in by_voter.get((row.source, row.user_id, run), ())]
        hits = {each.feedback_id for each in met if _retracts(each, row)}
        effective.update(hits)
        if hits:
            left.append((row_id, "retracted"))
        return not hits

    said = [row for row in feedback if _taken_back(row) is None]
    standing = [row for row in said if stands(row, row.feedback_id, row.run_id)]
    compared = [row for row in comparisons if stands(row, row.comparison_id, row.run_a, row.run_b)]
    for row in retractions:
        had = row.feedback_id in effective
        left.append((row.feedback_id, "retraction" if had else "nothing_to_retract"))
    return Standing(standing, compared, left)


def _taken_back(row: Feedback) -> Mapping[str, Any] | None:
    """What a retraction takes back; None of other feedback."""
    is_one = row.key == RETRACTION and isinstance(row.value, Mapping) and "key" in row.value
    return row.value if is_one else None


def _retracts(retraction: Feedback, row: Feedback | Comparison) -> bool:
    """Whether a retraction by the voter of a row, of one of its runs, is meant for it."""
    what = _taken_back(retraction) or {}
    if row.created_at > retraction.created_at:
        return False
    if isinstance(row, Feedback):
        return what.get("key") in (None, row.key)
    against = what.get("against")
    return what.get("key") in (None, "comparison") and against in (None, row.run_a, row.run_b)
