"""The app of the demo: a LangChain agent that is served by the live revision and logged.

This is what a user of agentpref writes: an agent, a callback, a router. It knows nothing of
feedback and of training.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from agentpref.record.log import Log
from agentpref.serve.router import Router

IN_FLIGHT = 48


@dataclass(frozen=True, slots=True)
class Answer:
    """What the agent said, the run it was logged as, and the revision that wrote it."""

    run_id: str
    text: str
    revision: str


class App:
    """An agent over a router, whose model calls are logged under one domain tag."""

    def __init__(self, log: Log, router: Router, *, max_tokens: int = 48) -> None:
        """Build the agent: no tools, the model that the router serves."""
        from langchain.agents import create_agent

        from agentpref_adapters.langchain import AgentprefChatModel

        self.log = log
        self.router = router
        model = AgentprefChatModel(router=router, model="tiny", max_tokens=max_tokens)
        self._agent: Any = create_agent(model, tools=[])

    def ask(self, questions: Sequence[str], *, tag: str) -> list[Answer]:
        """Ask the agent all questions, many at a time; every answer is logged."""
        from agentpref_adapters.langchain import AgentprefCallback

        callback = AgentprefCallback(self.log, tags=[tag], user_id=tag)
        traces = [uuid4() for _ in questions]
        results = self._agent.batch(
            [{"messages": [("user", text)]} for text in questions],
            config=[
                {"callbacks": [callback], "run_id": trace, "max_concurrency": IN_FLIGHT}
                for trace in traces
            ],
        )
        return [
            Answer(
                run_id=callback.answer_of(trace) or "",
                text=_text(result["messages"][-1]),
                revision=result["messages"][-1].response_metadata["revision"],
            )
            for trace, result in zip(traces, results, strict=True)
        ]

    @contextmanager
    def traffic(self, questions: Sequence[str]) -> Iterator[Traffic]:
        """Keep requests in flight, from three threads, while the block runs."""
        traffic = Traffic()
        threads = [
            threading.Thread(target=self._keep_asking, args=(questions[i::3], traffic))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        try:
            yield traffic
        finally:
            traffic.stop.set()
            for thread in threads:
                thread.join()

    def _keep_asking(self, questions: Sequence[str], traffic: Traffic) -> None:
        while not traffic.stop.is_set():
            for text in questions:
                if traffic.stop.is_set():
                    return
                try:
                    result = self._agent.invoke({"messages": [("user", text)]})
                except Exception:  # whatever went wrong, this request was dropped: that is counted
                    traffic.count("failed")
                else:
                    traffic.count(result["messages"][-1].response_metadata["revision"])


@dataclass
class Traffic:
    """How many requests each revision answered, and how many failed."""

    stop: threading.Event = field(default_factory=threading.Event)
    answered: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, revision: str) -> None:
        """Count one more request."""
        with self._lock:
            self.answered[revision] += 1

    def wait_for(self, more: int) -> None:
        """Wait until that many more requests were answered."""
        goal = sum(self.answered.values()) + more
        while sum(self.answered.values()) < goal:
            self.stop.wait(0.01)


def _text(message: Any) -> str:
    """What the user sees: the text, or the tool that was called."""
    calls = ", ".join(f"{call['name']}({call['args']})" for call in message.tool_calls)
    return str(message.text) or f"[calls {calls}]"
