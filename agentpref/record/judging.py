"""The part of a log that judges: thumbs, scores, corrections and comparisons, taken back or not.

A judgement names a run by the id that ``record`` returned, or a trace, whose last answer it means.
The thread of the log that writes finds it, after everything that was recorded before.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeAlias

from agentpref.errors import InvalidFeedback, described
from agentpref.home import Home
from agentpref.record import declared
from agentpref.record.database import connect, translated
from agentpref.record.finding import of_trace
from agentpref.record.ingest.checks import (
    Judgement,
    as_bool,
    as_output,
    checked_id,
    require_answer,
    tidy,
)
from agentpref.record.messages import check_output, new_id
from agentpref.types import (
    COMMENT,
    RETRACTION,
    THUMBS,
    Comparison,
    Feedback,
    Message,
    Source,
    Winner,
)

if TYPE_CHECKING:
    from uuid import UUID

Id: TypeAlias = "str | UUID"


class Judging(ABC):
    """What a log takes in of people's, models' and programs' judgements.

    Ids may be strings or UUIDs, also in another case, without dashes, or as the id of a message of
    LangChain (``lc_run--…``).
    """

    home: Home
    namespace: str

    @abstractmethod
    def _commit(self, given: Judgement) -> Judgement:
        """Put a judgement on disk."""

    @abstractmethod
    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded is on disk."""

    def thumbs(
        self,
        run_id: Id | None = None,
        up: bool | None = None,
        comment: str | None = None,
        source: Source = "human",
        user_id: str | None = None,
        *,
        trace_id: Id | None = None,
    ) -> str:
        """Give a run a thumbs up or down: feedback with the key ``"thumbs"``, score 1 or 0.

        >>> log.thumbs(run, up=False, comment="too long")
        >>> log.thumbs(trace_id=trace, up=True)

        Args:
            run_id: the run.
            up: whether it is liked; it must be given.
            comment: the judge's own words.
            source: ``"human"``, ``"model"`` or ``"code"``.
            user_id: who judged.
            trace_id: a trace instead of a run: its last answer in this log's namespace.
        """
        return self.feedback(
            run_id,
            trace_id=trace_id,
            key=THUMBS,
            score=as_bool("up", up),
            comment=comment,
            source=source,
            user_id=user_id,
        )

    def feedback(
        self,
        run_id: Id | None = None,
        *,
        trace_id: Id | None = None,
        key: str | None = None,
        score: float | None = None,
        value: Any = None,
        comment: str | None = None,
        source: Source = "human",
        user_id: str | None = None,
    ) -> str:
        """Judge a run: a score, a value or words, in any combination.

        Scores under the key ``"thumbs"`` are preferences, and so are those under keys that
        :meth:`declare` names. A thumb is 0 or 1, a bool, or -1 or 1. One source (``"human"``, say)
        gives one of the two kinds: the first 0 or -1 decides whether a 0 means a dislike or
        nothing, and the other kind is refused. All other feedback is kept, and trains nothing.

        >>> log.feedback(run, key="thumbs", score=0)
        >>> log.feedback(run, comment="the second paragraph is wrong")

        Args:
            run_id: the run.
            trace_id: a trace instead of a run: its last answer in this log's namespace.
            key: what is judged, such as ``"thumbs"`` or ``"helpfulness"``; words alone need none.
            score: a finite number or a bool; more is better.
            value: anything that JSON can hold.
            comment: the judge's own words.
            source: ``"human"``, ``"model"`` or ``"code"``.
            user_id: who judged.
        """
        now, place = time.time(), self._place(run_id, trace_id)
        if key is None and score is None and value is None:
            key = COMMENT
        given = Feedback(new_id(), place, now, key, score, value, comment, source, user_id)  # type: ignore[arg-type]  # _commit checks the key
        return self._commit(given).feedback_id

    def correct(
        self,
        run_id: Id | None = None,
        output: str | Message = "",
        *,
        trace_id: Id | None = None,
        comment: str | None = None,
        source: Source = "human",
        user_id: str | None = None,
    ) -> str:
        """Say what a run should have answered: feedback with the key ``"correction"``.

        Args:
            run_id: the run.
            output: the answer as it should have been; it must say something.
            trace_id: a trace instead of a run: its last answer in this log's namespace.
            comment: the judge's own words.
            source: who corrected.
            user_id: who corrected.

        Raises:
            InvalidMessage: the output cannot be stored.
        """
        place, now, fixed = self._place(run_id, trace_id), time.time(), as_output(output)
        check_output(fixed)
        require_answer(fixed)
        given = Feedback(
            new_id(), place, now, "correction", None, None, comment, source, user_id, tidy(fixed)
        )
        return self._commit(given).feedback_id

    def compare(
        self,
        run_a: Id,
        run_b: Id,
        *,
        winner: Winner,
        source: Source = "human",
        user_id: str | None = None,
        comment: str | None = None,
    ) -> str:
        """Say which of two answers to one prompt is better: ``"a"``, ``"b"`` or ``"tie"``.

        Raises:
            InvalidFeedback: the runs have different prompts, or an argument is wrong.
        """
        given = Comparison(new_id(), time.time(), run_a, run_b, winner, source, user_id, comment)  # type: ignore[arg-type]  # _commit makes text of UUIDs
        return self._commit(given).comparison_id

    def retract(
        self,
        run_id: Id | None = None,
        key: str | None = THUMBS,
        *,
        trace_id: Id | None = None,
        against: Id | None = None,
        comment: str | None = None,
        source: Source = "human",
        user_id: str | None = None,
    ) -> str:
        """Take back what the same voter said of a run before; nothing is trained on it any more.

        A later judgement by the voter counts again. The rows stay as history.

        >>> log.retract(run, user_id="ana")

        Args:
            run_id: the run.
            key: what is taken back: a key of feedback, ``"correction"``, ``"comparison"`` for the
                comparisons with other runs, or None for everything.
            trace_id: a trace instead of a run: its last answer in this log's namespace.
            against: only the comparison with this other run.
            comment: the voter's own words.
            source: who said it, as it was given then.
            user_id: who said it; other people's judgements stay.
        """
        if key is not None and not (isinstance(key, str) and key):
            raise InvalidFeedback(
                f"key is {described(key)}; pass the key of the feedback, or None for all"
            )
        if against is not None and key != "comparison":
            raise InvalidFeedback(
                f"against is {described(against)}, with another key; pass the other run's id with "
                "the key 'comparison', or leave it out"
            )
        other = {} if against is None else {"against": checked_id("against", against)}
        now, place, what = time.time(), self._place(run_id, trace_id), {"key": key} | other
        given = Feedback(new_id(), place, now, RETRACTION, None, what, comment, source, user_id)
        return self._commit(given).feedback_id

    def declare(self, key: str, *, low: float = 0, high: float = 1, replace: bool = False) -> None:
        """Declare that the scores under a key are preferences, from ``low`` to ``high``.

        Above the middle is liked, below it disliked. It holds for this namespace, for all sources,
        and for scores that were given before. Declaring a key again changes nothing.

        >>> log.declare("stars", low=1, high=5)

        Args:
            key: the key of the scores; ``"thumbs"`` is declared from the start, and can be set to
                0 to 1 or to -1 to 1.
            low: the lowest score.
            high: the highest score.
            replace: give a declared key another scale. Scores that were given keep theirs.

        Raises:
            ConfigError: the key has another scale, and ``replace`` is false.
            InvalidFeedback: the key or the scale is none.
        """
        self.flush()
        with translated(self.home), closing(connect(self.home)) as connection:
            declared.declare(connection, self.namespace, key, (low, high), replace=replace)

    def undeclare(self, key: str) -> bool:
        """Take a declaration back: the scores under the key are kept, and train nothing any more.

        Returns:
            Whether the key was declared.
        """
        self.flush()
        with translated(self.home), closing(connect(self.home)) as connection:
            return declared.undeclare(connection, self.namespace, key)

    def _place(self, run_id: Id | None, trace_id: Id | None) -> str:
        """What is judged: a run, or the last answer of a trace."""
        if run_id is not None and trace_id is not None:
            raise InvalidFeedback("run_id and trace_id were both given; pass one of them")
        if trace_id is not None:
            return of_trace(self.namespace, checked_id("trace_id", trace_id))
        if run_id is None:
            raise InvalidFeedback("no run was named; pass run_id= or trace_id=")
        return checked_id("run_id", run_id)
