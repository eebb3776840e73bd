"""One model call, traced by agentpref, by the bare minimum, and by the SDKs of two peers.

Each contestant is a function that logs one call and a function that ends it. The peers have their
default settings and batching threads, and send to a closed port of this machine: they queue, send
and fail in the background, as they do without a network.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

NOWHERE = "http://127.0.0.1:9"
"""The discard port; nothing listens there."""

Trace: TypeAlias = "Callable[[list[dict[str, Any]], str], object]"
Contestant: TypeAlias = "Callable[[Path], tuple[Trace, Callable[[], object]]]"


def agentpref(folder: Path) -> tuple[Trace, Callable[[], object]]:
    """``Log.record``."""
    from agentpref import Log

    log = Log(folder / "home")

    def trace(messages: list[dict[str, Any]], answer: str) -> object:
        return log.record(messages, answer, model="m", thread_id="t", user_id="u")

    def end() -> None:
        log.close()
        assert log.dropped == {}, log.dropped

    return trace, end


def bare(folder: Path) -> tuple[Trace, Callable[[], object]]:
    """A dump by orjson and an append to a bounded queue: the least that any tracer does."""
    import orjson

    queue: deque[bytes] = deque(maxlen=100)

    def trace(messages: list[dict[str, Any]], answer: str) -> None:
        queue.append(orjson.dumps((messages, answer, "m", "t", "u")))

    return trace, queue.clear


def langsmith(folder: Path) -> tuple[Trace, Callable[[], object]]:
    """``create_run`` and ``update_run`` of LangSmith's client."""
    from langsmith import Client

    logging.getLogger("langsmith").setLevel(logging.CRITICAL)
    client = Client(api_url=NOWHERE, api_key="none", timeout_ms=100)

    def trace(messages: list[dict[str, Any]], answer: str) -> None:
        run, now = uuid.uuid4(), datetime.now(timezone.utc)
        place: dict[str, Any] = {"trace_id": run, "dotted_order": f"{now:%Y%m%dT%H%M%S%fZ}{run}"}
        inputs = {"messages": messages}
        client.create_run("chat", inputs, "llm", id=run, start_time=now, project_name="p", **place)
        client.update_run(run, end_time=now, outputs={"content": answer}, **place)

    return trace, lambda: None


def langfuse(folder: Path) -> tuple[Trace, Callable[[], object]]:
    """A generation of Langfuse's client: started, given its output, ended."""
    from langfuse import Langfuse

    logging.disable(logging.CRITICAL)
    client = Langfuse(public_key="none", secret_key="none", base_url=NOWHERE, timeout=1)

    def trace(messages: list[dict[str, Any]], answer: str) -> object:
        made = client.start_observation(
            name="chat", as_type="generation", input=messages, model="m", metadata={"user": "u"}
        )
        return made.update(output=answer).end()

    return trace, lambda: None


CONTESTANTS: Mapping[str, Contestant] = {
    "agentpref": agentpref,
    "bare": bare,
    "langsmith": langsmith,
    "langfuse": langfuse,
}
