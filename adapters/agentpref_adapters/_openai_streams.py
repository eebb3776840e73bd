"""Streams of OpenAI's client that tell a call what comes out of them.

A stream keeps its type, and gains the attribute ``agentpref_run_id``: its class is replaced by a
subclass that overrides public methods only. That a stream ends or breaks off shows in its
iteration; that it is left early, in the closing of its HTTP response, by whichever helper; that it
is dropped, when it is collected.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from openai import AsyncStream, Stream

if TYPE_CHECKING:
    from agentpref_adapters._openai_calls import Call

RUN_ID = "agentpref_run_id"
"""The attribute of replies, choices, streams and chunks that names their run."""


def is_stream(reply: Any) -> bool:
    """Whether a reply comes in pieces."""
    return isinstance(reply, (Stream, AsyncStream))


def follow(stream: Any, call: Call) -> None:
    """Let a call see what comes out of a stream, and that it ends."""
    kind: Any = type(stream)
    is_async = issubclass(kind, AsyncStream)
    stream.__class__ = _async_follower(kind) if is_async else _follower(kind)
    stream._agentpref = call
    weakref.finalize(stream, call.closed)
    name = "aclose" if is_async else "close"
    close, own = getattr(stream.response, name), vars(stream.response)

    def then_tell() -> Any:
        own.pop(name, None)  # a response that refers to itself would wait for the collector
        if is_async:
            return _aclose_and_tell(close, call)
        try:
            return close()
        finally:
            call.closed()

    own[name] = then_tell


async def _aclose_and_tell(close: Callable[[], Any], call: Call) -> None:
    try:
        await close()
    finally:
        call.closed()


@functools.cache
def _follower(kind: Any) -> type[Any]:
    """A kind of stream, whose chunks a call sees."""

    class Followed(kind):  # type: ignore[misc]
        agentpref_run_id = property(lambda self: self._agentpref.run_id)

        def __next__(self) -> Any:
            try:
                chunk = super().__next__()
            except BaseException:  # also its end
                self._agentpref.closed()
                raise
            self._agentpref.saw(chunk)
            return chunk

        def __iter__(self) -> Iterator[Any]:
            while True:
                try:
                    chunk = self.__next__()
                except StopIteration:
                    return
                yield chunk

    return _as(kind, Followed)


@functools.cache
def _async_follower(kind: Any) -> type[Any]:
    class Followed(kind):  # type: ignore[misc]
        agentpref_run_id = property(lambda self: self._agentpref.run_id)

        async def __anext__(self) -> Any:
            try:
                chunk = await super().__anext__()
            except BaseException:  # also its end, and a task that is cancelled
                self._agentpref.closed()
                raise
            self._agentpref.saw(chunk)
            return chunk

        async def __aiter__(self) -> AsyncIterator[Any]:
            while True:
                try:
                    chunk = await self.__anext__()
                except StopAsyncIteration:
                    return
                yield chunk

    return _as(kind, Followed)


def name_helper(manager: Any) -> Any:
    """Let the stream of a ``.stream()`` helper have the id of its run."""
    kind: Any = type(manager)
    manager.__class__ = _manager(kind)
    return manager


@functools.cache
def _manager(kind: Any) -> type[Any]:
    class Named(kind):  # type: ignore[misc]
        def __enter__(self) -> Any:
            return _named(super().__enter__())

        async def __aenter__(self) -> Any:
            return _named(await super().__aenter__())

    return _as(kind, Named)


def _named(stream: Any) -> Any:
    kind: Any = type(stream)
    stream.__class__ = _helper(kind)
    return stream


@functools.cache
def _helper(kind: Any) -> type[Any]:
    class Named(kind):  # type: ignore[misc]
        agentpref_run_id = property(lambda self: getattr(self._raw_stream, RUN_ID, None))

    return _as(kind, Named)


def _as(kind: Any, ours: type[Any]) -> type[Any]:
    """Show a class under the name of the one that it replaces."""
    ours.__name__, ours.__qualname__, ours.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return ours
