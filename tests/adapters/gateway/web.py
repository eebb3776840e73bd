"""Real servers for the tests: any ASGI app on a port of its own, and an upstream to ask."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an app in a thread; give its address."""
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="on", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


class FakeOpenAI:
    """An upstream that says what the last message says, word by word.

    ``asked`` has the bodies of the requests and ``keys`` their authorization. The first word of
    the last message chooses what else happens.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.ended: list[str] = []
        self.script: list[Response] = []  # what to answer first, whatever is asked
        self.cookies: list[str | None] = []
        self.go_on = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/secrets", lambda request: PlainTextResponse("secret")),
            ]
        )

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [{"id": "big", "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.cookies.append(request.headers.get("cookie"))
        if self.script:
            return self.script.pop(0)
        text = body["messages"][-1]["content"]
        first = text.split()[0] if isinstance(text, str) and text.split() else ""
        if first == "refuse":
            error = {"message": "too long for me", "type": "invalid_request_error"}
            return _json({"error": error}, 400)
        if first == "busy":
            return _json({"error": {"message": "slow down"}}, 429, {"Retry-After": "7"})
        if first == "locked":
            return _json({"error": {"message": "bad key sk-upstream"}}, 401)
        if first == "html":
            return Response("<html>hello</html>", media_type="text/html")
        if body.get("stream"):
            events = self.events(body, first, text)
            return StreamingResponse(events, media_type="text/event-stream")
        if first == "slow":
            await self._wait(request)
        choices = [
            {"index": n, "message": self._message(body, text), "finish_reason": self._end(body)}
            for n in range(body.get("n") or 1)
        ]
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        head = {"id": "upstream-1", "object": "chat.completion", "created": 1, "model": "big-7"}
        return _json({**head, "choices": choices, "usage": usage, "extra": {"kept": True}})

    async def events(self, body: dict[str, Any], first: str, text: str) -> AsyncIterator[bytes]:
        head = {"id": "upstream-1", "object": "chat.completion.chunk", "created": 1,
                "model": "big-7"}  # fmt: skip
        try:
            yield _event({**head, "choices": [{"index": 0, "delta": {"role": "assistant"}}]})
            if body.get("tools"):
                for delta in self._call_deltas():
                    yield _event({**head, "choices": [{"index": 0, "delta": delta}]})
            else:
                for word in text.split(" "):
                    delta = {"content": f"{word} "}
                    yield _event({**head, "choices": [{"index": 0, "delta": delta}]})
                    if first == "slow":
                        while not self.go_on.is_set():
                            await asyncio.sleep(0.01)
                    if first == "break":
                        return
                    if first == "error":
                        yield _event({"error": {"message": "out of memory"}})
                        return
            end = {"index": 0, "delta": {}, "finish_reason": self._end(body)}
            yield _event({**head, "choices": [end]})
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                yield _event({**head, "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
            self.ended.append("whole")
        except (asyncio.CancelledError, GeneratorExit):
            self.ended.append("left")
            raise

    async def _wait(self, request: Request) -> None:
        while not self.go_on.is_set():
            if await request.is_disconnected():
                self.ended.append("left")
                return
            await asyncio.sleep(0.01)

    @staticmethod
    def _message(body: dict[str, Any], text: str) -> dict[str, Any]:
        if body.get("tools"):
            function = {"name": "weather", "arguments": '{"city": "Bern"}'}
            call = {"id": "call_1", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"role": "assistant", "content": text, "refusal": None}

    @staticmethod
    def _end(body: dict[str, Any]) -> str:
        return "tool_calls" if body.get("tools") else "stop"

    @staticmethod
    def _call_deltas() -> Iterator[dict[str, Any]]:
        head = {"index": 0, "id": "call_1", "type": "function"}
        yield {"tool_calls": [{**head, "function": {"name": "weather", "arguments": ""}}]}
        for part in ('{"city": ', '"Bern"}'):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}


def _event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")
