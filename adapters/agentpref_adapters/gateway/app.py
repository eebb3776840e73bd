"""The gateway's web app: its routes, and what every request goes through.

A request is told apart by its key, admitted if there is room, and answered by the upstream of its
namespace. A client that goes ends the work behind it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from types import ModuleType
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from agentpref import __version__
from agentpref.errors import AgentprefError
from agentpref.record.log import Log
from agentpref_adapters._collector_http import collector_routes
from agentpref_adapters._feedback_http import Caller, feedback_routes
from agentpref_adapters._http import (
    BAD_REQUEST,
    CLIENT_GONE,
    INTERNAL,
    UNAVAILABLE,
    HttpError,
    answering,
    as_json,
    parse_object,
    read_bytes,
    read_object,
)
from agentpref_adapters.gateway import anthropic, openai
from agentpref_adapters.gateway.access import Access, App
from agentpref_adapters.gateway.asked import read
from agentpref_adapters.gateway.calls import Call, Repeats, stopping
from agentpref_adapters.gateway.metrics import Metrics
from agentpref_adapters.gateway.upstream import Upstream

MESSAGES = "/v1/messages"
_logger = logging.getLogger("agentpref")


class Gateway:
    """What requests share.

    Args:
        open_log: opens the log of a namespace.
        open_upstream: opens what answers for a namespace; it and the logs are closed by
            :meth:`close`.
        access: tells who asks.
        max_bytes: the most bytes of a request's body.
        max_open: how many calls may be answered at once; others are told to come back.
    """

    def __init__(
        self,
        open_log: Callable[[str], Log],
        open_upstream: Callable[[str], Upstream],
        access: Access,
        *,
        max_bytes: int = 16 << 20,
        max_open: int = 256,
    ) -> None:
        self.access, self.metrics, self.repeats = access, Metrics(), Repeats()
        self._open_log, self._open_upstream = open_log, open_upstream
        self._max_bytes, self._max_open = max_bytes, max_open
        self._logs: dict[str, Log] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._opening = asyncio.Lock()
        self._calls: dict[str, Call] = {}
        self._waiting: set[asyncio.Future[Any]] = set()
        self._open = 0
        self._closing = ExitStack()

    async def log(self, namespace: str) -> Log:
        """The log of a namespace, opened when it is asked for first."""
        if (found := self._logs.get(namespace)) is not None:
            return found
        async with self._opening:
            if namespace not in self._logs:
                log = await to_thread.run_sync(self._open_log, namespace)
                self._logs[namespace] = log
                self._closing.callback(log.close)
        return self._logs[namespace]

    async def upstream(self, namespace: str) -> Upstream:
        """What answers for a namespace; opening one holds no call of another up."""
        if (found := self._upstreams.get(namespace)) is not None:
            return found
        async with self._opening:
            if namespace not in self._upstreams:
                opened = await to_thread.run_sync(self._open_upstream, namespace)
                self._upstreams[namespace] = opened
        return self._upstreams[namespace]

    def is_open(self, run_id: str) -> bool:
        """Whether the answer of a run is still being written."""
        return run_id.partition(":")[0] in self._calls

    def stop(self) -> None:
        """End the calls that are still under way: their clients get an error."""
        for task in [*self._waiting]:
            task.cancel()
        for call in [*self._calls.values()]:
            call.stop()

    async def close(self) -> None:
        """Write what was logged, also of answers that are not whole, and let go of everything."""
        try:
            for call in [*self._calls.values()]:
                await call.aclose()
            for upstream in [*self._upstreams.values()]:
                await upstream.aclose()
        finally:
            await to_thread.run_sync(self._closing.close)

    async def answer(self, wire: ModuleType, request: Request) -> Response:
        """Answer a call in a wire format."""
        app = self.access.app(request)
        raw = await read_bytes(request, limit=self._max_bytes)
        body = parse_object(raw)
        if wire is anthropic:
            body = anthropic.as_openai(body)
        asked = read(body, request.headers)
        name, may_repeat = self.repeats.name(app.name, request.headers, raw, asked)
        given = self.repeats.find(name) if name and may_repeat else None
        if given is not None:
            return (wire.replayed if body.get("stream") else wire.whole)(*given)  # type: ignore[no-any-return]
        if name:
            self.repeats.forget(name)
        streaming = bool(body.get("stream"))
        if self._open >= self._max_open:
            raise HttpError(
                UNAVAILABLE,
                f"{self._max_open} calls are being answered; ask again in a moment",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        self._count(1)
        try:
            log, upstream = await self.log(app.namespace), await self.upstream(app.namespace)
            admitting = Call.admit(upstream, asked, log, self.metrics, streaming=streaming)
            call: Call = await self._unless_gone(request, admitting)
        except BaseException:
            self._count(-1)
            raise
        self._calls[asked.run_id] = call
        call.stack.callback(self._ended, asked.run_id)
        if name:
            call.on_whole = partial(self.repeats.keep, name, call.headers)
        if streaming:
            return wire.streamed(call)  # type: ignore[no-any-return]
        completion = await self._unless_gone(request, call.whole())
        return wire.whole(completion, call.headers)  # type: ignore[no-any-return]

    async def models(self, request: Request) -> Response:
        """List what may be asked for."""
        app = self.access.app(request)
        found = await (await self.upstream(app.namespace)).models()
        wanted = request.path_params.get("model")
        if wanted is None:
            return as_json({"object": "list", "data": found})
        for model in found:
            if model.get("id") == wanted:
                return as_json(model)
        raise HttpError(404, f"the model {wanted!r} is not served here", code="model_not_found")

    async def token(self, request: Request) -> Response:
        """Sign a token with which a page may judge one run."""
        app = self.access.app(request)
        body = await read_object(request, limit=1 << 16)
        run_id, user_id = body.get("run_id"), body.get("user_id")
        if not isinstance(run_id, str) or not run_id:
            raise HttpError(BAD_REQUEST, "run_id is missing: the id of the reply", param="run_id")
        if not isinstance(user_id, str | None):
            raise HttpError(BAD_REQUEST, "user_id is a text", param="user_id")
        token = await to_thread.run_sync(self.access.token, app, run_id, user_id)
        expires = int(time.time() + self.access.token_seconds)
        return as_json({"token": token, "expires_at": expires})

    async def caller(self, request: Request) -> Caller:
        """Who judges."""
        found = await self.access.judge(request)
        log = await self.log(found.namespace)
        if isinstance(found, App):
            return Caller(log, is_open=self.is_open)
        return Caller(log, found.run_id, found.user_id, is_page=True, is_open=self.is_open)

    async def collected(self, request: Request) -> Log | None:
        """The log that an app on another machine brings its runs to."""
        return await self.log(self.access.app(request).namespace)

    async def health(self, request: Request) -> Response:
        """Say whether the upstreams in use answer, and the usual one; 503 if one does not."""
        problems = {}
        try:
            await self.upstream(self.access.namespace)
        except AgentprefError as error:
            problems[self.access.namespace] = str(error)
        for namespace, upstream in [*self._upstreams.items()]:
            if (problem := await upstream.problem()) is not None:
                problems[namespace] = problem
        status = UNAVAILABLE if problems else 200
        try:
            self.access.app(request)
        except HttpError:
            problems = {}  # what is wrong is for those who may ask
        found = {"status": "ok" if status == 200 else "failing", "version": __version__}
        return as_json({**found, **({"problems": problems} if problems else {})}, status)

    async def measures(self, request: Request) -> Response:
        """What was counted, for Prometheus."""
        self.access.app(request)
        for namespace, log in self._logs.items():
            self.metrics.dropped.labels(namespace).set(sum(log.dropped.values()))
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _unless_gone(self, request: Request, work: Any) -> Any:
        """Wait for work; end it if the client leaves, or the gateway stops meanwhile."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(_leaving(request))
        self._waiting.add(task)
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled():
                raise stopping()
            if not task.done():
                raise _Gone
            return task.result()
        finally:
            self._waiting.discard(task)
            watch.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _ended(self, run_id: str) -> None:
        del self._calls[run_id]
        self._count(-1)

    def _count(self, more: int) -> None:
        self._open += more
        self.metrics.open.set(self._open)


