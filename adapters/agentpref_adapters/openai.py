"""OpenAI's client: log every answer of a model, and change nothing else.

``wrap`` hooks into the one place of a client through which all replies pass, after its retries:
chat completions and the Responses API, sync and async, whole and streamed, parsed and raw. What was
asked and answered is read from what went over the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from agentpref.errors import ConfigError, MissingDependency, described

try:
    import openai
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.openai needs openai, which is not installed: "
        "run pip install 'agentpref[openai]'"
    ) from error

from openai import AsyncOpenAI, OpenAI

from agentpref.record.log import Log
from agentpref_adapters._openai_calls import OpenAICounts, Recorder, Seen
from agentpref_adapters._openai_streams import RUN_ID, name_helper

__all__ = ["OpenAICounts", "counts", "run_id", "wrap"]

Client = TypeVar("Client", OpenAI, AsyncOpenAI)
_OURS = "_agentpref"
_PROCESS = "_process_response"
"""The method through which all replies of a client pass, once each, with what HTTP says of them."""


def wrap(
    client: Client,
    log: Log,
    *,
    tags: Sequence[str] = (),
    thread_id: str | None = None,
    user_id: str | None = None,
) -> Client:
    """Log the answers that a client gets, and return the client.

    Every reply, choice, stream and chunk has the id of its run as ``agentpref_run_id``; further
    answers to one request have ``"<run_id>:1"``, ``"<run_id>:2"``, …. Copies of the client
    (``copy``, ``with_options``) are logged, too. Wrapping a client again gives it other settings:
    ``wrap(client.copy(), log, thread_id="conversation-7")`` is a client for one conversation.

    A call says more of itself in ``metadata`` (``thread_id``, ``user_id``, ``trace_id``, and
    ``tags`` between commas), in ``extra_headers`` (``X-Thread-Id``, ``X-User-Id``, ``X-Trace-Id``)
    and as ``user``, as it would to a gateway of agentpref. Where a gateway answers, it has logged
    the run, and the client logs nothing.

    >>> client = wrap(OpenAI(), log, tags=["support"])
    >>> reply = client.chat.completions.create(model="gpt-5", messages=messages)
    >>> log.thumbs(reply.agentpref_run_id, up=True)

    Args:
        client: an ``OpenAI``, an ``AsyncOpenAI``, or one of their subclasses, as for Azure.
        log: where runs go; the caller closes it.
        tags: put before the tags of a call; the first is the domain tag of the run.
        thread_id: the thread of calls that name none.
        user_id: the user of calls that name none.

    Raises:
        ConfigError: the client, the log or the tags are something else, or the client is of a
            version of openai that works otherwise.
    """
    if not isinstance(client, (OpenAI, AsyncOpenAI)):
        raise ConfigError(
            f"client is {described(client)}; pass an OpenAI() or an AsyncOpenAI() client"
        )
    if not callable(getattr(client, _PROCESS, None)):
        raise ConfigError(
            f"openai {openai.__version__} takes in its replies otherwise than the versions that "
            "agentpref knows; install openai 3.57, or a newer agentpref"
        )
    if not callable(getattr(log, "record", None)):
        raise ConfigError(f'log is {described(log)}; pass agentpref.Log("./.agentpref")')
    if isinstance(tags, str):
        raise ConfigError(f"tags is {described(tags)}; pass a list of strings, such as ['support']")
    before = vars(client).get(_OURS)
    seen = before.seen if before is not None else Seen()
    recorder = Recorder(log, tuple(tags), thread_id, user_id, seen)
    if before is None:
        _hook(client)
    vars(client)[_OURS] = recorder
    return client


def counts(client: OpenAI | AsyncOpenAI) -> OpenAICounts:
    """What became of the calls of a wrapped client and its copies.

    Raises:
        ConfigError: the client is not wrapped.
    """
    recorder = vars(client).get(_OURS)
    if recorder is None:
        raise ConfigError(f"client is {described(client)}, and not wrapped; pass what wrap returns")
    found: OpenAICounts = recorder.seen.counts
    return found


def run_id(reply: Any) -> str | None:
    """The run of a reply, choice, stream or chunk, as type checkers cannot see its attribute.

    None if the client is not wrapped.
    """
    found: str | None = getattr(reply, RUN_ID, None)
    return found


def _hook(client: OpenAI | AsyncOpenAI) -> None:
    """Replace, on this client alone, what takes in replies, copies it, and makes helpers."""
    own = vars(client)
    own[_PROCESS] = _followed(client, isinstance(client, AsyncOpenAI))
    own["copy"] = own["with_options"] = _copied(client, client.copy)
    for resource in (client.chat.completions, client.responses):
        vars(resource)["stream"] = _naming(resource.stream)


def _followed(client: Any, is_async: bool) -> Callable[..., Any]:
    process = getattr(client, _PROCESS)

    def process_response(*, options: Any, response: Any, **rest: Any) -> Any:
        call = vars(client)[_OURS].begin(response)
        if call is None:
            return process(options=options, response=response, **rest)
        options.post_parser = call.after(options.post_parser)
        try:
            result = process(options=options, response=response, **rest)
        except BaseException:
            call.raised()
            raise
        return call.returned(result)

    async def aprocess_response(*, options: Any, response: Any, **rest: Any) -> Any:
        call = vars(client)[_OURS].begin(response)
        if call is None:
            return await process(options=options, response=response, **rest)
        options.post_parser = call.after(options.post_parser)
        try:
            result = await process(options=options, response=response, **rest)
        except BaseException:
            call.raised()
            raise
        return call.returned(result)

    return aprocess_response if is_async else process_response


def _copied(client: Any, copy: Callable[..., Any]) -> Callable[..., Any]:
    def copied(*args: Any, **kwargs: Any) -> Any:
        other = copy(*args, **kwargs)
        _hook(other)
        vars(other)[_OURS] = vars(client)[_OURS]
        return other

    return copied


def _naming(stream: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        return name_helper(stream(*args, **kwargs))

    return named
