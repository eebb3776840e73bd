"""LangChain: a callback that logs every model call, and a chat model that the router serves.

Each works without the other. Both import langchain-core only, and work with the agents of langchain
and langgraph through its interfaces.

The chat model translates messages, tools and settings between LangChain and the router. The thread
of the config keeps a conversation on one side of a canary. Cancelling an asyncio task stops its
request.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from agentpref.errors import ConfigError, MissingDependency

try:
    import langchain_core  # noqa: F401  (checked first, for a clear error)
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.langchain needs langchain-core, which is not installed: "
        "run pip install 'agentpref[langchain]'"
    ) from error

from langchain_core.caches import BaseCache
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.router import Router
from agentpref_adapters._langchain_callback import AgentprefCallback, CallbackCounts
from agentpref_adapters._langchain_messages import first_id, openai_messages

__all__ = ["AgentprefCallback", "AgentprefChatModel", "CallbackCounts"]

_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")
_PER_CALL = (*_SAMPLING, "tools", "thread_id")

Messages: TypeAlias = "list[BaseMessage]"
Stop: TypeAlias = "list[str] | None"


class AgentprefChatModel(BaseChatModel):
    """A chat model that answers with the revision that is live when a call comes in.

    ``response_metadata`` has the ``revision`` that wrote the answer, its ``token_ids`` and
    ``logprobs``, and the ``finish_reason``. ``thread_id`` in the config's ``metadata`` or
    ``configurable`` keeps a conversation on one side of a canary. The sampling fields and
    ``thread_id`` can also be set for one call: ``model.invoke(messages, temperature=0.7)``.
    """

    router: Router = Field(exclude=True, repr=False)
    model: str = "agentpref"
    """The name under which answers are logged."""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    thread_id: str | None = None
    """The thread of calls whose config has none."""

    # A process-wide LangChain cache would return answers of a revision that is no longer live.
    cache: BaseCache | bool | None = Field(default=False, exclude=True)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools to the model, in any form that LangChain accepts.

        ``tool_choice="none"`` offers no tool, and the name of a tool offers that tool only. The
        engine does not constrain decoding, so a call cannot be forced.

        Raises:
            ConfigError: ``tool_choice`` names a tool that is not among them.
        """
        described = [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=_chosen(described, tool_choice), **kwargs)

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Answer once, in the thread of the config."""
        return super().invoke(input, config, **_in_thread(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Answer once; the engine runs in another thread and does not block the event loop."""
        return await super().ainvoke(input, config, **_in_thread(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """Answer in pieces; in one piece where tools are offered."""
        return super().stream(input, config, **_in_thread(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer in pieces without blocking the event loop."""
        return super().astream(input, config, **_in_thread(config, kwargs))

    def _generate(
        self, messages: Messages, stop: Stop = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        request, thread_id = self._request(messages, stop, run_manager, kwargs)
        return self._result(self.router.generate(request, thread_id=thread_id))

    async def _agenerate(
        self, messages: Messages, stop: Stop = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        request, thread_id = self._request(messages, stop, run_manager, kwargs)
        pieces = _off_loop(self.router.stream(request, thread_id=thread_id))
        replies = [piece async for piece in pieces if isinstance(piece, Reply)]
        return self._result(replies[-1])

    def _stream(
        self, messages: Messages, stop: Stop = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        request, thread_id = self._request(messages, stop, run_manager, kwargs)
        for piece in self.router.stream(request, thread_id=thread_id):
            yield from self._chunks(piece, request)

    async def _astream(
        self, messages: Messages, stop: Stop = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        request, thread_id = self._request(messages, stop, run_manager, kwargs)
        async for piece in _off_loop(self.router.stream(request, thread_id=thread_id)):
            for chunk in self._chunks(piece, request):
                yield chunk

    def _result(self, reply: Reply) -> ChatResult:
        message = AIMessage(**_content(reply), response_metadata=self._provenance(reply))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunks(
        self, piece: str | Reply, request: GenerationRequest
    ) -> Iterator[ChatGenerationChunk]:
        if isinstance(piece, Reply):
            content = _content(piece) if request.tools else {"content": ""}
            message = AIMessageChunk(
                **content, response_metadata=self._provenance(piece), chunk_position="last"
            )
            yield ChatGenerationChunk(message=message)
        # With tools, text is held back: only the whole answer shows whether it is a tool call.
        elif not request.tools:
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))

    def _provenance(self, reply: Reply) -> dict[str, Any]:
        return {
            "model_name": self.model,
            "revision": reply.revision,
            "finish_reason": reply.finish_reason,
            "token_ids": list(reply.token_ids),
            "logprobs": list(reply.logprobs),
        }

    def _request(
        self, messages: Messages, stop: Stop, run_manager: Any, kwargs: Mapping[str, Any]
    ) -> tuple[GenerationRequest, str | None]:
        """The request, and the thread it belongs to."""
        for name in kwargs:
            if name not in (*_PER_CALL, "stream"):  # "stream" is LangChain's own
                raise ConfigError(
                    f"AgentprefChatModel takes no {name!r} with a call; it takes "
                    f"{', '.join(_PER_CALL)} and stop"
                )
        request = GenerationRequest(
            messages=tuple(openai_messages(messages)),
            tools=tuple(kwargs.get("tools") or ()),
            stop=tuple(stop or ()),
            **{name: kwargs.get(name, getattr(self, name)) for name in _SAMPLING},
        )
        # generate() and event streams bypass invoke() and stream(), which pass thread_id on.
        metadata = run_manager.metadata if run_manager else {}
        return request, first_id("thread_id", kwargs, metadata, {"thread_id": self.thread_id})

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return {**super()._get_ls_params(stop=stop, **kwargs), "ls_provider": "agentpref"}

    @property
    def _llm_type(self) -> str:
        return "agentpref"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "thread_id", *_SAMPLING)}


async def _off_loop(pieces: Iterator[str | Reply]) -> AsyncIterator[str | Reply]:
    """Wait for pieces in other threads; cancelling closes the stream after the piece in work."""
    turn = threading.Lock()

    def take() -> str | Reply | None:
        with turn:
            return next(pieces, None)

    def close() -> None:
        with turn:
            pieces.close()  # type: ignore[attr-defined]

    try:
        while (piece := await run_in_executor(None, take)) is not None:
            yield piece
    except (asyncio.CancelledError, GeneratorExit):
        asyncio.get_running_loop().run_in_executor(None, close)
        raise


def _in_thread(config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Add the config's thread to the arguments of a call: ``_stream`` does not get the config."""
    full = ensure_config(config)
    thread = first_id("thread_id", kwargs, full.get("metadata"), full.get("configurable"))
    return {**kwargs, "thread_id": thread} if thread is not None else dict(kwargs)


def _content(reply: Reply) -> dict[str, Any]:
    """The text and the tool calls of an ``AIMessage``.

    A call whose arguments are not a JSON object becomes an invalid tool call.
    """
    calls, invalid = [], []
    for call in reply.message.get("tool_calls") or ():
        name, text = call["function"]["name"], call["function"]["arguments"]
        try:
            arguments = json.loads(text)
        except json.JSONDecodeError:
            arguments = None
        if isinstance(arguments, dict):
            calls.append(tool_call(name=name, args=arguments, id=call.get("id")))
        else:
            error = "the arguments are not a JSON object"
            invalid.append(invalid_tool_call(name=name, args=text, id=call.get("id"), error=error))
    text = reply.message.get("content") or ""
    return {"content": text, "tool_calls": calls, "invalid_tool_calls": invalid}


def _chosen(tools: list[dict[str, Any]], choice: Any) -> list[dict[str, Any]]:
    if choice in (None, True, "auto", "any", "required"):
        return tools
    if choice == "none":
        return []
    name = choice["function"]["name"] if isinstance(choice, dict) else choice
    by_name = {tool.get("function", {}).get("name"): tool for tool in tools}
    if name not in by_name:
        known = ", ".join(str(known) for known in by_name)
        raise ConfigError(f"tool_choice names {name!r}, but the tools bound are {known}")
    return [by_name[name]]
