"""Open WebUI's ratings, as its administrators export them, each with the chat at that time.

What a rating says is read by ``webui_rating.py``, for this importer and for the receiver of Open
WebUI's events, and both give it the same runs and voters. So a rating that the receiver took is
known to an import, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

from agentpref.prefer.formats import Fields
from agentpref.prefer.formats.webui_rating import (
    APP,
    WORDS,
    Rating,
    Shown,
    rating_of,
    run_id_of,
)
from agentpref.prefer.logged import (
    LeftOut,
    LogFormat,
    Logged,
    LoggedComparison,
    LoggedRun,
    LoggedScore,
)
from agentpref.types import INCOMPLETE, THUMBS


def read(row: Fields) -> Iterator[Logged]:
    """Read one rating: the runs that it judges, and what it says of them.

    A thumb on one of several answers is a comparison with each of the others, too. What the
    snapshot shows too little of is left out, and so is the rating if that is its own answer.
    """
    if row["type"] != "rating":
        yield LeftOut(f"feedback of type {row['type']}")
        return
    rating = rating_of(row)
    why = rating.answer.left_out or rating.prompt_left_out
    if why is not None:
        yield LeftOut(f"rating of an answer: {why}")
        return
    others = [*rating.comparisons]
    yield _run(rating, rating.answer)
    judged, at = run_id_of(rating.answer.message_id), rating.updated_at or rating.created_at
    jury = {"jury": rating.jury} if others else {}
    yield LoggedScore(
        id=rating.feedback_id,
        created_at=at,
        run_id=judged,
        trace_id=None,
        key=WORDS if rating.liked is None else THUMBS,
        score=None if rating.liked is None else float(rating.liked),
        value={APP: {**rating.said, **jury}},
        comment=rating.comment,
        source="human",
        user_id=rating.voter,
        scale=None if rating.liked is None else (0.0, 1.0),
    )
    for other, winner in others:
        if other.left_out is not None:
            yield LeftOut(f"comparison with an answer: {other.left_out}")
            continue
        yield _run(rating, other)
        sides = (judged, run_id_of(other.message_id))
        better, worse = sides if winner != "b" else sides[::-1]
        yield LoggedComparison(
            # A rating that changes back is said once more, so its time is part of the id.
            id=f"{rating.feedback_id}/{other.message_id}/{at}",
            created_at=at,
            better=better,
            worse=worse,
            source="human",
            user_id=rating.jury,
            is_tie=winner == "tie",
        )


def _run(rating: Rating, shown: Shown) -> LoggedRun:
    broken = {} if shown.is_whole else {"finish_reason": INCOMPLETE}
    return LoggedRun(
        id=run_id_of(shown.message_id),
        created_at=shown.at or rating.created_at,
        messages=rating.prompt,
        output={"role": "assistant", "content": shown.text},
        model=shown.model,
        thread_id=rating.chat_id,
        user_id=rating.user_id,
        metadata={APP: rating.named(shown), **broken},
    )


OPEN_WEBUI = LogFormat(
    shapes=(("id", "type", "data", "meta", "created_at"),),
    read=read,
    optional=("user_id", "snapshot", "updated_at", "version", "user"),
)
