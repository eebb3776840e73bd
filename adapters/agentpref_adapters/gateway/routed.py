"""An upstream that is a home's own model: what is live answers, in this process or through vLLM.

A call is bound to one revision when it is admitted, and every token of it comes from that one. The
engine works in threads, so a call waits in a thread for each piece, and the event loop for none.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from anyio import CancelScope, CapacityLimiter, to_thread

from agentpref.errors import AgentprefError
from agentpref.serve.backend import AnswerStream, GenerationRequest, Reply, ServingBackend
from agentpref.serve.router import Lease, Router
from agentpref_adapters._http import BAD_REQUEST, NOT_FOUND, HttpError
from agentpref_adapters.gateway.asked import Asked
from agentpref_adapters.gateway.upstream import Exchange, Tokens

_NEUTRAL: Mapping[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "top_logprobs": 0,
    "parallel_tool_calls": True, "store": False, "modalities": ["text"], "service_tier": "auto",
}  # fmt: skip
"""Parameters that nothing here applies, and the values at which that changes nothing."""

_KNOWN = frozenset({
    "model", "messages", "tools", "stream", "stream_options", "max_tokens",
    "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "logprobs", "user",
    "metadata", "tool_choice", "response_format", "chat_template_kwargs", "safety_identifier",
    "prompt_cache_key", "best_of",
})  # fmt: skip


class Routed:
    """Answers with the revision that is live in a namespace.

    Args:
        router: which revision answers.
        backend: the engine behind it.
        model: the base model's name, which apps ask for.
        decode: turns token ids into text, for ``logprobs``.
        limiter: how many threads may wait for the engine.
        max_tokens: how long an answer may be where the app does not say.
    """

    def __init__(
        self,
        router: Router,
        *,
        model: str,
        decode: Callable[[Sequence[int]], str],
        limiter: CapacityLimiter,
        max_tokens: int = 1024,
    ) -> None:
        self._router, self._model, self._decode = router, model, decode
        self._limiter, self._max_tokens = limiter, max_tokens
        self._since = int(time.time())

    @property
    def _backend(self) -> ServingBackend:
        return self._router.backend

    @asynccontextmanager
    async def admit(self, asked: Asked, *, streaming: bool) -> AsyncIterator[Exchange]:
        """Bind a call to the revision of its thread; a prompt that does not fit is refused here."""
        request = self._request(asked)
        lease = self._router.acquire(asked.thread_id)
        streams: list[_Stream] = []
        try:
            exchange = _Routing(self, asked, request, lease.revision)
            streams = exchange.streams
            if streaming:
                await exchange.begin()
            yield exchange
        finally:
            for stream in streams:
                stream.end()
            with CancelScope(shield=True):  # the engine may be at a piece, and unload what is idle
                await to_thread.run_sync(_let_go, streams, lease, limiter=self._limiter)

    async def models(self) -> list[dict[str, Any]]:
        """The base, under whose name whatever is live answers."""
        state = self._router.serving
        return [
            {
                "id": self._model,
                "object": "model",
                "created": self._since,
                "owned_by": "agentpref",
                "revision": state.live or "base",
            }
        ]

    async def problem(self) -> str | None:
        """Whether the engine answers."""
        try:
            await to_thread.run_sync(self._backend.list_loaded)
        except AgentprefError as error:
            return str(error)
        return None

    async def aclose(self) -> None:
        """Close the router; whoever opened the engine closes that."""
        await to_thread.run_sync(self._router.close)

    def _request(self, asked: Asked) -> GenerationRequest:
        body = asked.body
        if body.get("model") not in (None, "", self._model):
            raise HttpError(
                NOT_FOUND,
                f"the model {body['model']!r} is not served here; ask for {self._model!r}",
                param="model",
                code="model_not_found",
            )
        for name, value in body.items():
            if name in _KNOWN or value is None or value == _NEUTRAL.get(name, _Unlike):
                continue
            raise HttpError(
                BAD_REQUEST,
                f"{name} is not supported by this model's engine; leave it out",
                param=name,
                code="unsupported_parameter",
            )
        stop = body.get("stop") or ()
        given = {
            "max_tokens": body.get("max_completion_tokens", body.get("max_tokens")),
            "temperature": body.get("temperature"),
            "top_p": body.get("top_p"),
            "seed": body.get("seed"),
            "best_of": body.get("best_of"),
            "tool_choice": _tool_choice(body.get("tool_choice")),
            "response_format": body.get("response_format"),
            "chat_template_kwargs": body.get("chat_template_kwargs"),
        }
        kept = {name: value for name, value in given.items() if value is not None}
        return GenerationRequest(
            asked.messages,
            asked.tools,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            **{"max_tokens": self._max_tokens, "temperature": 1.0, **kept},
        )


def _tool_choice(choice: Any) -> Any:
    """OpenAI's choice of a tool, by its name; what is none is refused with the request."""
    if not isinstance(choice, Mapping):
        return choice
    function = choice.get("function")
    return function.get("name") if isinstance(function, Mapping) else choice


