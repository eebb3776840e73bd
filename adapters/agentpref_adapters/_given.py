"""Finds what a chat app's user said before, by the id that the app gave it.

Chat apps change and delete a rating by an id of their own. It is kept in the value of the feedback,
under the app's name: ``{"chainlit": {"feedback_id": …}}``. Each rating is a voter of its own, named
after it, so that the next one of the same id supersedes it and a deletion takes back nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentpref.errors import ConfigError, UnknownNamespace
from agentpref.record.log import Log
from agentpref.types import RETRACTION, Feedback

_NEAR = 1_000
"""How many of the newest judgements are searched before all others."""

_FLUSH_SECONDS = 5.0


def given(log: Log, app: str, feedback_id: str) -> Feedback | None:
    """The newest feedback of a log that an app gave under an id, unless it was taken back.

    The newest judgements of the log are searched first: people take back what is new. Where the
    conversation is known, :func:`given_in` reads less.
    """
    log.flush(_FLUSH_SECONDS)
    for limit in (_NEAR, None):
        found = _last(log.home.feedback(log.namespace, limit=limit), app, feedback_id)
        if found is not None:
            return found
    return None


def given_in(
    log: Log, thread: str, app: str, feedback_id: str, *, since: float | None
) -> Feedback | None:
    """The same, among what was said of one conversation from a time on."""
    log.flush(_FLUSH_SECONDS)
    rows = log.home.feedback(log.namespace, thread=thread, since=since)
    return _last(rows, app, feedback_id)


def _last(rows: Iterable[Feedback], app: str, feedback_id: str) -> Feedback | None:
    found = None
    try:
        for row in rows:
            if about(row, app).get("feedback_id") == feedback_id:
                found = row
            elif row.key == RETRACTION and found is not None:
                is_it = (row.run_id, row.user_id) == (found.run_id, found.user_id)
                found = None if is_it and row.value["key"] in (None, found.key) else found
    except UnknownNamespace:  # nothing is logged here yet
        return None
    return found


def require_home(log: Log, what: str) -> None:
    """Refuse a log that sends to a home elsewhere: runs and ratings could not be looked up.

    Raises:
        ConfigError: the log has no home on this machine.
    """
    if not log.home.database.exists():
        raise ConfigError(
            f"{what} looks runs and ratings up, and the log has no home at {log.home.path}; run it "
            "where the home is, with agentpref.Log(home) instead of a RemoteLog"
        )


def about(row: Feedback, app: str) -> Mapping[str, Any]:
    """What an app said of its rating, or nothing."""
    said = row.value.get(app) if isinstance(row.value, Mapping) else None
    return said if isinstance(said, Mapping) else {}
