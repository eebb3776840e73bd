"""Which scores are thumbs, and which of them can be set against each other.

A *thumb* is a score that a person gave under any key, or that anyone gave under the key
``"thumbs"``: a program's ``latency`` is no liking. The scale is read from all scores of a key. From
0 to 1 (or false and true) the middle is .5; where some are negative, from -1 to 1, it is 0. Above
the middle is up, below it is down. A key with scores beyond these (stars, percentages) has a scale
that would have to be guessed, and a wrong guess turns one star into praise: none of them is used.

Knows nothing of corrections and comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from agentpref.prefer.preferences import Preference, preference_opinion
from agentpref.prefer.votes import LeftRow, Opinion, Reason, grouped, settle, sift
from agentpref.record.messages import canonical
from agentpref.record.stats import Scale
from agentpref.types import Feedback, Run

PAIRS_PER_PROMPT = 4
"""At most so many thumbs pairs come from one prompt, lest a popular one drown the others."""

Thumbed: TypeAlias = "list[Opinion[Run]]"
"""One answer to one prompt, as the thumbs on it that agree; the side is whether it is liked."""

Match: TypeAlias = "tuple[Thumbed, Thumbed]"
"""A liked and a disliked answer to the same prompt."""


def settled_thumbs(
    feedback: Iterable[Feedback], runs: Mapping[str, Run], scales: Iterable[Scale] | None = None
) -> tuple[list[Thumbed], list[LeftRow]]:
    """Find which answers are liked and which are not; pass over corrections.

    ``scales`` says what all scores of a key look like, where ``feedback`` is only some of them.
    """
    rows = [row for row in feedback if row.correction is None]
    middles = _middles(map(_scale, rows) if scales is None else scales)
    thumbs, misread = sift((row.feedback_id, _read(row, runs, middles)) for row in rows)
    answers, lost = settle(thumbs)
    return answers, [*misread, *lost]


def oppose(
    answers: Iterable[Thumbed],
) -> tuple[list[Opinion[Preference]], list[Thumbed], list[LeftRow]]:
    """Set liked answers against disliked ones of the same prompt.

    Returns the preferences, the lone answers (whose prompt has thumbs of one direction only), and
    the rows that :data:`PAIRS_PER_PROMPT` leaves out, the oldest of their prompt.
    """
    preferences: list[Opinion[Preference]] = []
    lone: list[Thumbed] = []
    left: list[LeftRow] = []
    for same_prompt in grouped(answers, lambda answer: answer[0].about.prompt.id).values():
        matches = _match(sorted(same_prompt, key=lambda answer: -answer[-1].said_at))
        preferences += [_preference(liked, disliked) for liked, disliked in matches]
        if matches:
            left += _unmatched(same_prompt, matches)
        else:
            lone += same_prompt
    return preferences, lone, left


def _scale(row: Feedback) -> Scale:
    """What one score shows of the scale that it is on."""
    if row.score is None:
        return Scale(row.key, row.source, 0, 0, 0)
    return Scale(row.key, row.source, 1, row.score < 0, abs(row.score) > 1)


def _is_thumb(said: Feedback | Scale) -> bool:
    return said.source == "human" or said.key == "thumbs"


def _middles(scales: Iterable[Scale]) -> dict[str, float | None]:
    """Find the neutral score of each key; ``None`` where its scale would have to be guessed."""
    thumbs = filter(_is_thumb, scales)
    return {key: _middle(same) for key, same in grouped(thumbs, lambda scale: scale.key).items()}


def _middle(scales: Sequence[Scale]) -> float | None:
    if any(scale.beyond for scale in scales):
        return None
    return 0.0 if any(scale.negative for scale in scales) else 0.5


def _read(
    row: Feedback, runs: Mapping[str, Run], middles: Mapping[str, float | None]
) -> Opinion[Run] | Reason:
    if row.score is None or not _is_thumb(row):
        return "not_a_thumb"
    if row.run_id not in runs:
        return "unknown_run"
    middle = middles[row.key]
    if middle is None:
        return "unknown_scale"
    if row.score == middle:
        return "neutral_score"
    run = runs[row.run_id]
    return Opinion(
        rows=(row.feedback_id,),
        said_at=row.created_at,
        voters=frozenset({(row.source, row.user_id)}),
        question=(run.prompt.id, canonical(run.output)),
        side=row.score > middle,
        origin="thumbs" if row.source == "human" else "judge",
        about=run,
    )


def _match(newest_first: Sequence[Thumbed]) -> list[Match]:
    """Pair off liked and disliked answers, going round the shorter list until both are used."""
    liked = [answer for answer in newest_first if answer[0].side]
    disliked = [answer for answer in newest_first if not answer[0].side]
    if not liked or not disliked:
        return []
    wanted = min(PAIRS_PER_PROMPT, max(len(liked), len(disliked)))
    return [(liked[i % len(liked)], disliked[i % len(disliked)]) for i in range(wanted)]


def _preference(liked: Thumbed, disliked: Thumbed) -> Opinion[Preference]:
    said = [*liked, *disliked]
    by_people = all(any(o.origin == "thumbs" for o in answer) for answer in (liked, disliked))
    chosen, rejected = (tuple(o.about for o in answer) for answer in (liked, disliked))
    return preference_opinion(
        Preference(chosen[0], chosen[0].output, rejected[0].output, chosen, rejected),
        rows=tuple(row for opinion in said for row in opinion.rows),
        said_at=max(opinion.said_at for opinion in said),
        voters=frozenset().union(*(opinion.voters for opinion in said)),
        origin="thumbs" if by_people else "judge",
    )


def _unmatched(answers: Iterable[Thumbed], matches: Iterable[Match]) -> list[LeftRow]:
    used = {opinion.rows for match in matches for answer in match for opinion in answer}
    spare = (opinion for answer in answers for opinion in answer if opinion.rows not in used)
    return [row for opinion in spare for row in opinion.leave("over_limit")]
