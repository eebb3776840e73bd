"""What the web integrations share: errors in OpenAI's shape, and bodies of JSON.

Every failure leaves as ``{"error": {"message", "type", "param", "code"}}``, which the client
libraries of OpenAI show to their users.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from anyio import move_on_after
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from agentpref.errors import (
    AgentprefError,
    BackendClosed,
    ConfigError,
    ForgottenUser,
    GenerationFailed,
    InvalidFeedback,
    InvalidMessage,
    LogClosed,
    NotKept,
    ServerUnreachable,
    TemplateRefused,
    UnknownRun,
)

BAD_REQUEST, UNAUTHORIZED, FORBIDDEN, NOT_FOUND, CONFLICT = 400, 401, 403, 404, 409
NOT_ALLOWED, TOO_LARGE, TOO_MANY, INTERNAL, BAD_GATEWAY, UNAVAILABLE, TOO_SLOW = (
    405, 413, 429, 500, 502, 503, 504,
)  # fmt: skip

TOO_SLOW_BODY = 408
CLIENT_GONE = 499
"""nginx's status for a client that left; nobody reads it but the metrics."""

_BODY_SECONDS = 60.0

_STATUS: tuple[tuple[type[AgentprefError], int], ...] = (
    (UnknownRun, NOT_FOUND),
    (ForgottenUser, FORBIDDEN),
    (InvalidFeedback, BAD_REQUEST),
    (InvalidMessage, BAD_REQUEST),
    (ConfigError, BAD_REQUEST),
    (TemplateRefused, BAD_REQUEST),
    (ServerUnreachable, BAD_GATEWAY),
    (GenerationFailed, BAD_REQUEST),
    (NotKept, UNAVAILABLE),
    (LogClosed, UNAVAILABLE),
    (BackendClosed, UNAVAILABLE),
)
"""The status of each error, by its first kind in this list; of all others, 500."""

_TYPES = {
    BAD_REQUEST: "invalid_request_error",
    UNAUTHORIZED: "authentication_error",
    FORBIDDEN: "permission_error",
    NOT_FOUND: "not_found_error",
    NOT_ALLOWED: "invalid_request_error",
    CONFLICT: "invalid_request_error",
    TOO_LARGE: "invalid_request_error",
    TOO_MANY: "rate_limit_error",
}


Endpoint = Callable[[Request], Awaitable[Response]]


class HttpError(Exception):
    """A request that ends with this status; ``param`` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: AgentprefError) -> HttpError:
        """The error of agentpref as a status; what is raised on purpose quotes no secrets."""
        status = next((s for kind, s in _STATUS if isinstance(error, kind)), INTERNAL)
        return cls(status, str(error), code=type(error).__name__)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes one."""
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> Response:
        """The answer to the request."""
        return as_json(self.body(), self.status, self.headers)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(value), status, headers, "application/json")


def answering(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors are answers: the app that it is in need know nothing of them."""

    @functools.wraps(endpoint)
    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HttpError as error:
            return error.response()
        except AgentprefError as error:
            return HttpError.of(error).response()

    return answered


async def read_bytes(request: Request, *, limit: int) -> bytes:
    """Read a request's body of at most ``limit`` bytes.

    Raises:
        HttpError: 413 if it is longer, which is noticed before it is all in memory; 408 if it does
            not come.
    """
    too_large = HttpError(
        TOO_LARGE, f"the body has more than {limit:,} bytes; send less", code="body_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > limit:
        raise too_large
    parts, size = [], 0
    try:
        with move_on_after(_BODY_SECONDS) as waited:
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except ClientDisconnect as error:
        raise HttpError(CLIENT_GONE, "the client left") from error
    if waited.cancelled_caught:
        raise HttpError(TOO_SLOW_BODY, "the body did not come in time", code="body_timeout")
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """Read a body as JSON; ``HttpError`` 400 for anything else."""
    try:
        return orjson.loads(body)
    except ValueError as error:
        raise HttpError(BAD_REQUEST, f"the body is no JSON: {error}", code="bad_json") from error


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a body as a JSON object; ``HttpError`` 400 for anything else."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise HttpError(BAD_REQUEST, "the body is no JSON object", code="bad_json")
    return value


async def read_json(request: Request, *, limit: int) -> Any:
    """Read a request's body as JSON; raises as the two steps do."""
    return parse_json(await read_bytes(request, limit=limit))


async def read_object(request: Request, *, limit: int) -> dict[str, Any]:
    """Read a request's body as a JSON object; raises as the two steps do."""
    return parse_object(await read_bytes(request, limit=limit))
