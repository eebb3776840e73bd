"""Open WebUI: its ratings become thumbs, comparisons and comments on the runs of a log.

Open WebUI tells of a rating by an event that holds its id. :func:`receiver` is a small web app that
takes these events, from the Function in ``examples/open_webui_function.py`` or from a webhook, gets
the rating itself, and records it with :func:`record_feedback`.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

from agentpref.errors import (
    AgentprefError,
    ConfigError,
    ExchangeError,
    InvalidFeedback,
    MissingDependency,
    ServerUnreachable,
    described,
)
from agentpref.record.log import Log
from agentpref_adapters._given import require_home
from agentpref_adapters._open_webui_ratings import (
    Recorded,
    keep_only,
    record_feedback,
    withdraw_feedback,
)

try:
    import httpx
    import orjson
    from anyio import Lock, to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingDependency(
        f"agentpref_adapters.open_webui needs starlette and httpx ({error}): "
        "run pip install 'agentpref[open-webui]'"
    ) from error

__all__ = ["Recorded", "keep_only", "receiver", "record_feedback", "withdraw_feedback"]

_logger = logging.getLogger("agentpref")

MAX_BYTES = 32 << 20
"""The most bytes of one event; a rating holds a whole chat."""

_SECONDS = 20.0


def receiver(
    log: Log,
    *,
    url: str | None = None,
    key: str | None = None,
    token: str | None = None,
    edits: bool = False,
) -> Starlette:
    """Make the web app that takes Open WebUI's events: ``POST /feedback``, and ``GET /health``.

    With a ``token``, who posts must show it, and is believed: the Function of
    ``examples/open_webui_function.py`` sends the rating itself. With ``url`` and ``key``, a rating
    is fetched from Open WebUI, which is what webhooks need: an event of theirs is a hint, whoever
    sends it.

    Args:
        log: where ratings go.
        url: where Open WebUI is, such as ``"http://localhost:8080"``.
        key: an API key of one of its admins.
        token: a secret of your choice, which the Function's valve ``token`` holds too.
        edits: whether an answer that was changed in Open WebUI is a correction by whoever rates it,
            see :func:`record_feedback`.

    Raises:
        ConfigError: neither a token nor a url with its key was given, or the log has no home on
            this machine, as a ``RemoteLog``.
    """
    require_home(log, "receiver()")
    if not token and not (url and key):
        raise ConfigError(
            "receiver() knows neither whom to believe nor where to ask; pass token= for the "
            "Function, or url= and key= of Open WebUI for a webhook"
        )
    api = _Api(url, key) if url and key else None
    return _Receiver(log, api, token, edits=edits).app()


class _Receiver:
    """One event after the other: two states of a rating must not overtake one another."""

    def __init__(self, log: Log, api: _Api | None, token: str | None, *, edits: bool) -> None:
        self._log, self._api, self._token = log, api, token
        self._record = partial(record_feedback, log, edits=edits)
        self._turn = Lock()

    def app(self) -> Starlette:
        routes = [
            Route("/feedback", self._feedback, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        refused = {HTTPException: _refused, AgentprefError: _refused}
        return Starlette(routes=routes, exception_handlers=refused)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _feedback(self, request: Request) -> Response:
        if self._token:
            shown = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(shown.encode(), self._token.encode()):
                raise HTTPException(401, "wrong token; set the valve `token` of the Function")
        event = await _read(request)
        name = event.get("event")
        if not isinstance(name, str) or not name.startswith("feedback."):
            return JSONResponse({"ignored": name if isinstance(name, str) else described(name)})
        async with self._turn:
            if name == "feedback.deleted_all":
                return JSONResponse({"withdrawn": await self._keep(event)})
            done = await self._one(event, is_deleted=name == "feedback.deleted")
        return JSONResponse(
            {
                "run_id": done.run_id,
                "source": done.source,
                "judged": [*done.judged],
                "left_out": {**done.left_out},
            }
        )

    async def _one(self, event: Mapping[str, Any], *, is_deleted: bool) -> Recorded:
        subject = event.get("subject")
        feedback_id = subject.get("id") if isinstance(subject, Mapping) else None
        if not isinstance(feedback_id, str) or not feedback_id:
            raise HTTPException(400, "the event has no subject.id, which names the rating")
        feedback = None if is_deleted or not self._token else event.get("feedback")
        if self._api is not None and feedback is None:
            feedback = await self._api.rating(feedback_id)
            is_deleted = feedback is None
        if is_deleted:
            return await to_thread.run_sync(withdraw_feedback, self._log, feedback_id)
        if not isinstance(feedback, Mapping) or feedback.get("id") != feedback_id:
            raise HTTPException(
                400, "the event lacks its rating (feedback); pass url= and key= to receiver()"
            )
        return await to_thread.run_sync(self._record, feedback)

    async def _keep(self, event: Mapping[str, Any]) -> list[str]:
        ids = event.get("remaining") if self._token else None
        if not isinstance(ids, list):
            if self._api is None:
                raise HTTPException(400, "the event lacks what remains (remaining)")
            ids = await self._api.ids()
        at = event.get("created_at")
        until = at + 1.0 if isinstance(at, int | float) else float("inf")
        return await to_thread.run_sync(partial(keep_only, until=until), self._log, ids)


class _Api:
    """What the receiver asks Open WebUI for."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url.rstrip("/"), key

    async def rating(self, feedback_id: str) -> Any | None:
        """A rating, or None if there is none."""
        return await self._get(f"feedback/{quote(feedback_id, safe='')}")

    async def ids(self) -> list[str]:
        """The ids of all ratings that there are."""
        found = await self._get("feedbacks/all/ids")
        if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
            raise ServerUnreachable(f"{self._url} listed no ratings; is it Open WebUI 0.12?")
        return [str(one.get("id")) for one in found]

    async def _get(self, path: str) -> Any | None:
        whole = f"{self._url}/api/v1/evaluations/{path}"
        try:
            async with httpx.AsyncClient(timeout=_SECONDS) as client:
                answer = await client.get(whole, headers={"Authorization": f"Bearer {self._key}"})
        except httpx.HTTPError as error:
            raise ServerUnreachable(
                f"Open WebUI at {self._url} does not answer ({type(error).__name__}); the rating "
                "is not recorded, so send the event again"
            ) from error
        if answer.status_code == 404:
            return None
        if answer.status_code in (401, 403):
            raise ServerUnreachable(
                f"Open WebUI at {self._url} refuses the API key; pass that of an admin, with "
                "ENABLE_API_KEYS=true set for Open WebUI"
            )
        try:
            answer.raise_for_status()
            return answer.json()
        except ValueError as error:
            raise ServerUnreachable(f"{whole} is no JSON; is it Open WebUI's address?") from error
        except httpx.HTTPStatusError as error:
            raise ServerUnreachable(f"{whole} answers {answer.status_code}") from error


async def _read(request: Request) -> Mapping[str, Any]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the event has more than {MAX_BYTES:,} bytes")
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise HTTPException(400, f"the event is no JSON: {error}") from error
    if not isinstance(event, Mapping):
        raise HTTPException(400, "the event is no JSON object")
    return event


async def _refused(request: Request, error: Exception) -> Response:
    """Say why, in OpenAI's shape as the gateway does, and to whoever reads the receiver's log."""
    status = (
        error.status_code if isinstance(error, HTTPException)
        else 422 if isinstance(error, ExchangeError | InvalidFeedback)
        else 502 if isinstance(error, ServerUnreachable)
        else 503
    )  # fmt: skip
    message = error.detail if isinstance(error, HTTPException) else str(error)
    _logger.warning("an event of Open WebUI was refused (%d): %s", status, message)
    return JSONResponse({"error": {"message": message, "code": type(error).__name__}}, status)
