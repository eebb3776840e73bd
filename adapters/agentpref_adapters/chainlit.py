"""Chainlit: the thumbs below an answer reach the log.

Chainlit gives thumbs to its data layer, and shows none without one. A thumb names a *step*, which
is the whole turn (``on_message``) that the answer was written in, and not the message. So an app
records its answers with the turn as their trace, and a judgement of a trace means its last answer.
Nothing has to be remembered, and a thumb is understood after a restart too.

>>> cl.data_layer(lambda: feedback_layer(log))                            # doctest: +SKIP
>>> reply = chat.reply(messages, trace_id=turn())                        # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from typing import Any, cast
from uuid import uuid4

from agentpref.errors import ConfigError, MissingDependency, UnknownRun, shown_id
from agentpref.record.log import Log
from agentpref.types import THUMBS

try:
    import chainlit  # noqa: F401  (checked first, for a clear error)
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.chainlit needs chainlit, which is not installed: "
        "run pip install 'agentpref[chainlit]'"
    ) from error

from chainlit.context import context
from chainlit.data.base import BaseDataLayer
from chainlit.message import MessageBase
from chainlit.step import StepDict
from chainlit.types import (
    Feedback,
    PageInfo,
    PaginatedResponse,
    Pagination,
    ThreadDict,
    ThreadFilter,
)
from chainlit.user import PersistedUser, User

from agentpref_adapters._given import about, given, require_home

__all__ = ["bind", "feedback_layer", "turn"]

_logger = logging.getLogger("agentpref")

RUN_ID = "agentpref_run_id"
"""Where :func:`bind` puts the run in a message's metadata."""

_APP = "chainlit"
_REMEMBERED = 10_000
"""How many bound steps a process keeps in memory."""


def turn() -> str:
    """The id of the turn that is being answered: what a thumb below the answer will name.

    Pass it as ``trace_id``, to :class:`agentpref.Chat` or to ``log.record``, or as the ``run_id``
    in the config of a LangChain chain.

    Raises:
        ConfigError: the caller is in no handler of Chainlit, such as ``on_message``.
    """
    run = context.current_run
    if run is None:
        raise ConfigError(
            "turn() was called outside of a turn; call it in on_message (for a message from "
            "elsewhere, bind(message, run_id) names its run)"
        )
    return str(run.id)


def bind(message: MessageBase, run_id: str) -> None:
    """Say which run wrote a message; call it before ``message.send()`` or ``message.update()``.

    It is for runs that were recorded without :func:`turn`, by a gateway, say. The run travels in
    the message's metadata, so a data layer that stores messages knows it after a restart, too.
    """
    message.metadata = {**(message.metadata or {}), RUN_ID: run_id}


def feedback_layer(log: Log, around: BaseDataLayer | None = None) -> BaseDataLayer:
    """Make a data layer whose thumbs reach a log.

    A thumb that changes is recorded anew, and the last one counts; a thumb that is taken back is
    withdrawn. A thumb on a step that no run is known of raises ``UnknownRun``, which the page
    shows; with ``around``, which has stored it, a warning is logged instead. Chainlit does not tell
    who gave a thumb; runs have the user that they were recorded with.

    Args:
        log: where thumbs go.
        around: the data layer that the app has, such as ``SQLAlchemyDataLayer(…)``. It goes on
            storing what it stored. Without one, nothing but thumbs is stored.

    Raises:
        ConfigError: the log has no home on this machine, as a ``RemoteLog``.
    """
    require_home(log, "feedback_layer()")
    # A proxy and no subclass: whatever else the app's layer can do, it goes on doing.
    return cast("BaseDataLayer", _Layer(log, around or _Nothing(), is_alone=around is None))


