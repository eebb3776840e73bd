"""Reads feedback and comparisons as votes.

A correction or a comparison states a *preference*: one answer over another to the same prompt.
Thumbs state which answers are liked; a liked and a disliked answer to the same prompt imply a
preference too, and a thumb with no opposite stays a lone one.

A *thumb* is a score that a person gave under any key, or that anyone gave under the key
``"thumbs"``; a program's ``latency`` is none. The scale is read from all scores of a key. From 0 to
1 the middle is .5; where some scores are negative, from -1 to 1, it is 0. Above the middle is up,
below it is down. Scores outside these ranges (stars, percentages) are left out: a wrong guess of
their scale turns one star into praise.

What a judge says counts as a judge's vote, whatever form it takes. A judge that contradicts itself
when the two answers change places states nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from agentpref.prefer.votes import LeftOut, Reason, Vote, grouped, separate, settle
from agentpref.record.messages import canonical
from agentpref.record.store import Scale
from agentpref.types import Comparison, Feedback, Message, Origin, Run

S = TypeVar("S")

PAIRS_PER_PROMPT = 4
"""How many thumbs pairs one prompt gives at most, lest a popular prompt drown the others."""


class Preference(NamedTuple):
    """One answer over another; ``run`` is the one that the chosen answer comes from.

    ``chosen_runs`` and ``rejected_runs`` are the runs that wrote the two answers; a correction has
    none.
    """

    run: Run
    chosen: Message
    rejected: Message
    chosen_runs: tuple[Run, ...] = ()
    rejected_runs: tuple[Run, ...] = ()


JudgedAnswer: TypeAlias = "list[Vote[Run]]"
"""The agreeing thumbs on one answer to one prompt; the side is whether it is liked."""


def stated_preferences(
    feedback: Iterable[Feedback], comparisons: Sequence[Comparison], runs: Mapping[str, Run]
) -> tuple[list[Vote[Preference]], list[LeftOut]]:
    """Read the corrections among some feedback, and comparisons."""
    flipped = _flipped(comparisons)
    readings = [
        (row.feedback_id, _read_correction(row, row.correction, runs))
        for row in feedback
        if row.correction is not None
    ]
    for row in comparisons:
        reading = _read_comparison(row, runs)
        is_flipped = row.comparison_id in flipped
        readings.append((row.comparison_id, "judge_flipped" if is_flipped else reading))
    return separate(readings)


def settled_thumbs(
    feedback: Iterable[Feedback], runs: Mapping[str, Run], scales: Iterable[Scale] | None = None
) -> tuple[list[JudgedAnswer], list[LeftOut]]:
    """Find which answers are liked and which are disliked; corrections are no thumbs.

    ``scales`` describes all scores of each key, where ``feedback`` holds only some of them.
    """
    rows = [row for row in feedback if row.correction is None]
    middles = _middles(map(_scale, rows) if scales is None else scales)
    votes, misread = separate((row.feedback_id, _read_thumb(row, runs, middles)) for row in rows)
    answers, lost = settle(votes)
    return answers, [*misread, *lost]


def match_thumbs(
    answers: Iterable[JudgedAnswer],
) -> tuple[list[Vote[Preference]], list[JudgedAnswer], list[LeftOut]]:
    """Match liked answers with disliked ones of the same prompt.

    Returns the preferences, the lone answers (whose prompt has thumbs of one direction only), and
    the rows that :data:`PAIRS_PER_PROMPT` leaves out, the oldest of their prompt.
    """
    preferences: list[Vote[Preference]] = []
    lone: list[JudgedAnswer] = []
    left: list[LeftOut] = []
    for same_prompt in grouped(answers, lambda answer: answer[0].subject.prompt.id).values():
        matches = _matches(sorted(same_prompt, key=lambda answer: -answer[-1].created_at))
        preferences += [_implied(liked, disliked) for liked, disliked in matches]
        if not matches:
            lone += same_prompt
            continue
        used = {vote.rows for match in matches for answer in match for vote in answer}
        unused = [vote for answer in same_prompt for vote in answer if vote.rows not in used]
        left += [row for vote in unused for row in vote.left_out("over_limit")]
    return preferences, lone, left


def _vote(
    row: Feedback | Comparison, question: Hashable, side: Hashable, origin: Origin, subject: S
) -> Vote[S]:
    """What one row says, as a vote of whoever said it."""
    row_id = row.feedback_id if isinstance(row, Feedback) else row.comparison_id
    voters = frozenset({(row.source, row.user_id)})
    kind = origin if row.source == "human" else "judge"
    return Vote((row_id,), row.created_at, voters, question, side, kind, subject)


def _answers(preference: Preference) -> tuple[Hashable, Hashable]:
    """The question which of two answers is better, and the side of the chosen one."""
    chosen, rejected = canonical(preference.chosen), canonical(preference.rejected)
    return (preference.run.prompt.id, frozenset((chosen, rejected))), chosen


def _read_correction(
    row: Feedback, correction: Message, runs: Mapping[str, Run]
) -> Vote[Preference] | Reason:
    run = runs.get(row.run_id)
    if run is None:
        return "unknown_run"
    if canonical(correction) == canonical(run.output):
        return "identical_answers"
    preference = Preference(run, correction, run.output, rejected_runs=(run,))
    return _vote(row, *_answers(preference), "correction", preference)


def _read_comparison(row: Comparison, runs: Mapping[str, Run]) -> Vote[Preference] | Reason:
    a, b = runs.get(row.run_a), runs.get(row.run_b)
    if a is None or b is None:
        return "unknown_run"
    if a.prompt.id != b.prompt.id:
        return "different_prompts"
    if canonical(a.output) == canonical(b.output):
        return "identical_answers"
    better, worse = (b, a) if row.winner == "b" else (a, b)
    preference = Preference(better, better.output, worse.output, (better,), (worse,))
    question, side = _answers(preference)
    return _vote(row, question, None if row.winner == "tie" else side, "comparison", preference)


def _flipped(comparisons: Iterable[Comparison]) -> set[str]:
    """Find the comparisons by judges whose newest verdict depends on the order of the two runs."""
    judged = [row for row in comparisons if row.source != "human"]
    judged.sort(key=lambda row: (row.created_at, row.comparison_id))
    by_runs = grouped(judged, lambda r: (r.source, r.user_id, frozenset((r.run_a, r.run_b))))
    flipped: set[str] = set()
    for rows in by_runs.values():
        newest = {r.run_a: {"a": r.run_a, "b": r.run_b, "tie": None}[r.winner] for r in rows}
        if len(set(newest.values())) > 1:
            flipped |= {row.comparison_id for row in rows}
    return flipped


def _scale(row: Feedback) -> Scale:
    """What one score shows of its scale."""
    score = row.score or 0
    return Scale(row.key, row.source, row.score is not None, score < 0, abs(score) > 1)


def _is_thumb(row: Feedback | Scale) -> bool:
    return row.source == "human" or row.key == "thumbs"


def _middles(scales: Iterable[Scale]) -> dict[str, float | None]:
    """The neutral score of each key; ``None`` where its scale would have to be guessed."""
    middles: dict[str, float | None] = {}
    for key, same in grouped(filter(_is_thumb, scales), lambda scale: scale.key).items():
        signed = any(scale.negative for scale in same)
        middles[key] = None if any(scale.beyond for scale in same) else 0.0 if signed else 0.5
    return middles


def _read_thumb(
    row: Feedback, runs: Mapping[str, Run], middles: Mapping[str, float | None]
) -> Vote[Run] | Reason:
    if row.score is None or not _is_thumb(row):
        return "not_a_thumb"
    run = runs.get(row.run_id)
    if run is None:
        return "unknown_run"
    middle = middles[row.key]
    if middle is None:
        return "unknown_scale"
    if row.score == middle:
        return "neutral_score"
    question = (run.prompt.id, canonical(run.output))
    return _vote(row, question, row.score > middle, "thumbs", run)


def _matches(newest_first: Sequence[JudgedAnswer]) -> list[tuple[JudgedAnswer, JudgedAnswer]]:
    """Match liked and disliked answers, reusing the shorter list until both are used up."""
    liked = [answer for answer in newest_first if answer[0].side]
    disliked = [answer for answer in newest_first if not answer[0].side]
    if not liked or not disliked:
        return []
    wanted = min(PAIRS_PER_PROMPT, max(len(liked), len(disliked)))
    return [(liked[i % len(liked)], disliked[i % len(disliked)]) for i in range(wanted)]


def _implied(liked: JudgedAnswer, disliked: JudgedAnswer) -> Vote[Preference]:
    votes = [*liked, *disliked]
    by_people = all(any(v.origin == "thumbs" for v in answer) for answer in (liked, disliked))
    chosen, rejected = (tuple(v.subject for v in answer) for answer in (liked, disliked))
    preference = Preference(chosen[0], chosen[0].output, rejected[0].output, chosen, rejected)
    question, side = _answers(preference)
    return Vote(
        rows=tuple(row for vote in votes for row in vote.rows),
        created_at=max(vote.created_at for vote in votes),
        voters=frozenset().union(*(vote.voters for vote in votes)),
        question=question,
        side=side,
        origin="thumbs" if by_people else "judge",
        subject=preference,
    )
