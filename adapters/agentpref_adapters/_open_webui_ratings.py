"""What a rating of Open WebUI becomes: a thumb, comparisons, a correction or words on a run.

A rating names a message of a chat. The gateway stores both ids with its runs, because Open WebUI
sends them in headers. An answer that no run is known of is recorded from the rating's snapshot of
the chat, if that shows what the model was asked.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agentpref.errors import InvalidFeedback, UnknownNamespace
from agentpref.prefer.formats.webui_rating import (
    APP,
    WORDS,
    Rating,
    Shown,
    rating_of,
    run_id_of,
    voter_of,
)
from agentpref.record.log import Log
from agentpref.types import INCOMPLETE, RETRACTION, THUMBS, Feedback, Run
from agentpref_adapters._given import about, given, given_in

_logger = logging.getLogger("agentpref")

_EARLIER = 24 * 3600.0
"""How much earlier than its message a run may have been recorded, by clocks that differ."""

_FLUSH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a rating became.

    ``run_id`` is the judged run, or None; ``source`` says whether it was in the log or was recorded
    from the snapshot. ``judged`` names what was recorded: ``"thumbs"``, ``"comparison"``,
    ``"correction"``, ``"words"``, ``"withdrawn"``, or ``"unchanged"`` for what was known already.
    ``left_out`` says what was not, and why.
    """

    run_id: str | None
    source: Literal["log", "snapshot"] | None = None
    judged: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def record_feedback(log: Log, feedback: Mapping[str, Any], *, edits: bool = False) -> Recorded:
    """Record one rating; the same rating again changes nothing, and a newer state of it counts.

    A rating of 1 or -1 is a thumb. Where the question had several answers, the rated one won or
    lost against each of the others, as Open WebUI counts it.

    An answer that was changed in Open WebUI is judged as what the model wrote. With ``edits``, one
    that is not disliked is a correction of its run, if that is in the log, and the thumb is left
    out, as it is of the changed text. Outlet filters change answers too, and Open WebUI does not
    tell them from people: pass it only if no filter rewrites answers. (One that puts text before or
    after an answer, such as a footer, may be there.)

    Args:
        log: where runs are looked up and judgements go.
        feedback: what ``GET /api/v1/evaluations/feedback/{id}`` gives, or an item of an export.
        edits: whether changed answers are corrections by whoever rates them.

    Raises:
        ExchangeError: the object is no rating; the message names the field.
        InvalidFeedback, NotKept: as for ``log.feedback``.
    """
    rating = rating_of(feedback)
    since = _earliest(rating.created_at)
    before = given_in(log, rating.chat_id, APP, rating.feedback_id, since=since)
    family = _Family(log, rating)
    run_id, source = family.run_of(rating.answer)
    if run_id is None:
        why = rating.answer.left_out or rating.prompt_left_out or "it is not in the snapshot"
        _logger.warning(
            "Open WebUI's rating %s teaches nothing: no run of its message is in the log, and from "
            "the snapshot it cannot be recorded (%s)", rating.feedback_id, why,
        )  # fmt: skip
        return Recorded(None, left_out={"rating": why})
    edited = rating.answer.edited
    fixed = edited if edits and rating.liked is not False else None
    liked = rating.liked if fixed is None else None
    others = [*rating.comparisons] if fixed is None else []
    said = {
        **rating.said,
        **({"edited": hashlib.sha256(fixed.encode()).hexdigest()} if fixed is not None else {}),
        **({"jury": rating.jury} if others else {}),
    }
    if before is not None:
        known = about(before, APP)
        if known.get("updated_at", 0.0) > rating.updated_at:
            return Recorded(run_id, source, ("unchanged",), {"rating": "a newer state is known"})
        state = (_liked(before), before.comment, {**known, "updated_at": None})
        if state == (liked, rating.comment, {**said, "updated_at": None}):
            return Recorded(run_id, source, ("unchanged",))
        _take_back(log, before, said, is_thumb=liked is not None)
    left_out, compared = dict[str, str](), list[str]()
    if fixed is not None:
        log.correct(run_id, fixed, user_id=rating.voter)
        if rating.liked is not None:
            left_out["thumbs"] = "the answer was edited, and the rating is of what it became"
    elif edited is not None:
        left_out["edit"] = (
            "a dislike is no correction" if edits
            else "a person or an outlet filter changed the answer; edits=True takes it for a person"
        )  # fmt: skip
    for other, winner in others:
        other_id, _ = family.run_of(other)
        try:
            if other_id is None:
                raise InvalidFeedback(other.left_out or "it is not in the snapshot")
            log.compare(run_id, other_id, winner=winner, user_id=rating.jury)
            compared.append("comparison")
        except InvalidFeedback as error:
            left_out[f"comparison with {other.message_id}"] = str(error)
    # Last, because it marks the rating as known: what fails before it is tried again as a whole.
    log.feedback(
        run_id,
        key=WORDS if liked is None else THUMBS,
        score=liked,
        comment=rating.comment,
        value={APP: said},
        user_id=rating.voter,
    )
    corrected = [] if fixed is None else ["correction"]
    judged = (*corrected, "words" if liked is None else "thumbs", *compared)
    return Recorded(run_id, source, judged, left_out)