class _Layer:
    """Passes everything on to a data layer, and listens to feedback and to bound messages."""

    def __init__(self, log: Log, inner: BaseDataLayer, *, is_alone: bool) -> None:
        self._log, self._inner, self._is_alone = log, inner, is_alone
        self._bound: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def create_step(self, step_dict: StepDict) -> Any:
        self._notice(step_dict)
        return await self._inner.create_step(step_dict)

    async def update_step(self, step_dict: StepDict) -> Any:
        self._notice(step_dict)
        return await self._inner.update_step(step_dict)

    async def upsert_feedback(self, feedback: Feedback) -> str:
        feedback_id = await self._inner.upsert_feedback(feedback)
        said = {
            "feedback_id": feedback_id,
            "step_id": feedback.forId,
            "thread_id": feedback.threadId,
        }
        judge = partial(
            self._log.feedback,
            key=THUMBS,
            score=bool(feedback.value),
            comment=feedback.comment,
            value={_APP: said},
            user_id=_voter(feedback.forId),
        )
        try:
            await self._on_run(feedback, judge)
        except UnknownRun as error:
            if self._is_alone:
                raise
            _logger.warning("Chainlit has a thumb that teaches nothing: %s", error)
        return feedback_id

    async def delete_feedback(self, feedback_id: str) -> bool:
        is_deleted = await self._inner.delete_feedback(feedback_id)
        row = await asyncio.to_thread(given, self._log, _APP, feedback_id)
        if row is None:
            _logger.warning("Chainlit deleted feedback %s, which is not in the log", feedback_id)
            return is_deleted
        voter = _voter(about(row, _APP)["step_id"])
        await asyncio.to_thread(partial(self._log.retract, row.run_id, THUMBS, user_id=voter))
        return True

    async def _on_run(self, feedback: Feedback, judge: Callable[..., str]) -> None:
        """Judge the run of a step.

        The step is bound to it, or is the trace or the id that it was recorded with, or the thread
        that the app's layer has stored says so.
        """
        step_id = feedback.forId
        if step_id not in self._bound:
            for place in ("trace_id", "run_id"):
                with suppress(UnknownRun):
                    await asyncio.to_thread(partial(judge, **{place: step_id}))
                    return
            thread = await self._inner.get_thread(feedback.threadId) if feedback.threadId else None
            for step in thread["steps"] if thread else ():
                self._notice(step)
        if step_id not in self._bound:
            raise UnknownRun(
                f"no run is known of the answer in step {shown_id(step_id)}; record it with "
                "trace_id=turn(), or call bind(message, run_id) before the message is sent"
            )
        await asyncio.to_thread(partial(judge, run_id=self._bound[step_id]))

    def _notice(self, step: StepDict) -> None:
        """Remember the run of a bound message, by its own step and by that of its turn."""
        metadata: Any = step.get("metadata") or {}
        if isinstance(metadata, str):  # as SQLite gives it back
            metadata = json.loads(metadata)
        if run_id := metadata.get(RUN_ID):
            self._bound |= {id: run_id for id in (step["id"], step.get("parentId")) if id}
        while len(self._bound) > _REMEMBERED:
            del self._bound[next(iter(self._bound))]


def _voter(step_id: str) -> str:
    """Who judges: Chainlit does not tell, and has one thumb for a step."""
    return f"{_APP} {step_id}"


class _Nothing(BaseDataLayer):
    """A data layer that stores nothing; users are as they logged in, and threads are not kept."""

    async def upsert_feedback(self, feedback: Feedback) -> str:
        return feedback.id or str(uuid4())

    async def delete_feedback(self, feedback_id: str) -> bool:
        return False

    async def get_user(self, identifier: str) -> PersistedUser | None:
        return None

    async def create_user(self, user: User) -> PersistedUser:
        return PersistedUser(
            id=user.identifier,
            createdAt=datetime.now(timezone.utc).isoformat(),
            identifier=user.identifier,
            display_name=user.display_name,
            metadata=user.metadata,
        )

    async def create_element(self, element: Any) -> None: ...

    async def get_element(self, thread_id: str, element_id: str) -> None: ...

    async def delete_element(self, element_id: str, thread_id: str | None = None) -> None: ...

    async def create_step(self, step_dict: StepDict) -> None: ...

    async def update_step(self, step_dict: StepDict) -> None: ...

    async def delete_step(self, step_id: str) -> None: ...

    async def get_thread_author(self, thread_id: str) -> str:
        return ""

    async def delete_thread(self, thread_id: str) -> None: ...

    async def list_threads(
        self, pagination: Pagination, filters: ThreadFilter
    ) -> PaginatedResponse[ThreadDict]:
        return PaginatedResponse(PageInfo(False, None, None), [])

    async def get_thread(self, thread_id: str) -> ThreadDict | None:
        return None

    async def update_thread(
        self,
        thread_id: str,
        name: str | None = None,
        user_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        tags: list[str] | None = None,
    ) -> None: ...

    async def build_debug_url(self) -> str:
        return ""

    async def close(self) -> None: ...

    async def get_favorite_steps(self, user_id: str) -> list[StepDict]:
        return []
