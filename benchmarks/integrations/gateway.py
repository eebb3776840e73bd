"""What the gateway adds before an upstream that answers at once, as the app's clock sees it.

Three processes: the app, here; ``agentpref gateway --upstream``, as it ships; and the upstream. A
bare Starlette app that passes everything on takes the gateway's place in turn, and so does nothing
at all. Medians are of calls one after the other; of 50 calls a second on each way, at which every
process has slept before, ``paced`` is the median, and the 99th percentile is taken.

The tokens of a stream are the upstream's clock when it sent them, so that the app sees how long
each was under way.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import orjson

from benchmarks.integrations.timing import asked

RATE = 50
TOKENS, TOKEN_SECONDS = 20, 0.02
STREAMS, SLOW_TOKEN_SECONDS = 200, 0.25
_HEADERS = {"Content-Type": "application/json"}


def measure(calls: int) -> dict[str, float]:
    """Medians and 99th percentiles in ms of what is added to answers, first tokens and tokens."""
    calls = max(200, calls // 2)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        upstream = stack.enter_context(_process("-m", "benchmarks.integrations.servers", "answers"))
        passing = stack.enter_context(
            _process("-m", "benchmarks.integrations.servers", "passes", upstream)
        )
        command = ["-m", "agentpref_cli", "gateway", "--upstream", f"{upstream}/v1"]
        gateway = stack.enter_context(_process(*command, "--home", folder, "--port", "0"))
        ways = (upstream, passing, gateway)
        at_once = _whole(ways, calls, seconds=0.0)
        paced = _whole(ways, calls, seconds=1 / RATE / len(ways))
        first = [_streamed(way, calls // TOKENS) for way in ways]
        slow = asyncio.run(_open_streams(gateway))
    direct, passed, ours = map(statistics.median, at_once)
    (slept, paced_passed, paced_ours) = (statistics.median(paced[0]), *paced[1:])
    (tokens_0, later_0), _, (tokens, later) = first
    return {
        "gateway_direct_p50_ms": direct,
        "gateway_pass_through_added_p50_ms": passed - direct,
        "gateway_added_p50_ms": ours - direct,
        "gateway_pass_through_added_p99_ms": _p99(paced_passed) - slept,
        "gateway_paced_added_p50_ms": statistics.median(paced_ours) - slept,
        "gateway_added_p99_ms": _p99(paced_ours) - slept,
        "gateway_first_token_added_ms": statistics.median(tokens) - statistics.median(tokens_0),
        "gateway_token_added_ms": statistics.median(later) - statistics.median(later_0),
        **slow,
    }


def _whole(ways: Sequence[str], calls: int, *, seconds: float) -> list[list[float]]:
    """The ms of whole answers on each way, in turns, with at least so many seconds between two."""
    spent: list[list[float]] = [[] for _ in ways]
    with ExitStack() as stack:
        clients = [stack.enter_context(_connection(way)) for way in ways]
        due = time.perf_counter()
        for n in range(calls + 20):
            turn = (n // 20) % len(ways)
            for which in (*range(turn, len(ways)), *range(turn)):
                due += seconds
                if (left := due - time.perf_counter()) > 0:
                    time.sleep(left)
                start = time.perf_counter()
                _post(clients[which], n, stream=False).read()
                spent[which].append(1e3 * (time.perf_counter() - start))
    return [found[20:] for found in spent]


def _streamed(way: str, streams: int) -> tuple[list[float], list[float]]:
    """The ms of first tokens since the request, and of later ones since they were sent."""
    first, later = [], []
    with _connection(way) as client:
        for n in range(streams):
            start = time.monotonic_ns()
            response = _post(client, n, stream=True, wait=TOKEN_SECONDS)
            for number, sent in enumerate(_tokens(response)):
                now = time.monotonic_ns()
                if number:
                    later.append((now - sent) / 1e6)
                else:
                    first.append((now - start) / 1e6)
    return first, later


async def _open_streams(way: str) -> dict[str, float]:
    """Streams that are all open at once: how many did not come whole, and how late tokens are."""
    limits = httpx.Limits(max_connections=STREAMS)

    async def one(n: int) -> list[float]:
        body = _body(n, stream=True, wait=SLOW_TOKEN_SECONDS)
        async with client.stream(
            "POST", f"{way}/v1/chat/completions", content=body, headers=_HEADERS
        ) as response:
            return [
                (time.monotonic_ns() - sent) / 1e6
                async for line in response.aiter_lines()
                if (sent := _sent(line.encode())) is not None
            ]

    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        found = await asyncio.gather(*map(one, range(STREAMS)))
    late = [ms for stream in found for ms in stream]
    return {
        "gateway_streams_not_whole": float(sum(len(stream) != TOKENS for stream in found)),
        "gateway_200_streams_token_p50_ms": statistics.median(late),
        "gateway_200_streams_token_p99_ms": _p99(late),
    }


def _tokens(response: http.client.HTTPResponse) -> Iterator[int]:
    while line := response.readline():
        if (sent := _sent(line)) is not None:
            yield sent


def _sent(line: bytes) -> int | None:
    """When the upstream sent the token of a line, if it has one."""
    if not line.startswith(b"data: {"):
        return None
    delta = orjson.loads(line[6:])["choices"][0]["delta"]
    return int(delta["content"]) if "content" in delta else None


def _post(
    client: http.client.HTTPConnection, n: int, *, stream: bool, wait: float = 0.0
) -> http.client.HTTPResponse:
    client.request("POST", "/v1/chat/completions", _body(n, stream=stream, wait=wait), _HEADERS)
    response = client.getresponse()
    assert response.status == 200, response.read()
    return response


def _body(n: int, *, stream: bool, wait: float) -> bytes:
    about = {"metadata": {"thread_id": f"t{n}", "wait": str(wait)}, "max_tokens": TOKENS}
    return orjson.dumps({"model": "m", "messages": asked(n), "stream": stream, **about})


@contextmanager
def _connection(way: str) -> Iterator[http.client.HTTPConnection]:
    address = urlsplit(way)
    client = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _process(*arguments: str) -> Iterator[str]:
    """A server of its own, and the address that it prints first."""
    command = [sys.executable, *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = next((w for w in line.split() if w.startswith("http://")), None)
        assert found is not None, line
        yield found.rstrip("/").removesuffix("/v1")
    finally:
        server.terminate()
        server.wait(30)


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]