def _take_back(log: Log, before: Feedback, said: Mapping[str, Any], *, is_thumb: bool) -> None:
    """Take back what an earlier state of a rating said, and a later one says no more."""
    known, voter = about(before, APP), voter_of(said["feedback_id"])
    if before.key == THUMBS and not is_thumb:
        log.retract(before.run_id, THUMBS, user_id=voter)
    if "edited" in known and "edited" not in said:
        log.retract(before.run_id, "correction", user_id=voter)
    if "jury" in known and "jury" not in said:
        log.retract(before.run_id, "comparison", user_id=known["jury"])


def _liked(row: Feedback) -> bool | None:
    return row.score == 1 if row.key == THUMBS else None


def _earliest(at: float) -> float | None:
    """From when on something may have been recorded that Open WebUI dates so."""
    return at - _EARLIER if at > _EARLIER else None


def withdraw_feedback(log: Log, feedback_id: str) -> Recorded:
    """Take back everything that a rating said, because it was deleted."""
    row = given(log, APP, feedback_id)
    if row is None:
        return Recorded(None, left_out={"rating": "nothing of it is in the log"})
    _withdraw(log, row)
    return Recorded(row.run_id, "log", ("withdrawn",))


def keep_only(log: Log, feedback_ids: Iterable[str], *, until: float = float("inf")) -> list[str]:
    """Take back the ratings that Open WebUI has no more, of those recorded ``until`` a time.

    Returns:
        The ids of the ratings that were taken back.
    """
    kept, standing = {*feedback_ids}, dict[tuple[str, str | None], Feedback]()
    log.flush(_FLUSH_SECONDS)
    try:
        for row in log.home.feedback(log.namespace):
            place = (row.run_id, row.user_id)
            if row.key == RETRACTION:
                standing.pop(place, None)
            elif (of := about(row, APP).get("feedback_id")) is not None and of not in kept:
                standing[place] = row
    except UnknownNamespace:  # nothing is logged here yet
        return []
    gone = [row for row in standing.values() if row.created_at <= until]
    for row in gone:
        _withdraw(log, row)
    return [about(row, APP)["feedback_id"] for row in gone]


def _withdraw(log: Log, row: Feedback) -> None:
    said = about(row, APP)
    log.retract(row.run_id, None, user_id=voter_of(said["feedback_id"]))
    if "jury" in said:
        log.retract(row.run_id, "comparison", user_id=said["jury"])


class _Family:
    """The answers to one question, and the runs that they are."""

    def __init__(self, log: Log, rating: Rating) -> None:
        self._log, self._rating = log, rating
        self._runs = dict[str, Run]()
        self._unnamed: list[Run] = []
        log.flush(_FLUSH_SECONDS)
        at = min(filter(None, (rating.answer.at, rating.created_at)), default=0.0)
        try:
            for run in log.home.runs(log.namespace, thread=rating.chat_id, since=_earliest(at)):
                named = run.metadata.get(APP) or {}
                if named.get("task"):  # a title, say, which nobody rates
                    continue
                if message_id := named.get("message_id"):
                    self._runs[message_id] = run  # of several calls, the last one answers
                else:
                    self._unnamed.append(run)
        except UnknownNamespace:  # nothing is logged here yet
            return

    def run_of(self, shown: Shown) -> tuple[str | None, Literal["log", "snapshot"] | None]:
        """The run of an answer: in the log by its message, or by its text, or recorded now."""
        run = self._runs.get(shown.message_id) or self._by_text(shown.text)
        if run is not None:
            is_ours = (run.metadata.get(APP) or {}).get("from") == "snapshot"
            return run.run_id, "snapshot" if is_ours else "log"
        if shown.left_out:
            return None, None
        # What another answer to the same question was given is known better than by the snapshot.
        family = (self._rating.answer, *self._rating.siblings)
        known = next((r for s in family if (r := self._runs.get(s.message_id))), None)
        asked = known.prompt.messages if known else self._rating.prompt
        if not asked:
            return None, None
        broken = {} if shown.is_whole else {"finish_reason": INCOMPLETE}
        run_id = self._log.record(
            asked,
            shown.text,
            run_id=run_id_of(shown.message_id),
            model=shown.model,
            thread_id=self._rating.chat_id,
            user_id=self._rating.user_id,
            tools=known.prompt.tools if known else (),
            metadata={APP: self._rating.named(shown), **broken},
        )
        return run_id, "snapshot"

    def _by_text(self, text: str) -> Run | None:
        same = (r for r in reversed(self._unnamed) if str(r.output.get("content")).strip() == text)
        return next(same, None) if text else None
