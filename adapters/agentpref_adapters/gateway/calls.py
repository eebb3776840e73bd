"""One call from start to end: admitted, answered, and recorded, whoever leaves in between.

A whole answer is recorded before it goes out, a stream before its end is told. What was streamed
when the client left or the upstream broke is recorded as incomplete, and nothing is learned from
it. A call that a client library repeats, because the answer never reached it, gets the answer that
was given, if there was a whole one: it makes no second run.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import orjson
from anyio import CancelScope

from agentpref.errors import AgentprefError
from agentpref.record.log import Log
from agentpref.types import INCOMPLETE
from agentpref_adapters._http import UNAVAILABLE, HttpError
from agentpref_adapters.gateway.asked import Asked
from agentpref_adapters.gateway.metrics import Metrics
from agentpref_adapters.gateway.upstream import Answer, Exchange, Upstream

_logger = logging.getLogger("agentpref")

_REPEATED_WITHIN = 600.0
_MOST_KEPT, _MOST_BYTES = 1_000, 64 << 20
_RETRY = "x-stainless-retry-count"
"""The header in which the client libraries of OpenAI and Anthropic count their own retries."""


class Call:
    """A call that was admitted; whoever has it closes it.

    Args:
        asked: what was asked for.
        exchange: the upstream's answer.
        log: where the run goes.
        metrics: what is counted.
        stack: what ends the work behind.

    ``on_whole`` is called with the answer once all of it is there and recorded.
    """

    def __init__(
        self, asked: Asked, exchange: Exchange, log: Log, metrics: Metrics, stack: AsyncExitStack
    ) -> None:
        self.asked, self.exchange, self.stack = asked, exchange, stack
        self._log, self._metrics = log, metrics
        self._answer: Answer | None = None
        self._streaming: asyncio.Task[Any] | None = None
        self._is_stopped = False
        self.on_whole: Callable[[dict[str, Any]], object] = lambda completion: None

    @classmethod
    async def admit(
        cls, upstream: Upstream, asked: Asked, log: Log, metrics: Metrics, *, streaming: bool
    ) -> Call:
        """Admit a call.

        Raises:
            HttpError: the upstream refuses, or cannot be reached.
            AgentprefError: the engine refuses.
        """
        stack = AsyncExitStack()
        exchange = await stack.enter_async_context(upstream.admit(asked, streaming=streaming))
        return cls(asked, exchange, log, metrics, stack)

    @property
    def headers(self) -> dict[str, str]:
        """What every answer says of its run, beside its body."""
        found = {"x-agentpref-run-id": self.asked.run_id, "x-thread-id": self.asked.thread_id}
        if self.exchange.revision is not None:
            found["x-agentpref-revision"] = self.exchange.revision
        return {name: value for name, value in found.items() if value.isascii()}

    async def whole(self) -> dict[str, Any]:
        """Wait for the answer, record it, and return it as it goes out."""
        try:
            completion = await self.exchange.whole()
            self._answer = Answer.of(completion)
            self._record()
        finally:
            await self.aclose()
        self.on_whole(self._signed(completion))
        return completion

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Give the pieces as they go out, and record the answer before its end is told."""
        answer = self._answer = Answer()
        self._streaming = asyncio.current_task()
        try:
            async for piece in self.exchange.pieces():
                answer.add(piece)
                yield self._signed(piece)
        except asyncio.CancelledError as error:
            if not self._is_stopped:
                raise
            raise stopping() from error
        self._record()
        self.on_whole(self._signed(answer.completion()))

    async def aclose(self) -> None:
        """End the work behind, and record what was answered if that was not done yet."""
        with CancelScope(shield=True):  # also where the client's leaving has cancelled everything
            self._record()
            await self.stack.aclose()

    def stop(self) -> None:
        """End a stream with an error that its client sees."""
        if self._streaming is not None:
            self._is_stopped = True
            self._streaming.cancel()

    def _signed(self, found: dict[str, Any]) -> dict[str, Any]:
        found["id"] = self.asked.run_id
        if self.exchange.revision is not None:
            found["system_fingerprint"] = self.exchange.revision
        return found

    def _record(self) -> None:
        """Record what was answered, once, a run for each answer; it never fails the call."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        asked = self.asked
        for index, choice, message in answer.messages():
            tokens = None if choice.finish_reason == INCOMPLETE else self.exchange.tokens(index)
            logprobs = choice.logprobs or None
            self._log.record(
                asked.messages,
                message,
                run_id=asked.run_of(index),
                model=answer.model or asked.body.get("model"),
                revision=self.exchange.revision,
                thread_id=asked.thread_id,
                trace_id=asked.trace_id,
                user_id=asked.user_id,
                tools=asked.tools,
                params=asked.params,
                token_ids=tokens.ids if tokens is not None else None,
                logprobs=tokens.logprobs if tokens is not None else logprobs,
                tags=asked.tags,
                metadata={
                    **asked.metadata,
                    "finish_reason": choice.finish_reason,
                    **({"usage": dict(answer.usage)} if answer.usage else {}),
                },
            )
            is_whole = choice.finish_reason != INCOMPLETE
            self._metrics.runs.labels(
                self._log.namespace, "whole" if is_whole else INCOMPLETE
            ).inc()


class Repeats:
    """Whole answers of the last minutes, for clients that ask again because they got none.

    A client says that it repeats a call by ``Idempotency-Key``, or as the libraries of OpenAI and
    Anthropic do, by counting its retries; these are told by the body.
    """

    def __init__(self) -> None:
        self._given: OrderedDict[str, tuple[float, bytes, dict[str, str]]] = OrderedDict()
        self._bytes = 0

    @staticmethod
    def name(
        app: str, headers: Mapping[str, str], body: bytes, asked: Asked
    ) -> tuple[str | None, bool]:
        """The name under which to keep the answer to a call, and whether it may be a repetition.

        It is of one conversation, person and message: others may ask the same in the same words,
        so of an app that says none of these only a key names a call.
        """
        key, count = headers.get("idempotency-key"), headers.get(_RETRY)
        if not key and (count is None or not asked.is_named):
            return None, False
        whose = [app, key, asked.thread_id, asked.trace_id, asked.user_id, asked.metadata]
        digest = hashlib.blake2b(orjson.dumps(whose), digest_size=16)
        digest.update(body)
        return digest.hexdigest(), bool(key) or count not in ("0", "")

    def forget(self, name: str) -> None:
        """Forget an answer: the call was made anew, and its retries are to get the new one."""
        if (found := self._given.pop(name, None)) is not None:
            self._bytes -= len(found[1])

    def find(self, name: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        """The answer that was given, with its headers."""
        self._drop_old()
        found = self._given.get(name)
        return None if found is None else (orjson.loads(found[1]), found[2])

    def keep(self, name: str, headers: dict[str, str], completion: Mapping[str, Any]) -> None:
        """Keep an answer for a while."""
        body = orjson.dumps(completion)
        self.forget(name)
        self._bytes += len(body)
        self._given[name] = (time.monotonic(), body, headers)
        self._drop_old()

    def _drop_old(self) -> None:
        oldest = time.monotonic() - _REPEATED_WITHIN
        while self._given:
            at, body, _ = next(iter(self._given.values()))
            full = len(self._given) > _MOST_KEPT or self._bytes > _MOST_BYTES
            if at > oldest and not full:
                return
            self._given.popitem(last=False)
            self._bytes -= len(body)


def stopping() -> HttpError:
    """What clients are told whose calls take longer than a gateway that stops can wait."""
    return HttpError(
        UNAVAILABLE,
        "the gateway is stopping; ask again",
        code="stopping",
        headers={"Retry-After": "5"},
    )


def as_failure(error: Exception) -> HttpError:
    """What broke in the middle of a stream, as the event that ends it."""
    if isinstance(error, HttpError | AgentprefError):
        found = error if isinstance(error, HttpError) else HttpError.of(error)
        _logger.warning("an answer broke off: %s", found.message)
        return found
    _logger.exception("an answer broke off", exc_info=error)
    return HttpError(UNAVAILABLE, "the answer broke off; ask again", code="internal_error")
