"""Reads feedback and comparisons as votes.

A correction or a comparison states a *preference*: one answer over another to the same prompt.
Thumbs state which answers are liked; a liked and a disliked answer to the same prompt imply a
preference too, and a thumb with no opposite stays a lone one.

A *thumb* is a score under the key ``"thumbs"``, or under a key that was declared to be a
preference, whoever gave it; any other score, such as a ``latency``, is none. Above the middle of
the scale is up, below it is down. The scale is the row's own, else that of its key.

Whoever changes their mind counts with what they said last. A neutral score supersedes a like, a
correction supersedes the voter's earlier ones of that answer. ``retractions.py`` has removed what
was taken back.

What a judge says counts as a judge's vote, whatever form it takes. Where it prefers a revision to
the answer that was revised, the vote's origin is the comment or the critique that led to it. A
model has no vote in a tag in which no calibration trusts it. A judge that contradicts itself when
the two answers change places states nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from agentpref.prefer.votes import LeftOut, Reason, Vote, grouped, separate, settle
from agentpref.record.messages import canonical
from agentpref.record.scales import UNIT, Bounds, is_known, shown_by
from agentpref.record.standards import Standards
from agentpref.types import (
    REVISED_BY,
    REVISED_FROM,
    THUMBS,
    Comparison,
    Feedback,
    Message,
    Origin,
    Run,
)

S = TypeVar("S")

PAIRS_PER_PROMPT = 4
"""How many thumbs pairs one prompt gives at most, lest a popular prompt drown the others."""

NOISE: Mapping[Origin, float] = {"correction": 0.02, "comparison": 0.05, "thumbs": 0.05}
"""The share ε of flipped labels that is assumed of people's signals."""

CODE_NOISE = 0.05
"""The same of what a program says."""


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
    feedback: Iterable[Feedback],
    comparisons: Sequence[Comparison],
    runs: Mapping[str, Run],
    standards: Standards,
) -> tuple[list[Vote[Preference]], list[LeftOut]]:
    """Read the corrections among some feedback, and comparisons."""
    flipped = _flipped(comparisons)
    corrections = [row for row in feedback if row.correction is not None]
    readings = _read_corrections(corrections, runs, standards)
    for row in comparisons:
        reading = _read_comparison(row, runs, standards)
        is_flipped = row.comparison_id in flipped
        readings.append((row.comparison_id, "judge_flipped" if is_flipped else reading))
    return separate(readings)


def settled_thumbs(
    feedback: Iterable[Feedback], runs: Mapping[str, Run], standards: Standards
) -> tuple[list[JudgedAnswer], list[LeftOut]]:
    """Find which answers are liked and which are disliked; corrections are no thumbs."""
    rows = [row for row in feedback if row.correction is None]
    declared = {(scale.key, scale.source): scale[2:] for scale in standards.scales}
    votes, misread = separate(
        (row.feedback_id, _read_thumb(row, runs, declared, standards)) for row in rows
    )
    answers, lost = settle(votes, undecided="neutral_score")
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
    row: Feedback | Comparison,
    question: Hashable,
    side: Hashable,
    origin: Origin,
    subject: S,
    of: tuple[Run, Standards],
    by_judge: Origin = "judge",
) -> Vote[S] | Reason:
    """What one row says of a run, as a vote of whoever said it, if they are trusted.

    ``origin`` is that of what people say, and ``by_judge`` of what others do.
    """
    noise = _noise(row, origin, *of)
    if noise is None:
        return "uncalibrated_judge"
    row_id = row.feedback_id if isinstance(row, Feedback) else row.comparison_id
    voters = frozenset({(row.source, row.user_id)})
    kind = origin if row.source == "human" else by_judge
    return Vote((row_id,), row.created_at, voters, question, side, kind, subject, noise)


def _noise(
    row: Feedback | Comparison, origin: Origin, run: Run, standards: Standards
) -> float | None:
    """How likely a row is wrong; ``None`` if nobody knows."""
    if row.source == "human":
        return NOISE[origin]
    if row.source == "code":
        return CODE_NOISE
    return standards.judges.get(row.user_id or "", {}).get(run.tag)


def _answers(preference: Preference) -> tuple[Hashable, Hashable]:
    """The question which of two answers is better, and the side of the chosen one."""
    chosen, rejected = canonical(preference.chosen), canonical(preference.rejected)
    return (preference.run.prompt.id, frozenset((chosen, rejected))), chosen


def _read_corrections(
    rows: Iterable[Feedback], runs: Mapping[str, Run], standards: Standards
) -> list[tuple[str, Vote[Preference] | Reason]]:
    """Read corrections: of one answer, the newest of each voter counts."""
    newest: dict[Hashable, bytes] = {}
    readings: list[tuple[str, Vote[Preference] | Reason]] = []
    for row in sorted(rows, key=lambda row: (row.created_at, row.feedback_id), reverse=True):
        run = runs.get(row.run_id)
        if run is None or row.correction is None:
            readings.append((row.feedback_id, "unknown_run"))
            continue
        answer, fixed = canonical(run.output), canonical(row.correction)
        said = newest.setdefault((row.source, row.user_id, run.prompt.id, answer), fixed)
        if fixed != said:
            readings.append((row.feedback_id, "superseded"))
        elif fixed == answer:
            readings.append((row.feedback_id, "identical_answers"))
        else:
            preference = Preference(run, row.correction, run.output, rejected_runs=(run,))
            of = (run, standards)
            vote = _vote(row, *_answers(preference), "correction", preference, of)
            readings.append((row.feedback_id, vote))
    return readings


def _read_comparison(
    row: Comparison, runs: Mapping[str, Run], standards: Standards
) -> Vote[Preference] | Reason:
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
    side = None if row.winner == "tie" else side
    of, revised = (a, standards), _revised_by(better, worse)
    return _vote(row, question, side, "comparison", preference, of, revised)


def _revised_by(better: Run, worse: Run) -> Origin:
    """The origin of a judge's verdict: what one answer was revised by, if from the other."""
    about = better.metadata
    if about.get(REVISED_FROM) == worse.run_id:
        for origin in _REVISIONS:
            if about.get(REVISED_BY) == origin:
                return origin
    return "judge"


_REVISIONS: tuple[Origin, ...] = ("comment", "critique")


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


def side_of(row: Feedback, scales: Mapping[tuple[str, str], Bounds]) -> bool | Reason | None:
    """Whether a score is a like, a dislike or (``None``) neutral; else why it is no thumb."""
    if row.score is None:
        return "no_score"
    of_key = scales.get((row.key, row.source))
    if row.key != THUMBS and (of_key is None or not is_known(of_key)):
        return "undeclared_key"
    own = row.scale if row.scale is not None and is_known(row.scale) else of_key or row.scale
    low, high = own or shown_by([row.score]) or UNIT
    if not is_known((low, high)) or not low <= row.score <= high:
        return "unknown_scale"
    middle = (low + high) / 2
    return None if row.score == middle else row.score > middle


def _read_thumb(
    row: Feedback,
    runs: Mapping[str, Run],
    declared: Mapping[tuple[str, str], Bounds],
    standards: Standards,
) -> Vote[Run] | Reason:
    side, run = side_of(row, declared), runs.get(row.run_id)
    if run is None and side not in ("no_score", "undeclared_key"):
        return "unknown_run"
    if run is None or isinstance(side, str):
        return side  # type: ignore[return-value]  # without a run it is one of these two
    question = (run.prompt.id, canonical(run.output))
    return _vote(row, question, side, "thumbs", run, (run, standards))


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
        noise=max(min(vote.noise for vote in answer) for answer in (liked, disliked)),
    )
