"""What the integrations with chat frameworks share: how clicks become feedback on a run.

A thumb is feedback; a thumb taken back is withdrawn. An answer asked for again is a fact about the
first answer, and no judgement: people also ask again out of curiosity. It is kept under a key of
its own, which trains nothing until the app declares that it should.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agentpref.errors import AgentprefError
from agentpref.record.log import Log
from agentpref.types import THUMBS, Message

ASKED_AGAIN = "asked_again"
"""The key of the feedback on an answer in whose place another one was asked for. Its score is 0."""

NOT_KEPT = "Your feedback could not be kept."

_logger = logging.getLogger("agentpref")


@contextmanager
def saying_what_fails(warn: Callable[[str], object]) -> Iterator[None]:
    """Tell the person, and the log why, if what was said cannot be kept; the chat goes on."""
    try:
        yield
    except AgentprefError:
        _logger.exception("feedback in a chat could not be kept")
        warn(NOT_KEPT)


def say_thumb(log: Log, run_id: str, up: bool | None, user_id: str | None) -> None:
    """Log a thumb; None takes it back."""
    if up is None:
        log.retract(run_id, key=THUMBS, user_id=user_id)
    else:
        log.thumbs(run_id, up=up, user_id=user_id)


def say_asked_again(log: Log, first: str, second: str, user_id: str | None) -> None:
    """Log that a person who had the answer of run ``first`` asked for that of ``second``."""
    log.feedback(first, key=ASKED_AGAIN, score=0, value={"run_id": second}, user_id=user_id)


def as_shown(message: Message) -> str:
    """The text of an answer, for a chat that shows text: tool calls as JSON."""
    if text := message.get("content"):
        return str(text)
    calls = json.dumps(message.get("tool_calls") or [], ensure_ascii=False, indent=1)
    return f"```json\n{calls}\n```"
