"""The collector: the route by which remote logs bring what they recorded to a home.

``POST /v1/log`` takes ``{"sent_at": …, "rows": [{"type": "run", "id": …, …}, …]}``, plain or with
gzip. A gateway mounts it behind its API keys; each key stands for the log of one namespace. The
answer comes when the rows are on disk, and says so of each: ``{"kept": [ids], "refused": [{"row":
place, "id": …, "error": name, "message": …}]}``. A batch that comes again changes nothing. If a
row could not be written, the whole batch is answered with 503, to be sent again.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentpref.errors import LogClosed, NotKept
from agentpref.record.log import Log

MAX_BYTES = 64 * 1024 * 1024
"""The most bytes of a batch, unpacked: one message of the largest kind, with its conversation."""

MAX_ROWS = 2_000

Authenticate = Callable[[Request], Awaitable["Log | None"]]
"""Finds the log that a request's key stands for; None, or an error of its own, for a wrong key."""


class _Refused(Exception):
    """A request that ends with this status."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def collector_routes(
    authenticate: Authenticate, *, max_bytes: int = MAX_BYTES, max_rows: int = MAX_ROWS
) -> list[BaseRoute]:
    """The routes, for any Starlette or FastAPI app.

    Args:
        authenticate: finds the log of the namespace that the request's key is bound to.
        max_bytes: the most bytes of one batch, packed or unpacked.
        max_rows: the most rows of one batch.
    """

    async def take(request: Request) -> Response:
        log = await authenticate(request)
        try:
            if log is None:
                raise _Refused(401, "invalid_api_key", "give a valid key: Authorization: Bearer …")
            body = await _read(request, max_bytes)
            answer = await to_thread.run_sync(partial(_take, log, body, max_rows))
        except _Refused as refused:
            return _error(refused.status, refused.code, refused.message)
        except (NotKept, LogClosed) as error:
            return _error(503, type(error).__name__, str(error))
        return Response(orjson.dumps(answer), media_type="application/json")

    return [Route("/v1/log", take, methods=["POST"])]


def _take(log: Log, body: bytes, max_rows: int) -> dict[str, Any]:
    rows, ahead = _parsed(body)
    if len(rows) > max_rows:
        raise _Refused(413, "too_many_rows", f"{len(rows):,} rows; send {max_rows:,} at most")
    outcomes = log.receive(rows, ahead=ahead)
    ids = [row.get("id") if isinstance(row, dict) else None for row in rows]
    return {
        "kept": [one for one, error in zip(ids, outcomes, strict=True) if error is None],
        "refused": [
            {"row": at, "id": ids[at], "error": type(error).__name__, "message": str(error)}
            for at, error in enumerate(outcomes)
            if error is not None
        ],
    }


def _parsed(body: bytes) -> tuple[list[Any], float]:
    """The rows of a batch, and by how much the sender's clock is ahead of this one."""
    now = time.time()
    try:
        batch = orjson.loads(body)
    except ValueError as error:
        raise _Refused(400, "bad_json", f"the body is no JSON: {error}") from error
    rows = batch.get("rows") if isinstance(batch, dict) else None
    if not isinstance(rows, list):
        raise _Refused(400, "bad_batch", 'send {"sent_at": seconds since 1970, "rows": […]}')
    sent_at = batch.get("sent_at", now)
    if isinstance(sent_at, bool) or not isinstance(sent_at, int | float):
        raise _Refused(400, "bad_batch", "sent_at is no number; send seconds since 1970")
    return rows, float(sent_at) - now if math.isfinite(sent_at) else 0.0


async def _read(request: Request, limit: int) -> bytes:
    """Read a body, plain or with gzip; 413 as soon as it is longer than ``limit``, unpacked."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip"):
        raise _Refused(415, "bad_encoding", "send the body plain, or with gzip")
    too_large = _Refused(413, "body_too_large", f"the batch has more than {limit:,} bytes")
    unpack = zlib.decompressobj(wbits=31) if coding == "gzip" else None
    parts, size = [], 0
    try:
        async for part in request.stream():
            plain = part if unpack is None else unpack.decompress(part, limit - size + 1)
            parts.append(plain)
            size += len(plain)
            if size > limit or (unpack is not None and unpack.unconsumed_tail):
                raise too_large
    except zlib.error as error:
        raise _Refused(400, "bad_gzip", f"the body is not gzip: {error}") from error
    if unpack is not None and (not unpack.eof or unpack.unused_data):
        raise _Refused(400, "bad_gzip", "the body is not one whole gzip stream")
    return b"".join(parts)


def _error(status: int, code: str, message: str) -> Response:
    """An error as OpenAI writes one."""
    kind = {401: "authentication_error", 503: "server_error"}.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return Response(orjson.dumps({"error": error}), status, media_type="application/json")