def routes(gateway: Gateway) -> list[BaseRoute]:
    """The routes of a gateway; nothing else of an upstream is reachable."""
    found: list[BaseRoute] = [
        _failing_as(openai, "/v1/chat/completions", gateway),
        _failing_as(anthropic, MESSAGES, gateway),
        Route("/v1/models", answering(gateway.models), methods=["GET"]),
        Route("/v1/models/{model:path}", answering(gateway.models), methods=["GET"]),
        Route("/v1/feedback_tokens", answering(gateway.token), methods=["POST"]),
        Route("/health", answering(gateway.health), methods=["GET"]),
        Route("/metrics", answering(gateway.measures), methods=["GET"]),
    ]
    counted = lambda kind: gateway.metrics.judgements.labels(kind).inc()  # noqa: E731
    judged = feedback_routes(gateway.caller, counted)
    return [*found, *judged, *collector_routes(gateway.collected)]


def create_app(gateway: Gateway, *, origins: tuple[str, ...] = ()) -> Starlette:
    """The gateway as an ASGI app.

    Args:
        gateway: what requests share; the app closes it when it ends.
        origins: the pages that may ask from a browser.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await gateway.close()

    middleware = [Middleware(_Counting, metrics=gateway.metrics)]
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-agentpref-run-id", "x-agentpref-revision"],
            )
        )
    return Starlette(
        routes=routes(gateway),
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            HTTPException: _unknown,
            Exception: _failed,
        },
    )


def _failing_as(wire: ModuleType, path: str, gateway: Gateway) -> Route:
    """A route whose failures have the shape of its wire format."""

    async def endpoint(request: Request) -> Response:
        try:
            return await gateway.answer(wire, request)
        except _Gone:
            return Response(status_code=CLIENT_GONE)
        except (HttpError, AgentprefError) as error:
            failure = error if isinstance(error, HttpError) else HttpError.of(error)
            if failure.status >= INTERNAL:  # no fault of the client's: the operator is to see it
                _logger.warning("%s ends with %d: %s", path, failure.status, failure.message)
            return wire.failed(failure)  # type: ignore[no-any-return]

    return Route(path, endpoint, methods=["POST"])


async def _unknown(request: Request, error: Exception) -> Response:
    """An unknown route or method, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]} is not served here"
    failure = HttpError(error.status_code, message, code="unknown_url", headers=error.headers)
    return anthropic.failed(failure) if request.url.path == MESSAGES else failure.response()


async def _failed(request: Request, error: Exception) -> Response:
    """A defect of ours: the log has its trace, and the client learns nothing of it."""
    return HttpError(INTERNAL, "the gateway failed; see its log", code="internal_error").response()


class _Gone(Exception):
    """The client left before its answer was there."""


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Counting:
    """Counts requests by route and status, and the time to the first byte of the answer."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "unknown")
                self._metrics.requests.labels(path, str(message["status"])).inc()
                self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            path = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(path, str(INTERNAL)).inc()
            raise


__all__ = ["Gateway", "create_app", "routes"]
