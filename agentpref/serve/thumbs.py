"""Reads people's thumbs by revision: one vote per conversation.

A vote is a score of a person that counts as a thumb in training, too: under the key ``thumbs`` or
one that was declared, on its scale. What was taken back does not count, and of what one person said
of one answer the newest does. What judges and code say does not count: they were not served.

Thumbs in one conversation hang together, and a test that took them for so many coins would be too
sure. So the first one that stands is the vote of its thread; of its trace, if the run has no
thread; else of the run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from math import inf
from typing import NamedTuple

from agentpref.prefer.retractions import withdraw
from agentpref.prefer.signals import side_of
from agentpref.record.chains import Chains, read_feedback
from agentpref.record.messages import FEEDBACK_COLUMNS, as_json
from agentpref.record.store import Store
from agentpref.types import RETRACTION, THUMBS, Feedback


class ThumbVote(NamedTuple):
    """When a conversation's vote was given, on which revision, and whether it is a like."""

    at: float
    revision: str
    liked: bool


_COLUMNS = ", ".join(f"feedback.{name}" for name in FEEDBACK_COLUMNS)
_QUERY = f"""
SELECT revision, thread_id, coalesce(thread_id, trace_id, run_id), {_COLUMNS}
FROM feedback INDEXED BY feedback_in_time CROSS JOIN run USING (run_id)
WHERE feedback.created_at >= :since AND feedback.created_at < :until AND run.created_at >= :since
    AND namespace = :namespace AND source = 'human' AND correction IS NULL
    AND key IN (SELECT value FROM json_each(:keys))
    AND revision IN (SELECT value FROM json_each(:revisions))
ORDER BY feedback.created_at, feedback_id
"""


def votes_on(
    connection: sqlite3.Connection,
    namespace: str,
    revisions: Collection[str],
    *,
    since: float,
    until: float = inf,
    only_threads: bool = False,
) -> list[ThumbVote]:
    """Read the votes on some revisions, by time.

    Args:
        connection: the home's database.
        namespace: whose runs.
        revisions: ids; ``"base"`` for the bare base model. Runs that name none are nobody's.
        since: count what was answered, and judged, from then on (seconds since 1970).
        until: count what was judged before.
        only_threads: leave out runs without a thread, which a canary never serves.
    """
    scales = {
        (one.key, one.source): one[2:] for one in Store(connection).standards(namespace).scales
    }
    keys = {THUMBS, RETRACTION, *(key for key, source in scales if source == "human")}
    values = {"namespace": namespace, "since": since, "until": min(until, 1e300)}
    values |= {"keys": as_json(sorted(keys)), "revisions": as_json(sorted(revisions))}
    chains, said, asked = Chains(connection), [], {}
    for revision, thread, conversation, *row in connection.execute(_QUERY, values):
        if thread is not None or not only_threads:
            feedback = read_feedback(tuple(row), chains)
            said.append(feedback)
            asked[feedback.run_id] = revision, conversation
    newest: dict[tuple[str, str | None], Feedback] = {}
    for feedback in withdraw(said, []).feedback:
        if not isinstance(side_of(feedback, scales), str):
            newest[feedback.run_id, feedback.user_id] = feedback
    votes: dict[tuple[str, str], ThumbVote] = {}
    for feedback in sorted(newest.values(), key=lambda row: (row.created_at, row.feedback_id)):
        liked, (revision, conversation) = side_of(feedback, scales), asked[feedback.run_id]
        if isinstance(liked, bool):
            vote = ThumbVote(feedback.created_at, revision, liked)
            votes.setdefault((revision, conversation), vote)
    return sorted(votes.values())
