"""A run of a LangChain chat model with our callback, beyond one with LangChain's tracer base.

``BaseTracer`` is what every tracer of LangChain's pays for: it notes each run and persists nothing
here. The model answers at once, and the contestants take turns.
"""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tracers.base import BaseTracer

from agentpref_adapters.langchain import AgentprefCallback
from benchmarks.integrations.timing import ANSWER, a_log, asked, beyond


class _AtOnce(BaseChatModel):
    @property
    def _llm_type(self) -> str:
        return "at once"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(ANSWER))])


class _Persisting(BaseTracer):
    def _persist_run(self, run: Any) -> None:
        pass


def measure(calls: int) -> dict[str, float]:
    """Medians in µs of a run without callbacks, and of what the base and our callback add."""
    model = _AtOnce()

    def run(n: int, *callbacks: Any) -> None:
        about: Any = {"metadata": {"thread_id": "t", "user_id": "u"}, "callbacks": [*callbacks]}
        model.invoke(asked(n), config=about)

    with a_log() as log:
        base, ours = _Persisting(), AgentprefCallback(log)
        bare, of_base, of_ours = beyond(calls, run, lambda n: run(n, base), lambda n: run(n, ours))
        assert ours.counts.lost == 0, ours.counts
    return {
        "langchain_run_bare_us": bare,
        "langchain_tracer_base_us": of_base,
        "langchain_run_added_us": round(of_ours - of_base, 2),
    }
