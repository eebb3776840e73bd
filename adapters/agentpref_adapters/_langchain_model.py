"""A LangChain chat model whose answers come from the router, each from one revision.

The thread of the config keeps a conversation on one side of a canary. Tool calls and sampling are
the engine's; this file only translates. An asyncio task that is cancelled stops its request. It
does not know which engine or revision serves, and logs nothing.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    InvalidToolCall,
    ToolCall,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

from agentpref.errors import ConfigError
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.router import Router
from agentpref_adapters._langchain_convert import first_id, openai_messages

_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")
_PER_CALL = (*_SAMPLING, "tools", "thread_id")

RunManager = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun


class AgentprefChatModel(BaseChatModel):
    """A chat model served by whatever revision is live when each call comes in.

    ``response_metadata`` names the ``revision`` that wrote the answer, its ``token_ids`` and
    ``logprobs``, and the ``finish_reason``. ``thread_id`` in the config's ``metadata`` or
    ``configurable`` keeps a conversation on one side of a canary. The sampling fields, and
    ``thread_id``, can also be given with one call: ``model.invoke(messages, temperature=0.7)``.
    """

    router: Router = Field(exclude=True, repr=False)
    model: str = "agentpref"
    """The name that answers are logged under; it chooses nothing."""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    thread_id: str | None = None
    """The thread of calls whose config names none."""

    # A process-wide LangChain cache would answer with a revision that is no longer live.
    cache: BaseCache | bool | None = Field(default=False, exclude=True)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools to the model, in any form that LangChain knows.

        A ``tool_choice`` of ``"none"`` offers none of them, and the name of one offers that one.
        The engine does not constrain decoding: a call can be offered, but never forced.

        Raises:
            ConfigError: for a ``tool_choice`` that names no tool among them.
        """
        described = [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=_chosen(described, tool_choice), **kwargs)

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer once, in the thread that the config names."""
        return super().invoke(input, config, stop=stop, **_in_thread(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer once without blocking the event loop: the engine runs in another thread."""
        return await super().ainvoke(input, config, stop=stop, **_in_thread(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Answer piece by piece; where tools are offered, in one piece."""
        return super().stream(input, config, stop=stop, **_in_thread(config, kwargs))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer piece by piece without blocking the event loop."""
        return super().astream(input, config, stop=stop, **_in_thread(config, kwargs))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        reply = self.router.generate(request, thread_id=self._thread(run_manager, kwargs))
        return self._result(reply)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        pieces = self.router.stream(request, thread_id=self._thread(run_manager, kwargs))
        replies = [piece async for piece in _off_loop(pieces) if isinstance(piece, Reply)]
        return self._result(replies[-1])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs)
        for piece in self.router.stream(request, thread_id=self._thread(run_manager, kwargs)):
            yield from self._chunks(piece, request)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs)
        pieces = self.router.stream(request, thread_id=self._thread(run_manager, kwargs))
        async for piece in _off_loop(pieces):
            for chunk in self._chunks(piece, request):
                yield chunk

    def _result(self, reply: Reply) -> ChatResult:
        message = AIMessage(**_said(reply), response_metadata=self._provenance(reply))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunks(
        self, piece: str | Reply, request: GenerationRequest
    ) -> Iterator[ChatGenerationChunk]:
        if isinstance(piece, Reply):
            yield ChatGenerationChunk(message=self._last_chunk(piece, bool(request.tools)))
        # A tool call is known as one only when it is whole; until then it would pass for text.
        elif not request.tools:
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))

    def _last_chunk(self, reply: Reply, held_back: bool) -> AIMessageChunk:
        said = _said(reply) if held_back else {"content": ""}
        return AIMessageChunk(
            **said, response_metadata=self._provenance(reply), chunk_position="last"
        )

    def _provenance(self, reply: Reply) -> dict[str, Any]:
        return {
            "model_name": self.model,
            "revision": reply.revision,
            "finish_reason": reply.finish_reason,
            "token_ids": list(reply.token_ids),
            "logprobs": list(reply.logprobs),
        }

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> GenerationRequest:
        for name in kwargs:
            if name not in (*_PER_CALL, "stream"):  # "stream" is LangChain's own
                raise ConfigError(
                    f"AgentprefChatModel takes no {name!r} with a call; it takes "
                    f"{', '.join(_PER_CALL)} and stop"
                )
        return GenerationRequest(
            messages=tuple(openai_messages(messages)),
            tools=tuple(kwargs.get("tools") or ()),
            stop=tuple(stop or ()),
            **{name: kwargs.get(name, getattr(self, name)) for name in _SAMPLING},
        )

    def _thread(self, run_manager: RunManager | None, kwargs: Mapping[str, Any]) -> str | None:
        # generate() and the newest event streams come past invoke() and stream() above.
        metadata = run_manager.metadata if run_manager else {}
        return first_id("thread_id", kwargs, metadata, {"thread_id": self.thread_id})

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return {**super()._get_ls_params(stop=stop, **kwargs), "ls_provider": "agentpref"}

    @property
    def _llm_type(self) -> str:
        return "agentpref"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "thread_id", *_SAMPLING)}


async def _off_loop(pieces: Iterator[str | Reply]) -> AsyncIterator[str | Reply]:
    """Wait for pieces in other threads; leaving early closes them, after the one that is due."""
    turn = threading.Lock()

    def take() -> str | Reply | None:
        with turn:
            return next(pieces, None)

    def leave() -> None:
        with turn:
            pieces.close()  # type: ignore[attr-defined]

    try:
        while (piece := await run_in_executor(None, take)) is not None:
            yield piece
    except (asyncio.CancelledError, GeneratorExit):
        asyncio.get_running_loop().run_in_executor(None, leave)
        raise


def _in_thread(config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Carry the config's thread with the call: LangChain hands ``_stream`` no config."""
    full = ensure_config(config)
    thread = first_id("thread_id", kwargs, full.get("metadata"), full.get("configurable"))
    return {**kwargs, "thread_id": thread} if thread is not None else dict(kwargs)


def _said(reply: Reply) -> dict[str, Any]:
    """What the model said, in the fields of an ``AIMessage``: its text and its tool calls."""
    calls, invalid = _tool_calls(reply.message.get("tool_calls") or ())
    text = reply.message.get("content") or ""
    return {"content": text, "tool_calls": calls, "invalid_tool_calls": invalid}


def _tool_calls(raw: Sequence[Mapping[str, Any]]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """Tell the calls whose arguments are a JSON object from those that a model got wrong."""
    calls, invalid = [], []
    for call in raw:
        name, text, call_id = (
            call["function"]["name"],
            call["function"]["arguments"],
            call.get("id"),
        )
        arguments = _json_or_none(text)
        if isinstance(arguments, dict):
            calls.append(tool_call(name=name, args=arguments, id=call_id))
        else:
            error = "the arguments are not a JSON object"
            invalid.append(invalid_tool_call(name=name, args=text, id=call_id, error=error))
    return calls, invalid


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


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
