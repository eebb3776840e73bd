"""The app of the demo: a LangChain agent that the live revision serves and the log records.

This is what a user of agentpref writes: an agent, a callback and a router.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from agentpref.record.log import Log
from agentpref.serve.router import Router

IN_FLIGHT = 48
CLIENTS = 3


@dataclass(frozen=True, slots=True)
class Reply:
    """What the agent said, the run it was logged as, and the revision that wrote it."""

    run_id: str
    text: str
    revision: str


class App:
    """An agent over a router, whose model calls are logged."""

    def __init__(self, log: Log, router: Router, *, max_tokens: int = 48) -> None:
        """Build an agent without tools, on the model that the router serves."""
        from langchain.agents import create_agent

        from agentpref_adapters.langchain import AgentprefChatModel

        self.log = log
        self.router = router
        model = AgentprefChatModel(router=router, model="tiny", max_tokens=max_tokens)
        self._agent: Any = create_agent(model, tools=[])

    def ask(self, questions: Sequence[str], *, tag: str) -> list[Reply]:
        """Ask the agent all questions, many at a time, and log each reply under the tag."""
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
            Reply(callback.answer_of(trace) or "", _text(message), _revision(message))
            for trace, message in zip(traces, (r["messages"][-1] for r in results), strict=True)
        ]

    @contextmanager
    def traffic(self, questions: Sequence[str]) -> Iterator[Traffic]:
        """Keep requests in flight, from three threads, while the block runs."""
        traffic = Traffic()

        def client(own: Sequence[str]) -> None:
            while not traffic.stop.is_set():
                for text in own:
                    if traffic.stop.is_set():
                        return
                    try:
                        result = self._agent.invoke({"messages": [("user", text)]})
                    except Exception:  # any error is a dropped request, and counted as one
                        traffic.count("failed")
                    else:
                        traffic.count(_revision(result["messages"][-1]))

        threads = [
            threading.Thread(target=client, args=(questions[i::CLIENTS],)) for i in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield traffic
        finally:
            traffic.stop.set()
            for thread in threads:
                thread.join()


class Traffic:
    """How many requests each revision answered, and how many failed."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.answered: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, revision: str) -> None:
        """Count one more request."""
        with self._lock:
            self.answered[revision] += 1

    def wait_for(self, more: int) -> None:
        """Wait until that many more requests were answered."""
        goal = sum(self.answered.values()) + more
        while sum(self.answered.values()) < goal:
            self.stop.wait(0.01)


def _revision(message: Any) -> str:
    return str(message.response_metadata["revision"])


def _text(message: Any) -> str:
    """What the user sees: the text, or the tools that were called."""
    calls = ", ".join(f"{call['name']}({call['args']})" for call in message.tool_calls)
    return str(message.text) or f"[calls {calls}]"