class _Unlike:
    """Equal to nothing that JSON holds."""


class _Routing:
    """One call that was admitted."""

    def __init__(
        self, upstream: Routed, asked: Asked, request: GenerationRequest, revision: str
    ) -> None:
        self.revision: str | None = revision
        self._upstream, self._asked, self._request = upstream, asked, request
        self._created = int(time.time())
        backend = upstream._backend
        self.streams = [
            _Stream(backend.stream(revision, self._numbered(request, index)), upstream._limiter)
            for index in range(asked.n)
        ]
        self._replies: dict[int, Reply] = {}

    def _numbered(self, request: GenerationRequest, index: int) -> GenerationRequest:
        """The request of one of several answers: with a seed, each has one of its own."""
        if request.seed is None or not index:
            return request
        return replace(request, seed=request.seed + index)

    async def begin(self) -> None:
        """Wait for the first piece of the first answer, so that a refusal comes before any."""
        await self.streams[0].peek()

    async def whole(self) -> dict[str, Any]:
        await asyncio.gather(*map(self._drain, range(len(self.streams))))
        choices = [
            {
                "index": index,
                "message": dict(reply.message),
                "finish_reason": _reason(reply),
                "logprobs": self._logprobs(reply),
                **({} if reply.score is None else {"score": reply.score}),
            }
            for index, reply in sorted(self._replies.items())
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        for index, stream in enumerate(self.streams):
            yield self._chunk(index, {"role": "assistant", "content": ""})
            reader, calls = AnswerStream(self._request), 0
            async for piece in stream:
                # Where no tool is offered, text is none of a call, and is not held back.
                if isinstance(piece, str) and not self._asked.tools:
                    yield self._chunk(index, {"content": piece})
                    continue
                for item in reader.of(piece) if self._asked.tools else ():
                    if isinstance(item, str):
                        yield self._chunk(index, {"content": item})
                    else:
                        yield self._chunk(index, {"tool_calls": [{"index": calls, **item}]})
                        calls += 1
                if isinstance(piece, Reply):
                    self._replies[index] = piece
                    yield self._last_chunk(index, piece)
        if (self._asked.body.get("stream_options") or {}).get("include_usage"):
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def tokens(self, index: int) -> Tokens | None:
        reply = self._replies.get(index)
        return None if reply is None else Tokens(reply.token_ids, reply.logprobs)

    async def _drain(self, index: int) -> None:
        async for piece in self.streams[index]:
            if isinstance(piece, Reply):
                self._replies[index] = piece

    def _last_chunk(self, index: int, reply: Reply) -> dict[str, Any]:
        """The chunk that says how an answer ended."""
        last = self._chunk(index, {})
        last["choices"][0] |= {"finish_reason": _reason(reply), "logprobs": self._logprobs(reply)}
        return last

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._upstream._model
        return {"id": self._asked.run_id, "object": kind, "created": self._created, "model": model}

    def _chunk(self, index: int, delta: Mapping[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "finish_reason": None, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, reply: Reply) -> dict[str, Any] | None:
        if not self._asked.body.get("logprobs"):
            return None
        content = []
        for token, logprob in zip(reply.token_ids, reply.logprobs, strict=True):
            text = self._upstream._decode([token])
            content.append(
                {"token": text, "logprob": logprob, "bytes": [*text.encode()], "top_logprobs": []}
            )
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, int]:
        written = sum(len(reply.token_ids) for reply in self._replies.values())
        read = next((reply.prompt_tokens or 0 for reply in self._replies.values()), 0)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }


def _reason(reply: Reply) -> str:
    is_call = reply.finish_reason == "stop" and reply.message.get("tool_calls")
    return "tool_calls" if is_call else reply.finish_reason


def _let_go(streams: Sequence[_Stream], lease: Lease) -> None:
    """Wait until the engine has left each stream, and give the revision back."""
    with lease:
        for stream in streams:
            stream.close()


class _Stream:
    """Pieces of an engine's stream, each waited for in a thread."""

    def __init__(self, pieces: Iterator[str | Reply], limiter: CapacityLimiter) -> None:
        # Closing a generator ends the engine's work for it.
        self._pieces: Any = pieces
        self._limiter = limiter
        self._turn = threading.Lock()
        self._closed = threading.Event()
        self._first: list[str | Reply | None] = []

    async def peek(self) -> None:
        """Wait for the first piece, and keep it."""
        self._first.append(await self._take())

    def __aiter__(self) -> AsyncIterator[str | Reply]:
        return self

    async def __anext__(self) -> str | Reply:
        piece = self._first.pop() if self._first else await self._take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _take(self) -> str | Reply | None:
        return await to_thread.run_sync(self._next, limiter=self._limiter, abandon_on_cancel=True)

    def _next(self) -> str | Reply | None:
        with self._turn:
            return None if self._closed.is_set() else next(self._pieces, None)

    def end(self) -> None:
        """Ask for no further piece."""
        self._closed.set()

    def close(self) -> None:
        """End the work behind, as soon as the engine has the piece that it is at."""
        with self._turn:
            self._pieces.close()
