"""``/v1/chat/completions``: OpenAI's wire format."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from agentpref_adapters._http import HttpError, as_json
from agentpref_adapters.gateway.calls import Call, as_failure

EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that keep proxies from holding a stream back."""


def whole(completion: dict[str, Any], headers: dict[str, str]) -> Response:
    """A whole answer."""
    return as_json(completion, headers=headers)


class Streamed(StreamingResponse):
    """A stream of events, after which its call is closed, also where the client has gone."""

    def __init__(self, call: Call, events: AsyncIterator[bytes]) -> None:
        headers = {**call.headers, **EVENTS}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._call.aclose()


def streamed(call: Call) -> Response:
    """An answer as server-sent events."""
    return Streamed(call, _events(call))


def replayed(completion: dict[str, Any], headers: dict[str, str]) -> Response:
    """An answer that was given before, as a stream of one piece."""
    piece = {**completion, "object": "chat.completion.chunk"}
    choices = completion["choices"]
    piece["choices"] = [_as_delta(one) for one in choices if isinstance(one, Mapping)]
    events = iter([_event(piece), b"data: [DONE]\n\n"])
    return StreamingResponse(events, media_type="text/event-stream", headers={**headers, **EVENTS})


def _as_delta(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A whole choice as a piece, in which tool calls are numbered."""
    rest = dict(choice)
    delta = dict(rest.pop("message", None) or {})
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
    return {**rest, "delta": delta}


def failed(error: HttpError) -> Response:
    """A request that failed before its first piece."""
    return error.response()


async def _events(call: Call) -> AsyncIterator[bytes]:
    try:
        async for piece in call.pieces():
            yield _event(piece)
    except Exception as error:  # a stream ends with an event, whatever broke
        yield _event(as_failure(error).body())
        return
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
