"""What the integrations cost the apps that they are plugged into.

- `openai`: a call of OpenAI's client, wrapped, beyond the same call of a bare one, on the calling
  thread; whole and streamed, with 1 kB of messages; and for comparison, the bare call with a
  `log.record` by hand. The transport answers at once from memory, and the clients take turns. It is
  the thread's own processor time, so that other work on the machine counts only for the caches and
  the cores that it shares.

Run as `python -m benchmarks.integrations [NAME…]`. An integration whose package is not installed is
skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from agentpref import Log
from benchmarks._report import Target, at_most, print_report

CHUNKS = 50
SYSTEM = {"role": "system", "content": "You are the assistant of a shop. " * 4}


class Integration(NamedTuple):
    """The package that one needs, what measures it, and the most that its figures may be."""

    needs: str
    measure: Callable[[int], dict[str, float]]
    limits: dict[str, float]


def main() -> None:
    """Measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(INTEGRATIONS)}")
    parser.add_argument("--calls", type=int, default=2_000, help="calls timed in a measurement")
    options = parser.parse_args()
    if unknown := set(options.names) - INTEGRATIONS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    figures: dict[str, float] = {}
    targets: list[Target] = []
    for name in options.names or INTEGRATIONS:
        integration = INTEGRATIONS[name]
        if find_spec(integration.needs) is None:
            print(f"{name} is skipped: pip install 'agentpref[{name}]'")
            continue
        found = integration.measure(options.calls)
        for figure, value in found.items():
            print(f"{figure:<32} {value:10.2f}")
        figures |= found
        targets += [at_most(key, found[key], limit) for key, limit in integration.limits.items()]
    print_report("integrations", figures, targets)


def openai(calls: int) -> dict[str, float]:
    """Medians in µs of a bare call, and of what is added by wrapping and by logging by hand."""
    from agentpref_adapters.openai import OpenAICounts, counts, wrap

    with _openai_client() as bare, _openai_client() as client, _log() as log:
        wrapped = wrap(client, log)

        def by_hand(n: int) -> None:
            reply = _ask(bare, n)
            about = {"temperature": 0.5}, {"finish_reason": reply.choices[0].finish_reason}
            output = reply.choices[0].message.content
            log.record(
                _asked(n), output, model="m", user_id="u", params=about[0], metadata=about[1]
            )

        before, added, hand = _beyond(
            calls, lambda n: _ask(bare, n), lambda n: _ask(wrapped, n), by_hand
        )
        _, streamed = _beyond(
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
    asked = _asked(n)
    return client.chat.completions.create(model="m", messages=asked, temperature=0.5, user="u")


def _ask_streaming(client: Any, n: int) -> None:
    for _ in client.chat.completions.create(model="m", messages=_asked(n), stream=True):
        pass


@contextmanager
def _openai_client() -> Iterator[Any]:
    """A client whose transport answers at once, with 250 characters."""
    import httpx2
    from openai import OpenAI

    base = {"id": "c", "created": 1, "model": "m", "system_fingerprint": "fp"}
    message = {"role": "assistant", "content": "y" * 250}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    whole = json.dumps({**base, "object": "chat.completion", "choices": [choice]}).encode()
    deltas = [{"delta": {"content": "y" * 5}, "index": 0, "finish_reason": None}] * CHUNKS
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


def _asked(n: int) -> list[dict[str, Any]]:
    """A system prompt and a question; with an answer of 250, 1 kB of text."""
    left = 1_000 - 250 - len(SYSTEM["content"])
    return [SYSTEM, {"role": "user", "content": f"{n:08d} ".ljust(left, "x")}]


def _beyond(
    calls: int, bare: Callable[[int], object], *more: Callable[[int], object]
) -> list[float]:
    """The median of a bare call in µs, and of what each of the others takes beyond it."""
    spent: list[list[float]] = [[] for _ in (bare, *more)]
    turns = list(zip((bare, *more), spent, strict=True))
    for n in range(calls + calls // 10):
        for call, found in turns:
            found.append(_timed(call, n))
        turns.append(turns.pop(0))  # the first finds colder caches
        time.sleep(0.000_5)  # the log's own thread writes
    before, *after = (statistics.median(found[calls // 10 :]) for found in spent)
    return [round(before, 2), *(round(one - before, 2) for one in after)]


def _timed(call: Callable[[int], object], n: int) -> float:
    """The µs of processor time that a call takes of its thread; other work does not count."""
    start = time.thread_time_ns()
    call(n)
    return (time.thread_time_ns() - start) / 1e3


@contextmanager
def _log() -> Iterator[Log]:
    with tempfile.TemporaryDirectory() as folder, Log(Path(folder) / "home") as log:
        yield log
        log.flush()
        assert log.dropped == {}, log.dropped


INTEGRATIONS = {
    "openai": Integration("openai", openai, {"openai_call_added_us": 30}),
}
"""What is measured; an integration is one line here and a function above."""


if __name__ == "__main__":
    main()
