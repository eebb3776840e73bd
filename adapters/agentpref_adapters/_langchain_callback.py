"""Turns LangChain's events into ``Log.record`` calls, one for each answer of a model.

The functions at the end convert LangChain's messages, tools and settings to the OpenAI shapes that
agentpref stores. The chat model uses them too, so a message has one form everywhere.

A call is noted when the model starts and recorded when it ends, under LangChain's own run id. A
call that raises is dropped. Chains, tools and retrievers are followed to find the trace of a call.

It keeps its own notes instead of LangChain's ``BaseTracer``, which never frees the notes of
cancelled calls, nor one entry of its ``order_map`` for each run.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.runnables import ensure_config
from langchain_core.utils.function_calling import convert_to_openai_tool

from agentpref.record.log import Log

V = TypeVar("V")

# LangChain sends no event when a call is cancelled, so notes need a limit. It is far above what
# one process has in flight.
_MOST_KEPT = 10_000
# Only sampling parameters are logged; others may be endpoints, headers and keys.
_PARAMS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_sequences", "tool_choice",
    "max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "reasoning_effort",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
# The tags with which LangChain numbers the steps of a chain.
_STEP_TAG = re.compile(
    r"(seq|graph):step:\d+|map:key:.*|condition:\d+|branch:(\d+|default)|langsmith:.*"
)
# What the frameworks add to the metadata of a run. "langgraph_node" is logged: it names the part of
# a graph that called the model.
_FRAMEWORK_KEY = re.compile(
    r"(?!langgraph_node$)(ls|lc|langgraph|checkpoint)_.*|__.*|thread_id|user_id"
)


class CallbackCounts(NamedTuple):
    """What became of the model calls of a callback.

    ``logged`` answers were given to the log, whose ``dropped`` counts those it could not keep.
    ``failed`` calls raised, were cancelled or had their stream closed early. ``lost`` calls could
    not be converted; LangChain's logger says why. ``open`` calls are still running.
    """

    logged: int
    failed: int
    lost: int
    open: int


class AgentprefCallback(BaseCallbackHandler):
    """Logs every model call of a chain or an agent; pass it in ``config={"callbacks": […]}``.

    Works for invoke, stream, batch and their async forms. A run gets LangChain's own run id, as a
    string; further answers to the same prompt get ``"<run_id>:1"``, ``"<run_id>:2"``, …. The trace
    is the root run of the chain or agent, and :meth:`answer_of` finds the run of its final answer,
    for feedback. ``thread_id`` and ``user_id`` come from the config's ``metadata``, then from its
    ``configurable``, then from the arguments here. (In a ``batch``, LangChain passes callbacks the
    metadata only.)

    An error in the callback never breaks the chain: LangChain logs it; :attr:`counts` counts it.

    Args:
        log: where runs go; the caller closes it.
        tags: put before the tags of the config; the first is the domain tag of the run.
        thread_id: the thread of runs whose config has none.
        user_id: the user of runs whose config has none.
    """

    raise_error = False
    # Run in the caller's thread and context, also under asyncio: recording takes microseconds, the
    # order of events is kept, and the config with the thread id can be read.
    run_inline = True

    def __init__(
        self,
        log: Log,
        *,
        tags: Sequence[str] = (),
        thread_id: str | None = None,
        user_id: str | None = None,
    ) -> None:
        self._log = log
        self._tags = tuple(tags)
        self._defaults = {"thread_id": thread_id, "user_id": user_id}
        self._lock = threading.Lock()
        self._calls: dict[UUID, dict[str, Any]] = {}
        self._roots: dict[UUID, UUID] = {}
        self._answers: dict[UUID, str] = {}
        self._counted: Counter[str] = Counter()

    @property
    def counts(self) -> CallbackCounts:
        """What became of the model calls so far."""
        seen = self._counted
        return CallbackCounts(seen["logged"], seen["failed"], seen["lost"], len(self._calls))

    def answer_of(self, trace_id: UUID) -> str | None:
        """The run that answered last in a trace, for the 10,000 newest traces.

        ``trace_id`` is the ``run_id`` of the config that the chain or agent was called with.
        """
        return self._answers.get(trace_id)

    def on_chat_model_start(
        self, serialized: Any, messages: list[list[BaseMessage]], *, run_id: UUID, **event: Any
    ) -> None:
        """Note a call to a chat model. LangChain sends one event for each prompt of a batch."""
        with self._counting_losses():
            self._note(run_id, openai_messages(messages[0]), event)

    def on_llm_start(
        self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **event: Any
    ) -> None:
        """Note a call to a plain text model, as one message of the user."""
        with self._counting_losses():
            self._note(run_id, [{"role": "user", "content": prompts[0]}], event)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **event: Any) -> None:
        """Record the answers to one prompt."""
        call = self._take(self._calls, run_id)
        if call is None:
            return
        with self._counting_losses():
            for index, answer in enumerate(response.generations[0]):
                name = f"{run_id}:{index}" if index else str(run_id)
                self._log.record(run_id=name, **{**call, **_answered(answer, call["model"])})
                self._count("logged")
            self._put(self._answers, UUID(call["trace_id"]), str(run_id))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Drop a call that raised, was cancelled or had its stream closed early."""
        if self._take(self._calls, run_id) is not None:
            self._count("failed")

    def _on_start(self, *what: Any, run_id: UUID, **event: Any) -> None:
        """Note the trace of a chain, tool or retriever, which may call a model."""
        self._put(self._roots, run_id, self._root(run_id, event))

    def _on_end(self, *what: Any, run_id: UUID, **event: Any) -> None:
        """Drop the note of a chain, tool or retriever that ended or raised."""
        self._take(self._roots, run_id)

    on_chain_start = on_tool_start = on_retriever_start = _on_start
    on_chain_end = on_tool_end = on_retriever_end = _on_end
    on_chain_error = on_tool_error = on_retriever_error = _on_end

    def _note(self, run_id: UUID, messages: list[dict[str, Any]], event: Mapping[str, Any]) -> None:
        metadata = event.get("metadata") or {}
        invocation = event.get("invocation_params") or {}
        places = (metadata, invocation, ensure_config().get("configurable"), self._defaults)
        model = metadata.get("ls_model_name") or invocation.get("model")
        tags = [tag for tag in event.get("tags") or () if not _STEP_TAG.fullmatch(tag)]
        call = {
            "messages": messages,
            "tools": [openai_tool(tool) for tool in invocation.get("tools") or ()],
            "model": model or invocation.get("model_name"),
            "params": {key: invocation[key] for key in _PARAMS if invocation.get(key) is not None},
            "tags": list(dict.fromkeys([*self._tags, *tags])),
            "metadata": {k: v for k, v in metadata.items() if not _FRAMEWORK_KEY.fullmatch(k)},
            "thread_id": first_id("thread_id", *places),
            "user_id": first_id("user_id", *places),
            "trace_id": str(self._root(run_id, event)),
        }
        self._put(self._calls, run_id, call)

    def _root(self, run_id: UUID, event: Mapping[str, Any]) -> UUID:
        """The root run; the parent, where the handler was attached below the root."""
        parent: UUID | None = event.get("parent_run_id")
        return run_id if parent is None else self._roots.get(parent) or parent

    def _put(self, notes: dict[UUID, V], run_id: UUID, value: V) -> None:
        """Note a value for a run, and drop the oldest note where there are too many."""
        with self._lock:
            notes[run_id] = value
            dropped = notes.pop(next(iter(notes)), None) if len(notes) > _MOST_KEPT else None
        if dropped is not None and notes is self._calls:
            self._count("failed")

    def _take(self, notes: dict[UUID, V], run_id: UUID) -> V | None:
        with self._lock:
            return notes.pop(run_id, None)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counted[name] += 1

    @contextmanager
    def _counting_losses(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._count("lost")
            raise  # LangChain logs it and continues, since raise_error is off


def _answered(answer: Generation, model: str | None) -> dict[str, Any]:
    """The output of a generation, and who wrote it in which tokens."""
    if not isinstance(answer, ChatGeneration):
        return {"output": answer.text}
    reply = answer.message.response_metadata
    ours = reply if "revision" in reply else {}  # elsewhere, "logprobs" has other shapes
    return {
        "output": openai_messages([answer.message])[0],
        "model": reply.get("model_name") or reply.get("model") or model,
        "revision": ours.get("revision"),
        "token_ids": ours.get("token_ids"),
        "logprobs": ours.get("logprobs"),
    }


def openai_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Convert messages to OpenAI's shape; one with several tool results becomes several.

    Content that is all text becomes one string; multimodal content stays a list of blocks.
    """
    converted = []
    for message in messages:
        bodies = convert_to_openai_messages([message], text_format="block")
        for body in bodies:
            # No separator: providers split one sentence into several blocks to cite sources.
            if all(block.get("type") == "text" for block in body["content"]):
                body["content"] = "".join(block["text"] for block in body["content"])
        # LangChain leaves invalid calls out, but the model wrote them.
        for call in message.invalid_tool_calls if isinstance(message, AIMessage) else ():
            function = {"name": call["name"] or "", "arguments": call["args"] or ""}
            raw = {"type": "function", "id": call["id"], "function": function}
            bodies[0].setdefault("tool_calls", []).append(raw)
        converted += bodies
    return converted


def openai_tool(tool: Any) -> dict[str, Any]:
    """Describe a tool in OpenAI's shape; a provider's built-in tool stays as it is."""
    try:
        return convert_to_openai_tool(tool)
    except ValueError:
        if isinstance(tool, Mapping):
            return dict(tool)
        raise


def first_id(name: str, *places: Mapping[str, Any] | None) -> str | None:
    """The id of that name from the first place that has it, as a string."""
    found = (place[name] for place in places if place and place.get(name) is not None)
    value = next(found, None)
    return None if value is None else str(value)
