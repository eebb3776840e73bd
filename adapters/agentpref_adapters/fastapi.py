"""FastAPI: the feedback routes of the gateway, in an app of one's own.

    app.include_router(feedback_router(log))

The app answers and records as it likes, and hands the run's id to its page; the page posts its
thumbs to ``/feedback``. Who judges is for the app to say: it knows its users.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

from agentpref.errors import MissingDependency
from agentpref.record.log import Log

try:
    from fastapi import APIRouter
    from starlette.requests import Request
except ImportError as error:
    raise MissingDependency(
        f"agentpref_adapters.fastapi needs {error.name}, which is not installed: "
        "run pip install 'agentpref[fastapi]'"
    ) from error

from agentpref_adapters._feedback_http import Caller, feedback_routes
from agentpref_adapters._http import HttpError

__all__ = ["HttpError", "feedback_router"]

WhoJudges = Callable[[Request], "Awaitable[str | None] | str | None"]


def feedback_router(log: Log, *, user: WhoJudges = lambda request: None) -> APIRouter:
    """Routes that take in feedback of the app's pages: ``/feedback`` and ``/v1/comparisons``.

    >>> app.include_router(feedback_router(log, user=lambda request: request.user.id))

    Args:
        log: where judgements go; only runs of its namespace can be judged.
        user: tells who asks, from the request (a session, say); it may be a coroutine function, and
            raises ``HttpError(401, …)`` for nobody. All whom it has no name for are one voter.
    """

    async def authenticate(request: Request) -> Caller:
        found = user(request)
        name = await found if inspect.isawaitable(found) else found
        return Caller(log, user_id=name, is_page=True)

    return APIRouter(routes=feedback_routes(authenticate))
