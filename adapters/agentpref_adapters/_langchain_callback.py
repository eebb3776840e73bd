"""Turns LangChain's events into ``Log.record`` calls, one for each answer of a model.

A call is noted when the model starts and recorded when it ends, under LangChain's own run id. A
call that raises is dropped. Chains, tools and retrievers are followed to find the trace of a call.

It keeps its own notes instead of LangChain's ``BaseTracer``, which never frees the notes of
cancelled calls, nor one entry of its ``order_map`` for each run.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import ensure_config

from agentpref.errors import ConfigError, described
from agentpref.record.forks import guard, let_go
from agentpref.record.log import Log
from agentpref_adapters._langchain_messages import (
    answered,
    finish_reason,
    first_id,
    openai_messages,
    openai_tool,
)

K = TypeVar("K")
V = TypeVar("V")

# LangChain sends no event when a call is cancelled, so notes need limits. These are far above what
# one process has in flight.
_MOST_KEPT = 10_000
_MOST_BYTES = 64 * 1024 * 1024
# Only sampling parameters are logged; others may be endpoints, headers and keys.
_PARAMS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_sequences", "tool_choice",
    "max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "reasoning_effort",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
# The tags with which LangChain and LangGraph mark the steps of a chain.
_STEP_TAG = re.compile(
    r"(seq|graph):step:\d+|retry:attempt:\d+|map:key:.*|condition:\d+|branch:(\d+|default)"
    r"|langsmith:.*|nostream"
)
# The id that LangChain gives to a message: of its run, and of its place among several answers.
_OF_LANGCHAIN = re.compile(r"lc_run-+([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:-(\d+))?")
# What the frameworks add to the metadata of a run. "langgraph_node" is logged: it names the part of
# a graph that called the model.
_FRAMEWORK_KEY = re.compile(
    r"(?!langgraph_node$)(ls|lc|langgraph|checkpoint)_.*|__.*|thread_id|user_id"
)
# What the logger says of run ids that are not unique.
_AGAIN = (
    "run_id %s was the id of an earlier call: this answer is run %s, which answer_of(run_id) "
    "returns; give each call a run_id of its own"
)
_AT_ONCE = (
    "run_id %s is the id of two calls at once, which cannot be told apart: neither is logged; give "
    "each call a run_id of its own"
)
_logger = logging.getLogger("agentpref")


class CallbackCounts(NamedTuple):
    """What became of the model calls of a callback.

    ``logged`` answers were given to the log, whose ``dropped`` counts those it could not keep.
    ``failed`` calls raised, were cancelled, had their stream closed early, or were the oldest of
    10,000 or 64 MiB that had no end. ``lost`` calls could not be converted, or ran at the same time
    as another one with their run id; the logs of LangChain and ``agentpref`` say why. ``open``
    calls are still running. ``repeated`` of the logged answers came under a run id that an earlier
    call had, and were given another one.
    """

    logged: int
    failed: int
    lost: int
    open: int
    repeated: int = 0


class _Call(NamedTuple):
    """A call that runs: what is known of its run, about how many bytes, and its traces."""

    about: dict[str, Any]
    size: int
    traces: tuple[UUID, ...]


class _Last(NamedTuple):
    """The call of a trace that started last, and the run of its answer.

    If an earlier call answers after it started, they overlap, and neither is the last.
    """

    call: UUID
    answer: str | None = None
    overlaps: bool = False


class AgentprefCallback(BaseCallbackHandler):
    """Logs every model call of a chain or an agent; pass it in ``config={"callbacks": […]}``.

    Works for invoke, stream, batch and their async forms. A run gets LangChain's own run id, as a
    string; further answers to the same prompt get ``"<run_id>:1"``, ``"<run_id>:2"``, …, and the
    answer of a second call with the same run id ``"<run_id>/2"``. The trace is the root run of the
    chain or agent, and :meth:`answer_of` finds the run of its final answer, for feedback.
    ``thread_id`` and ``user_id`` come from the config's ``metadata``, then from its
    ``configurable``, then from the arguments here. (In a ``batch``, LangChain passes callbacks the
    metadata only.)

    An error in the callback never breaks the chain: LangChain logs it; :attr:`counts` counts it.
    A forked child counts from zero.

    Args:
        log: where runs go; the caller closes it.
        tags: put before the tags of the config; the first is the domain tag of the run.
        thread_id: the thread of runs whose config has none.
        user_id: the user of runs whose config has none.

    Raises:
        ConfigError: ``tags`` is a string.
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
        if isinstance(tags, str):
            raise ConfigError(
                f"tags is {described(tags)}; pass a list of strings, such as ['support']"
            )
        self._log = log
        self._tags = tuple(tags)
        self._defaults = {"thread_id": thread_id, "user_id": user_id}
        self._traces: dict[UUID, tuple[UUID, ...]] = {}
        self._last: dict[UUID, _Last] = {}
        self._uses: dict[UUID, int] = {}
        self._runs: dict[str, str] = {}  # by the ids of messages
        self._begin()
        guard(self)

    def _begin(self) -> None:
        # Reentrant: the collector may close an abandoned stream while this thread holds the lock.
        self._lock = threading.RLock()
        self._calls: dict[UUID, _Call] = {}
        self._bytes = 0
        self._counted: Counter[str] = Counter()

    def before_fork(self) -> None:
        """Let no other thread hold the lock while the process forks."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Continue."""
        let_go(self._lock)

    def after_fork_in_child(self) -> None:
        """Start without open calls: their threads are the parent's."""
        self._begin()

    @property
    def counts(self) -> CallbackCounts:
        """What became of the model calls so far."""
        with self._lock:
            counted = {name: self._counted[name] for name in CallbackCounts._fields}
            return CallbackCounts(**counted | {"open": len(self._calls)})

    def answer_of(self, trace_id: UUID) -> str | None:
        """The run of the last model call of a trace, for the 10,000 newest traces.

        None if that call has not answered (it runs, raised, was cancelled, had its stream closed,
        or could not be converted), or if another call of the trace answered at the same time, so
        that none is the last. ``trace_id`` is the ``run_id`` of the config that the chain or agent
        was called with.
        """
        last = self._last.get(trace_id)
        return None if last is None or last.overlaps else last.answer

    def run_of(self, answer: BaseMessage | Sequence[BaseMessage] | Mapping[str, Any]) -> str | None:
        """The run of an answer, for your page to send back with a thumb.

        ``answer`` is what a chat model returned, a chunk of it, the state that an agent returned,
        or its messages: their last answer counts. The 10,000 newest answers are known, and older
        ones by the ids that LangChain gives messages. ``None`` if there is no answer.
        """
        messages: Any = answer.get("messages") or () if isinstance(answer, Mapping) else answer
        several = [messages] if isinstance(messages, BaseMessage) else [*messages]
        spoken = (message.id for message in reversed(several) if isinstance(message, AIMessage))
        message_id = next(spoken, None)
        if message_id is None:
            return None
        found = _OF_LANGCHAIN.fullmatch(message_id)
        named = f"{found[1]}:{found[2]}" if found and found[2] not in (None, "0") else None
        return self._runs.get(message_id) or named or (found[1] if found else None)

    def on_chat_model_start(
        self, serialized: Any, messages: list[list[BaseMessage]], *, run_id: UUID, **event: Any
    ) -> None:
        """Note a call to a chat model. LangChain sends one event for each prompt of a batch."""
        traces = self._start_call(run_id, event)
        with self._counting_losses():
            self._note(run_id, traces, openai_messages(messages[0]), event)

    def on_llm_start(
        self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **event: Any
    ) -> None:
        """Note a call to a plain text model, as one message of the user."""
        traces = self._start_call(run_id, event)
        with self._counting_losses():
            self._note(run_id, traces, [{"role": "user", "content": prompts[0]}], event)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **event: Any) -> None:
        """Record the answers to one prompt."""
        self._on_end(run_id=run_id)
        call = self._end_call(run_id)
        if call is None:
            return
        with self._counting_losses():
            name = self._name(run_id)
            for index, answer in enumerate(response.generations[0]):
                run = {**call.about, **answered(answer, call.about["model"])}
                if reason := finish_reason(answer):
                    run["metadata"] = {"finish_reason": reason, **run["metadata"]}
                answer_name = f"{name}:{index}" if index else name
                self._log.record(run_id=answer_name, **run)
                self._count("logged")
                if message_id := getattr(getattr(answer, "message", None), "id", None):
                    with self._lock:
                        _put(self._runs, message_id, answer_name)
            self._answer(run_id, call.traces, name if response.generations[0] else None)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Drop a call that raised, was cancelled or had its stream closed early."""
        self._on_end(run_id=run_id)
        if self._end_call(run_id) is not None:
            self._count("failed")

    def _on_start(self, *what: Any, run_id: UUID, **event: Any) -> None:
        """Note the traces of a chain, tool or retriever, which may call a model."""
        with self._lock:
            _put(self._traces, run_id, self._traces_of(run_id, event))

    def _on_end(self, *what: Any, run_id: UUID, **event: Any) -> None:
        """Drop the note of a chain, tool or retriever that ended or raised."""
        with self._lock:
            self._traces.pop(run_id, None)

    on_chain_start = on_tool_start = on_retriever_start = _on_start
    on_chain_end = on_tool_end = on_retriever_end = _on_end
    on_chain_error = on_tool_error = on_retriever_error = _on_end

    def _traces_of(self, run_id: UUID, event: Mapping[str, Any]) -> tuple[UUID, ...]:
        """The root run, and around it, any root whose context LangChain did not hand on.

        A runnable with fallbacks calls its parts with the caller's config, in which they are roots.
        Where the handler was attached below the root, the parent stands for it.
        """
        parent: UUID | None = event.get("parent_run_id")
        if parent is not None:
            return self._traces.get(parent, (parent,))
        around = getattr(ensure_config().get("callbacks"), "parent_run_id", None)
        return (run_id, *self._traces.get(around, ())) if around else (run_id,)

    def _start_call(self, run_id: UUID, event: Mapping[str, Any]) -> tuple[UUID, ...]:
        """Make a call the last one of its traces, whatever becomes of it."""
        with self._lock:
            traces = self._traces_of(run_id, event)
            _put(self._traces, run_id, traces)
            for trace in traces:
                _put(self._last, trace, _Last(run_id))
        return traces

    def _note(
        self,
        run_id: UUID,
        traces: tuple[UUID, ...],
        messages: list[dict[str, Any]],
        event: Mapping[str, Any],
    ) -> None:
        metadata = event.get("metadata") or {}
        invocation = event.get("invocation_params") or {}
        places = (metadata, invocation, ensure_config().get("configurable"), self._defaults)
        model = metadata.get("ls_model_name") or invocation.get("model")
        tags = [tag for tag in map(str, event.get("tags") or ()) if not _STEP_TAG.fullmatch(tag)]
        about = {
            "messages": messages,
            "tools": [openai_tool(tool) for tool in invocation.get("tools") or ()],
            "model": model or invocation.get("model_name"),
            "params": {key: invocation[key] for key in _PARAMS if invocation.get(key) is not None},
            "tags": list(dict.fromkeys([*self._tags, *tags])),
            "metadata": {
                key: value
                for key, value in metadata.items()
                if not _FRAMEWORK_KEY.fullmatch(str(key))
            },
            "thread_id": first_id("thread_id", *places),
            "user_id": first_id("user_id", *places),
            "trace_id": str(traces[-1]),
        }
        if not self._keep(run_id, _Call(about, _size(about), traces)):
            _logger.warning(_AT_ONCE, run_id)

    def _keep(self, run_id: UUID, call: _Call) -> bool:
        """Keep a call until it ends, unless another one runs under its id: forget both then."""
        with self._lock:
            other = self._end_call(run_id)
            if other is not None and other.about != call.about:
                self._counted["lost"] += 2
                return False
            self._counted["failed"] += other is not None  # it was cancelled, and is tried again
            self._calls[run_id] = call
            self._bytes += call.size
            while len(self._calls) > 1 and (
                len(self._calls) > _MOST_KEPT or self._bytes > _MOST_BYTES
            ):
                self._end_call(next(iter(self._calls)))
                self._counted["failed"] += 1
            return True

    def _end_call(self, run_id: UUID) -> _Call | None:
        with self._lock:
            call = self._calls.pop(run_id, None)
            self._bytes -= call.size if call else 0
        return call

    def _name(self, run_id: UUID) -> str:
        """The id of a call's run: LangChain's, unless an earlier call had that one."""
        with self._lock:
            uses = self._uses.get(run_id, 0) + 1
            _put(self._uses, run_id, uses)
            self._counted["repeated"] += uses > 1
        if uses == 1:
            return str(run_id)
        name = f"{run_id}/{uses}"
        _logger.warning(_AGAIN, run_id, name)
        return name

    def _answer(self, run_id: UUID, traces: tuple[UUID, ...], name: str | None) -> None:
        with self._lock:
            for trace in traces:
                last = self._last.get(trace, _Last(run_id))
                is_last = last.call == run_id
                last = last._replace(answer=name) if is_last else last._replace(overlaps=True)
                _put(self._last, trace, last)

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


def _put(notes: dict[K, V], key: K, value: V) -> None:
    """Note a value as the newest, and drop the oldest note where there are too many."""
    notes.pop(key, None)
    notes[key] = value
    if len(notes) > _MOST_KEPT:
        del notes[next(iter(notes))]


def _size(value: Any) -> int:
    """About how many bytes a JSON-like value takes, whatever it holds."""
    size, rest, seen = 0, [value], set()
    while rest:
        item = rest.pop()
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            rest += item.values() if isinstance(item, dict) else item
            size += 100
    return size
