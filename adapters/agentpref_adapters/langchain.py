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
from operator import itemgetter
from typing import Any, Literal, TypeAlias

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
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableMap,
    RunnablePassthrough,
    ensure_config,
)
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import Field

from agentpref.serve.backend import AnswerStream, GenerationRequest, Reply
from agentpref.serve.router import Router
from agentpref_adapters._langchain_callback import AgentprefCallback, CallbackCounts
from agentpref_adapters._langchain_messages import first_id, openai_messages

__all__ = ["AgentprefCallback", "AgentprefChatModel", "CallbackCounts"]

_SAMPLING = ("max_tokens", "temperature", "top_p", "seed", "best_of")
_PER_CALL = (*_SAMPLING, "tools", "tool_choice", "response_format", "thread_id")
# What LangChain passes along: its own switch, and a setting of OpenAI's that is always on here.
_PASSED = ("stream", "strict")

Messages: TypeAlias = "list[BaseMessage]"
Stop: TypeAlias = "list[str] | None"


class AgentprefChatModel(BaseChatModel):
    """A chat model that answers with the revision that is live when a call comes in.

    ``response_metadata`` has the ``revision`` that wrote the answer, its ``token_ids`` and
    ``logprobs``, and the ``finish_reason``; ``usage_metadata`` counts tokens. ``thread_id`` in the
    config's ``metadata`` or ``configurable`` keeps a conversation on one side of a canary. The
    fields can also be set for one call: ``model.invoke(messages, temperature=0.7)``. So can
    ``response_format``, in OpenAI's shape.
    """

    router: Router = Field(exclude=True, repr=False)
    model: str = "agentpref"
    """The name under which answers are logged."""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    best_of: int = 1
    """Of so many answers the best one, where the router's backend has a reward model."""
    stop: list[str] | None = None
    """Strings that end an answer, where a call names none."""
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

        ``tool_choice`` ``"any"``, ``"required"`` or ``True`` makes each answer one call or more,
        the name of a tool one call of it, and ``"none"`` offers no tool.

        Raises:
            ConfigError: ``tool_choice`` names a tool that is not among them.
        """
        described = [convert_to_openai_tool(tool) for tool in tools]
        if (choice := _chosen(described, tool_choice)) is not None:
            kwargs["tool_choice"] = choice
        return self.bind(tools=described, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["function_calling", "json_schema", "json_mode"] = "function_calling",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Make the model answer with an object of a schema, which the engine enforces.

        ``function_calling`` makes the schema a tool that must be called, so that the model reads
        the names in it. ``json_schema`` enforces it on the answer's text, also for models that
        know no tools. ``json_mode`` enforces JSON of any kind: say in the prompt which. ``strict``
        changes nothing.

        Raises:
            ConfigError: there is no such method.
        """
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode"):
            raise ConfigError(
                f"method is {method!r}, but must be 'function_calling', 'json_schema' or "
                "'json_mode'"
            )
        wanted = convert_to_json_schema(schema)
        response_format: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            name = str(wanted.get("title", "answer"))
            response_format = {"type": method, "json_schema": {"name": name, "schema": wanted}}
        llm = self.bind(
            response_format=response_format,
            ls_structured_output_format={"kwargs": {"method": method}, "schema": wanted},
            **kwargs,
        )
        parser: BaseOutputParser[Any] = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=schema)
        if not include_raw:
            return llm | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | parsed.with_fallbacks(
            [unparsed], exception_key="parsing_error"
        )

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
        """Answer in pieces; a tool call comes in one, once it is complete."""
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
        chunks = _Chunks(request)
        for piece in self.router.stream(request, thread_id=thread_id):
            yield from chunks.of(piece)
            if isinstance(piece, Reply):
                yield self._last(piece)

    async def _astream(
        self, messages: Messages, stop: Stop = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        request, thread_id = self._request(messages, stop, run_manager, kwargs)
        chunks = _Chunks(request)
        async for piece in _off_loop(self.router.stream(request, thread_id=thread_id)):
            for chunk in chunks.of(piece):
                yield chunk
            if isinstance(piece, Reply):
                yield self._last(piece)

    def _result(self, reply: Reply) -> ChatResult:
        message = AIMessage(**_content(reply), **self._provenance(reply))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, reply: Reply) -> ChatGenerationChunk:
        """The chunk that says who wrote an answer, in which tokens."""
        provenance = self._provenance(reply)
        message = AIMessageChunk(content="", **provenance, chunk_position="last")
        return ChatGenerationChunk(message=message)

    def _provenance(self, reply: Reply) -> dict[str, Any]:
        said: dict[str, Any] = {
            "model_name": self.model,
            "revision": reply.revision,
            "finish_reason": reply.finish_reason,
            "token_ids": list(reply.token_ids),
            "logprobs": list(reply.logprobs),
        }
        if reply.score is not None:
            said["score"] = reply.score
        usage = None
        if (read := reply.prompt_tokens) is not None:
            wrote = len(reply.token_ids)
            usage = UsageMetadata(input_tokens=read, output_tokens=wrote, total_tokens=read + wrote)
        return {"response_metadata": said, "usage_metadata": usage}

    def _request(
        self, messages: Messages, stop: Stop, run_manager: Any, kwargs: Mapping[str, Any]
    ) -> tuple[GenerationRequest, str | None]:
        """The request, and the thread it belongs to."""
        for name in kwargs:
            if name not in (*_PER_CALL, *_PASSED):
                raise ConfigError(
                    f"AgentprefChatModel takes no {name!r} with a call; it takes "
                    f"{', '.join(_PER_CALL)} and stop"
                )
        request = GenerationRequest(
            messages=tuple(openai_messages(messages)),
            tools=tuple(kwargs.get("tools") or ()),
            stop=tuple((self.stop if stop is None else stop) or ()),
            tool_choice=kwargs.get("tool_choice") or "auto",
            response_format=kwargs.get("response_format"),
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
        return {name: getattr(self, name) for name in ("model", "thread_id", "stop", *_SAMPLING)}


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


class _Chunks:
    """The chunks of one answer, as its pieces come."""

    def __init__(self, request: GenerationRequest) -> None:
        self._stream, self._calls = AnswerStream(request), 0

    def of(self, piece: str | Reply) -> Iterator[ChatGenerationChunk]:
        """What is certain after a piece of text, or after the reply."""
        for item in self._stream.of(piece):
            message = AIMessageChunk(content=item) if isinstance(item, str) else self._call(item)
            yield ChatGenerationChunk(message=message)

    def _call(self, call: Mapping[str, Any]) -> AIMessageChunk:
        name, text = call["function"]["name"], call["function"]["arguments"]
        chunk = tool_call_chunk(name=name, args=text, id=call.get("id"), index=self._calls)
        self._calls += 1
        return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _chosen(tools: list[dict[str, Any]], choice: Any) -> str | None:
    """The choice as the engine takes it, from the forms that providers and LangChain have."""
    if choice is None or choice is False:
        return None
    if choice is True:
        return "any"
    if isinstance(choice, dict):
        choice = (choice.get("function") or choice).get("name") or choice.get("type")
    known = [str(tool.get("function", {}).get("name")) for tool in tools]
    if choice not in ("auto", "none", "any", "required", *known):
        raise ConfigError(
            f"tool_choice names {choice!r}, but the tools bound are {', '.join(known)}"
        )
    return str(choice)
