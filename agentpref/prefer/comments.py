"""Which comments stand: the newest of each voter on each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentpref.prefer.signals import side_of
from agentpref.record.scales import Bounds
from agentpref.types import Feedback


def standing(
    feedback: Sequence[Feedback], scales: Mapping[tuple[str, str], Bounds]
) -> list[tuple[Feedback, bool]]:
    """The newest comment of each voter on each answer, and whether the voter likes the answer.

    A correction is no comment: it says itself how the answer should have been. Those of models and
    programs count for nothing.
    """
    newest: dict[tuple[str, str | None], Feedback] = {}
    likes: dict[tuple[str, str | None], bool] = {}
    for row in sorted(feedback, key=lambda row: (row.created_at, row.feedback_id)):
        voter = (row.run_id, row.user_id)
        if row.source != "human" or row.correction is not None:
            continue
        side = side_of(row, dict(scales))
        if not isinstance(side, str):
            likes[voter] = side is True
        if (row.comment or "").strip():
            newest[voter] = row
    return [(row, likes.get(voter, False)) for voter, row in newest.items()]
