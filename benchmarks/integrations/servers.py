"""Two servers beside the gateway: an upstream that answers at once, and one that passes on.

    python -m benchmarks.integrations.servers answers
    python -m benchmarks.integrations.servers passes http://127.0.0.1:8000

Each takes a free port, and prints its address first.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from benchmarks.integrations.timing import ANSWER

_HEAD = {"id": "c", "created": 1, "model": "m"}


async def answer(request: Request) -> Response:
    """A whole answer, or tokens that are the time at which they were sent."""
    body = orjson.loads(await request.body())
    if body.get("stream"):
        return StreamingResponse(_tokens(body), media_type="text/event-stream")
    message = {"role": "assistant", "content": ANSWER}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    completion = {**_HEAD, "object": "chat.completion", "choices": [choice]}
    return Response(orjson.dumps(completion), media_type="application/json")


async def _tokens(body: dict[str, Any]) -> AsyncIterator[bytes]:
    wait = float(body["metadata"]["wait"])
    for number in range(body["max_tokens"]):
        if number:
            await asyncio.sleep(wait)
        yield _event({"content": str(time.monotonic_ns())}, None)
    yield _event({}, "stop")
    yield b"data: [DONE]\n\n"


def _event(delta: dict[str, Any], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %s\n\n" % orjson.dumps(
        {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}
    )


def passing(upstream: str) -> Starlette:
    """An app that passes every request on, and the answer back as it comes."""
    client = httpx.AsyncClient(timeout=60)

    async def pass_on(request: Request) -> Response:
        asked = client.build_request(
            "POST",
            f"{upstream}{request.url.path}",
            content=await request.body(),
            headers={"Content-Type": "application/json"},
        )
        response = await client.send(asked, stream=True)
        kind = response.headers["content-type"]
        return StreamingResponse(response.aiter_raw(), response.status_code, media_type=kind)

    return Starlette(routes=[Route("/{path:path}", pass_on, methods=["POST"])])


class _Announcing(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}", flush=True)


def main() -> None:
    """Serve until SIGTERM."""
    what, *rest = sys.argv[1:]
    app = passing(*rest) if what == "passes" else Starlette(
        routes=[Route("/v1/chat/completions", answer, methods=["POST"])]
    )  # fmt: skip
    _Announcing(uvicorn.Config(app, port=0, log_level="error", access_log=False)).run()


if __name__ == "__main__":
    main()
