"""Preferences that somebody stated outright: corrections and comparisons.

A *preference* is one answer over another, as an opinion on the question "which of these two?". A
judge that contradicts itself when the two answers are shown in the other order has stated nothing.
Whatever is not said by a person, a judge's correction included, weighs as a judge's word.

Knows nothing of thumbs, nor of which preference carries in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from agentpref.prefer.votes import LeftRow, Opinion, Reason, Voter, grouped, sift
from agentpref.record.messages import canonical
from agentpref.types import Comparison, Feedback, Message, Origin, Run


class Preference(NamedTuple):
    """One answer over another; ``run`` is the one that the chosen answer comes from.

    ``chosen_runs`` and ``rejected_runs`` wrote the two answers; none wrote a correction.
    """

    run: Run
    chosen: Message
    rejected: Message
    chosen_runs: tuple[Run, ...] = ()
    rejected_runs: tuple[Run, ...] = ()


def stated_preferences(
    feedback: Iterable[Feedback], comparisons: Sequence[Comparison], runs: Mapping[str, Run]
) -> tuple[list[Opinion[Preference]], list[LeftRow]]:
    """Read the corrections among some feedback, and comparisons; pass over other feedback."""
    corrected = [
        (row.feedback_id, _read_correction(row, row.correction, runs))
        for row in feedback
        if row.correction is not None
    ]
    flipped = _flipped(comparisons)
    compared: list[tuple[str, Opinion[Preference] | Reason]] = [
        (
            row.comparison_id,
            "judge_flipped" if row.comparison_id in flipped else _read_comparison(row, runs),
        )
        for row in comparisons
    ]
    return sift([*corrected, *compared])


def preference_opinion(
    preference: Preference,
    *,
    rows: tuple[str, ...],
    said_at: float,
    voters: frozenset[Voter],
    origin: Origin,
    tie: bool = False,
) -> Opinion[Preference]:
    """Make a preference one side of the question between its two answers, in either order."""
    chosen, rejected = canonical(preference.chosen), canonical(preference.rejected)
    question = (preference.run.prompt.id, frozenset((chosen, rejected)))
    return Opinion(rows, said_at, voters, question, None if tie else chosen, origin, preference)


def _read_correction(
    row: Feedback, correction: Message, runs: Mapping[str, Run]
) -> Opinion[Preference] | Reason:
    run = runs.get(row.run_id)
    if run is None:
        return "unknown_run"
    if canonical(correction) == canonical(run.output):
        return "identical_answers"
    return preference_opinion(
        Preference(run, correction, run.output, rejected_runs=(run,)),
        rows=(row.feedback_id,),
        said_at=row.created_at,
        voters=frozenset({(row.source, row.user_id)}),
        origin="correction" if row.source == "human" else "judge",
    )


def _read_comparison(row: Comparison, runs: Mapping[str, Run]) -> Opinion[Preference] | Reason:
    a, b = runs.get(row.run_a), runs.get(row.run_b)
    if a is None or b is None:
        return "unknown_run"
    if a.prompt.id != b.prompt.id:
        return "different_prompts"
    if canonical(a.output) == canonical(b.output):
        return "identical_answers"
    better, worse = (b, a) if row.winner == "b" else (a, b)
    return preference_opinion(
        Preference(better, better.output, worse.output, (better,), (worse,)),
        rows=(row.comparison_id,),
        said_at=row.created_at,
        voters=frozenset({(row.source, row.user_id)}),
        origin="comparison" if row.source == "human" else "judge",
        tie=row.winner == "tie",
    )


def _flipped(comparisons: Iterable[Comparison]) -> frozenset[str]:
    """Find the comparisons by judges whose verdict hangs on which of the two runs came first."""
    judged = sorted(
        (row for row in comparisons if row.source != "human"),
        key=lambda row: (row.created_at, row.comparison_id),
    )
    same_runs = grouped(
        judged, lambda row: (row.source, row.user_id, frozenset((row.run_a, row.run_b)))
    )
    return frozenset(
        row.comparison_id for rows in same_runs.values() if _order_decides(rows) for row in rows
    )


def _order_decides(same_runs: Iterable[Comparison]) -> bool:
    """Say whether the newest verdicts of the two orders differ."""
    newest = {row.run_a: _winner(row) for row in same_runs}
    return len(set(newest.values())) > 1


def _winner(row: Comparison) -> str | None:
    return {"a": row.run_a, "b": row.run_b, "tie": None}[row.winner]
