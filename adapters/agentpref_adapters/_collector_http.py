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

from agentpref.record.log import Log
from agentpref_adapters._http import HttpError, answering, as_json

MAX_BYTES = 64 * 1024 * 1024
"""The most bytes of a batch, unpacked: one message of the largest kind, with its conversation."""

MAX_ROWS = 2_000

Authenticate = Callable[[Request], Awaitable["Log | None"]]
"""Finds the log that a request's key stands for; None, or an error of its own, for a wrong key."""


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
        if log is None:
            message = "give a valid key: Authorization: Bearer …"
            raise HttpError(401, message, code="invalid_api_key")
        body = await _read(request, max_bytes)
        return as_json(await to_thread.run_sync(partial(_take, log, body, max_rows)))

    return [Route("/v1/log", answering(take), methods=["POST"])]


def _take(log: Log, body: bytes, max_rows: int) -> dict[str, Any]:
    rows, ahead = _parsed(body)
    if len(rows) > max_rows:
        raise HttpError(413, f"{len(rows):,} rows; send {max_rows:,} at most", code="too_many_rows")
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
        raise HttpError(400, f"the body is no JSON: {error}", code="bad_json") from error
    rows = batch.get("rows") if isinstance(batch, dict) else None
    if not isinstance(rows, list):
        raise HttpError(400, 'send {"sent_at": seconds since 1970, "rows": […]}', code="bad_batch")
    sent_at = batch.get("sent_at", now)
    if isinstance(sent_at, bool) or not isinstance(sent_at, int | float):
        raise HttpError(400, "sent_at is no number; send seconds since 1970", code="bad_batch")
    return rows, float(sent_at) - now if math.isfinite(sent_at) else 0.0


async def _read(request: Request, limit: int) -> bytes:
    """Read a body, plain or with gzip; 413 as soon as it is longer than ``limit``, unpacked."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip"):
        raise HttpError(415, "send the body plain, or with gzip", code="bad_encoding")
    too_large = HttpError(413, f"the batch has more than {limit:,} bytes", code="body_too_large")
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
        raise HttpError(400, f"the body is not gzip: {error}", code="bad_gzip") from error
    if unpack is not None and (not unpack.eof or unpack.unused_data):
        raise HttpError(400, "the body is not one whole gzip stream", code="bad_gzip")
    return b"".join(parts)
