"""Turns LangChain's events into ``Log.record`` calls, one for each answer of a model.

A call is opened when the model starts, and recorded when it ends, under LangChain's own run id;
a call that raises is dropped. Chains, tools and retrievers are followed only to know which trace
they belong to. It does not know what is done with the log, nor who serves the model.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.runnables import ensure_config

from agentpref.record.log import Log
from agentpref_adapters._langchain_convert import (
    first_id,
    openai_message,
    openai_messages,
    openai_tool,
    sampling_params,
    user_metadata,
    user_tags,
)

V = TypeVar("V")

# LangChain sends no end for a call that is cancelled, so what is kept needs a bound of its own. It
# is far above what one process keeps in flight.
_MOST_KEPT = 10_000


class CallbackCounts(NamedTuple):
    """What became of the model calls a callback has seen.

    ``logged`` answers were handed to the log, whose ``dropped`` counts what it could not keep;
    ``failed`` calls raised, were cancelled or had their stream left early, and have no answer to
    log; ``lost`` ones could not be converted, and LangChain's own logger says why; ``open`` ones
    are still running.
    """

    logged: int
    failed: int
    lost: int
    open: int


class AgentprefCallback(BaseCallbackHandler):
    """Logs every model call of a chain or an agent; pass it in ``config={"callbacks": […]}``.

    Works for invoke, stream, batch and their async forms. A run is logged under LangChain's own
    run id, as a string; of several answers to one prompt, the further ones are ``"<run_id>:1"``,
    ``"<run_id>:2"``, …. The trace is the root run of the chain or agent: :meth:`answer_of` leads
    from it to the run that feedback on the final answer is about. The thread and the user are
    ``thread_id`` and ``user_id`` in the config's ``metadata`` or ``configurable``, and else what
    is given here. (In a ``batch``, LangChain shows a callback the metadata alone.)

    A failure of ours never breaks the chain: LangChain logs and swallows it, and :attr:`counts`
    counts it.

    Args:
        log: where runs go. Closing it stays with the caller.
        tags: put before the tags of the config; the first is the domain tag of the run.
        thread_id: the thread of runs whose config names none.
        user_id: the user of runs whose config names none.
    """

    raise_error = False
    # In the caller's thread and context, also under asyncio: recording takes microseconds, the
    # order of events is kept, and the config that holds the thread id can be read.
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
        self._calls: _Bounded[dict[str, Any]] = _Bounded()
        self._roots: _Bounded[UUID] = _Bounded()
        self._answers: _Bounded[str] = _Bounded()
        self._counted: Counter[str] = Counter()

    @property
    def counts(self) -> CallbackCounts:
        """What became of the model calls so far."""
        seen, calls = self._counted, self._calls
        failed = seen["failed"] + calls.forgotten
        return CallbackCounts(seen["logged"], failed, seen["lost"], len(calls))

    def answer_of(self, trace_id: UUID) -> str | None:
        """Name the run that answered last in a trace, of the 10,000 newest traces.

        The trace's id is the ``run_id`` of the config that the chain or agent was called with.
        """
        return self._answers.get(trace_id)

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        **event: Any,
    ) -> None:
        """Open a call to a chat model. LangChain sends one event for each prompt of a batch."""
        with self._counting_losses():
            self._open(run_id, openai_messages(messages[0]), event)

    def on_llm_start(
        self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **event: Any
    ) -> None:
        """Open a call to a plain text model, as one message of the user's."""
        with self._counting_losses():
            self._open(run_id, [{"role": "user", "content": prompts[0]}], event)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **event: Any) -> None:
        """Record the answers to one prompt."""
        call = self._calls.pop(run_id)
        if call is None:
            return
        with self._counting_losses():
            for index, answer in enumerate(response.generations[0]):
                name = f"{run_id}:{index}" if index else str(run_id)
                self._log.record(run_id=name, **{**call, **_answered(answer, call["model"])})
                self._count("logged")
            self._answers.put(UUID(call["trace_id"]), str(run_id))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Drop a call that raised, was cancelled or whose stream was left early."""
        if self._calls.pop(run_id) is not None:
            self._count("failed")

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **event: Any) -> None:
        """Note which trace a chain belongs to."""
        self._roots.put(run_id, self._root(run_id, event))

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **event: Any) -> None:
        """Note which trace a tool belongs to: it may call a model itself."""
        self._roots.put(run_id, self._root(run_id, event))

    def on_retriever_start(
        self, serialized: Any, query: str, *, run_id: UUID, **event: Any
    ) -> None:
        """Note which trace a retriever belongs to: it may call a model itself."""
        self._roots.put(run_id, self._root(run_id, event))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **event: Any) -> None:
        """Forget a chain that is done."""
        self._roots.pop(run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **event: Any) -> None:
        """Forget a tool that is done."""
        self._roots.pop(run_id)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **event: Any) -> None:
        """Forget a retriever that is done."""
        self._roots.pop(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Forget a chain that raised."""
        self._roots.pop(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Forget a tool that raised."""
        self._roots.pop(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Forget a retriever that raised."""
        self._roots.pop(run_id)

    def _open(self, run_id: UUID, messages: list[dict[str, Any]], event: Mapping[str, Any]) -> None:
        metadata = event.get("metadata") or {}
        invocation = event.get("invocation_params") or {}
        places = (metadata, invocation, ensure_config().get("configurable"), self._defaults)
        self._calls.put(
            run_id,
            {
                "messages": messages,
                "tools": [openai_tool(tool) for tool in invocation.get("tools") or ()],
                "model": metadata.get("ls_model_name")
                or invocation.get("model")
                or invocation.get("model_name"),
                "params": sampling_params(invocation),
                "tags": list(dict.fromkeys([*self._tags, *user_tags(event.get("tags") or ())])),
                "metadata": user_metadata(metadata),
                "thread_id": first_id("thread_id", *places),
                "user_id": first_id("user_id", *places),
                "trace_id": str(self._root(run_id, event)),
            },
        )

    def _root(self, run_id: UUID, event: Mapping[str, Any]) -> UUID:
        parent: UUID | None = event.get("parent_run_id")
        if parent is None:
            return run_id
        # Unknown where the handler was attached below the root: the parent is as far as it sees.
        return self._roots.get(parent) or parent

    def _count(self, name: str) -> None:
        with self._lock:
            self._counted[name] += 1

    @contextmanager
    def _counting_losses(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._count("lost")
            raise  # LangChain logs it and goes on, since raise_error is off


class _Bounded(Generic[V]):
    """Something for each run, safe among threads; beyond a bound the oldest is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[UUID, V] = {}
        self.forgotten = 0

    def put(self, run_id: UUID, value: V) -> None:
        with self._lock:
            self._runs[run_id] = value
            if len(self._runs) > _MOST_KEPT:
                del self._runs[next(iter(self._runs))]
                self.forgotten += 1

    def get(self, run_id: UUID) -> V | None:
        return self._runs.get(run_id)

    def pop(self, run_id: UUID) -> V | None:
        with self._lock:
            return self._runs.pop(run_id, None)

    def __len__(self) -> int:
        return len(self._runs)


def _answered(answer: Generation, model: str | None) -> dict[str, Any]:
    """What a generation says for itself: the output, and who wrote it in which tokens."""
    if not isinstance(answer, ChatGeneration):
        return {"output": answer.text}
    said = answer.message.response_metadata
    by_us = said if "revision" in said else {}  # "logprobs" has other shapes elsewhere
    return {
        "output": openai_message(answer.message),
        "model": said.get("model_name") or said.get("model") or model,
        "revision": by_us.get("revision"),
        "token_ids": by_us.get("token_ids"),
        "logprobs": by_us.get("logprobs"),
    }
