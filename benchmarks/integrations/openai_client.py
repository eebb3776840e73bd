"""A call of OpenAI's client, wrapped, beyond the same call of a bare one, whole and streamed.

For comparison, the bare call with a ``log.record`` by hand. The transport answers at once from
memory, and the clients take turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agentpref_adapters.openai import OpenAICounts, counts, wrap
from benchmarks.integrations.timing import ANSWER, a_log, asked, beyond

CHUNKS = 50


def measure(calls: int) -> dict[str, float]:
    """Medians in µs of a bare call, and of what is added by wrapping and by logging by hand."""
    with _client() as bare, _client() as client, a_log() as log:
        wrapped = wrap(client, log)

        def by_hand(n: int) -> None:
            reply = _ask(bare, n)
            about = {"temperature": 0.5}, {"finish_reason": reply.choices[0].finish_reason}
            output = reply.choices[0].message.content
            log.record(asked(n), output, model="m", user_id="u", params=about[0], metadata=about[1])

        before, added, hand = beyond(
            calls, lambda n: _ask(bare, n), lambda n: _ask(wrapped, n), by_hand
        )
        _, streamed = beyond(
            calls // 10, lambda n: _ask_streaming(bare, n), lambda n: _ask_streaming(wrapped, n)
        )
        found = counts(wrapped)
        assert found._replace(logged=0) == OpenAICounts(), found
    return {
        "openai_call_bare_us": before,
        "openai_call_added_us": added,
        "openai_call_by_hand_added_us": hand,
        "openai_chunk_added_us": round(streamed / CHUNKS, 2),
    }


def _ask(client: Any, n: int) -> Any:
    return client.chat.completions.create(model="m", messages=asked(n), temperature=0.5, user="u")


def _ask_streaming(client: Any, n: int) -> None:
    for _ in client.chat.completions.create(model="m", messages=asked(n), stream=True):
        pass


@contextmanager
def _client() -> Iterator[Any]:
    """A client whose transport answers at once, with 250 characters."""
    import httpx2
    from openai import OpenAI

    base = {"id": "c", "created": 1, "model": "m", "system_fingerprint": "fp"}
    message = {"role": "assistant", "content": ANSWER}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    whole = json.dumps({**base, "object": "chat.completion", "choices": [choice]}).encode()
    delta = {"content": ANSWER[: len(ANSWER) // CHUNKS]}
    deltas = [{"delta": delta, "index": 0, "finish_reason": None}] * CHUNKS
    deltas[-1] = {**deltas[-1], "finish_reason": "stop"}
    events = [
        json.dumps({**base, "object": "chat.completion.chunk", "choices": [d]}) for d in deltas
    ]
    stream = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()

    def answer(request: httpx2.Request) -> httpx2.Response:
        if b'"stream":true' in request.content:
            return httpx2.Response(
                200, content=stream, headers={"content-type": "text/event-stream"}
            )
        return httpx2.Response(200, content=whole, headers={"content-type": "application/json"})

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as http_client:
        yield OpenAI(api_key="none", base_url="http://nowhere/v1", http_client=http_client)
