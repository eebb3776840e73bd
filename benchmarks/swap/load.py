"""Clients that send requests without a pause while a thread swaps, and the results.

Windows with swaps and quiet ones alternate in one run, so that both see the same machine.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentpref.errors import AgentprefError
from agentpref.serve.backend import Reply
from agentpref.serve.router import Router
from benchmarks._report import Target, at_least, at_most
from benchmarks.swap.elsewhere import Elsewhere, elsewhere
from benchmarks.swap.stage import Stage, request

WINDOWS = 6
ROLLBACK_EVERY = 5
FOLLOWED = 8
PATIENCE = 30.0


class Rival(NamedTuple):
    """Another way to swap, under the same load: ``measure(stage, options)`` gives its figures."""

    name: str
    measure: Callable[[Stage, Options], Mapping[str, Any]]


class Engine(NamedTuple):
    """One engine to measure.

    ``serve(stage)`` is a context manager that gives the router of the stage's home, which follows
    other processes; another process publishes the revisions, and ``router.activate`` makes them
    live. ``activation`` is how many seconds that may take.
    """

    name: str
    serve: Callable[[Stage], AbstractContextManager[Router]]
    activation: float
    rivals: Sequence[Rival] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """How long with swaps, by how many clients, and how many swaps at least in that time."""

    seconds: float = 60.0
    clients: int = 4
    swaps: int = 100


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when, and ``"right"``, ``"wrong"`` or the error instead of a reply."""

    begin: float
    end: float
    outcome: str
    streamed: bool


@dataclass(slots=True)
class Measured:
    """What was measured, in seconds."""

    requests: list[Request] = field(default_factory=list)
    windows: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {"quiet": [], "swaps": []}
    )
    activations: list[float] = field(default_factory=list)
    rollbacks: list[float] = field(default_factory=list)
    rollbacks_loading: list[float] = field(default_factory=list)  # room was needed meanwhile
    followed: list[float] = field(default_factory=list)
    late: int = 0  # requests admitted to the old revision after activate had returned

    def latencies(self, kind: str) -> list[float]:
        """The latencies of requests within windows of one kind."""
        spans = self.windows[kind]
        return [
            one.end - one.begin
            for one in self.requests
            if any(begin <= one.begin and one.end <= end for begin, end in spans)
        ]


def run(stage: Stage, router: Router, options: Options) -> Measured:
    """Send requests and swap for some time, then promote from another process several times."""
    measured = Measured()
    asking = clients(options.clients, lambda n: _client(stage, router, n, measured.requests.append))
    seconds, swaps = options.seconds / WINDOWS, -(-options.swaps // WINDOWS)
    with elsewhere(stage) as other, asking:
        swapper = _Swapper(router, other, measured)
        swapper.swap()
        for _ in range(WINDOWS):
            with _noted(measured, "quiet"):
                time.sleep(seconds / 2)
            with _noted(measured, "swaps"):
                swapper.swap_often(seconds, swaps)
        for number in range(FOLLOWED):
            time.sleep(0.37 * (number % 3))  # at different moments of the watcher's interval
            swapper.promote_elsewhere()
    return measured


class _Swapper:
    """Swaps, rolls back, lets the router follow, and measures how long each takes."""

    def __init__(self, router: Router, other: Elsewhere, measured: Measured) -> None:
        self.router = router
        self.other = other
        self.measured = measured
        self._source = random.Random(0)

    def swap_often(self, seconds: float, count: int) -> None:
        """Swap ``count`` times at equal intervals, and sometimes roll back."""
        begin = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begin + number * seconds / count - time.monotonic()))
            self.swap()
            if number % ROLLBACK_EVERY == ROLLBACK_EVERY - 1:
                self.roll_back()
        time.sleep(max(0.0, begin + seconds - time.monotonic()))

    def swap(self) -> None:
        """Activate a new revision."""
        name = self._publish()
        begin = time.monotonic()
        self.router.activate(name)
        self.measured.activations.append(time.monotonic() - begin)
        self._check(name)

    def roll_back(self) -> None:
        """Undo the last swap. The revision before is still loaded, unless room was needed."""
        loaded = self.router.registry.previous() in self.router.backend.list_loaded()
        begin = time.monotonic()
        state = self.router.rollback()
        rollbacks = self.measured.rollbacks if loaded else self.measured.rollbacks_loading
        rollbacks.append(time.monotonic() - begin)
        self._check(state.live)

    def promote_elsewhere(self) -> None:
        """Let the other process promote, and wait until the router serves that revision."""
        name = self._publish()
        promoted = self.other.promote(name)
        while self.router.serving.live != name:
            if time.monotonic() > promoted + PATIENCE:
                raise SystemExit(f"error: {name} is not followed within {PATIENCE:g} s")
            time.sleep(0.002)
        self.measured.followed.append(time.monotonic() - promoted)

    def _publish(self) -> str:
        return self.other.publish(self._source.randrange(len(self.other.stage.folders)))

    def _check(self, name: str | None) -> None:
        with self.router.acquire() as lease:
            self.measured.late += lease.revision != name


@contextmanager
def clients(count: int, ask: Callable[[int], Callable[[], None]]) -> Iterator[None]:
    """Send requests from ``count`` threads until the block ends; an error in one ends the run."""
    done = threading.Event()

    def run_client(number: int) -> None:
        once = ask(number)
        while not done.is_set():
            once()

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(run_client, number) for number in range(count)]
        try:
            yield
        finally:
            done.set()
        for one in asking:
            one.result()


def figures(measured: Measured) -> dict[str, Any]:
    """The figures of a run; times are in milliseconds."""
    outcomes = [one.outcome for one in measured.requests]
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "streamed": sum(one.streamed for one in measured.requests),
        "right": outcomes.count("right"),
        "wrong": outcomes.count("wrong"),
        "failed": len(outcomes) - outcomes.count("right") - outcomes.count("wrong"),
        "failures": sorted({one for one in outcomes if one not in ("right", "wrong")})[:5],
        "late": measured.late,
        "swaps": len(measured.activations)
        + len(measured.rollbacks)
        + len(measured.rollbacks_loading),
        "activations": len(measured.activations),
        "rollbacks": len(measured.rollbacks),
    }
    for kind in measured.windows:
        latencies = measured.latencies(kind)
        found[f"requests_{kind}"] = len(latencies)
        found[f"p50_{kind}_ms"] = quantile(latencies, 0.5)
        found[f"p99_{kind}_ms"] = quantile(latencies, 0.99)
    found["p99_ratio"] = round(found["p99_swaps_ms"] / found["p99_quiet_ms"], 3)
    for name in ("activations", "rollbacks", "rollbacks_loading", "followed"):
        times = getattr(measured, name)
        found[f"{name}_p50_ms"] = quantile(times, 0.5)
        found[f"{name}_max_ms"] = quantile(times, 1.0)
    return found


def targets(name: str, found: Mapping[str, Any], options: Options, limit: float) -> list[Target]:
    """The targets of an engine."""
    return [
        at_least(f"{name}: replies right, share", found["right"] / max(1, found["requests"]), 1),
        at_most(f"{name}: failed requests", found["failed"], 0),
        at_most(f"{name}: admitted to another revision after a swap", found["late"], 0),
        at_least(f"{name}: swaps", found["swaps"], options.swaps),
        at_most(f"{name}: p99 with swaps over p99 without", found["p99_ratio"], 1.5),
        at_most(f"{name}: activation, slowest, ms", found["activations_max_ms"], 1000 * limit),
        at_most(f"{name}: rollback to what is loaded, slowest, ms", found["rollbacks_max_ms"], 50),
        at_most(f"{name}: promoted elsewhere, slowest, ms", found["followed_max_ms"], 2000),
    ]


def quantile(seconds: Iterable[float], share: float) -> float:
    """The value that a share of all values does not exceed, in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return float("nan")
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def _client(
    stage: Stage, router: Router, number: int, note: Callable[[Request], None]
) -> Callable[[], None]:
    """A client; every second one streams."""
    source, streams = random.Random(number), number % 2 == 1

    def once() -> None:
        prompt = source.choice(stage.prompts)
        begin = time.monotonic()
        try:
            reply, whole = _ask(router, prompt, streams)
            right = whole and reply.token_ids == stage.answer(reply.revision, prompt)
            outcome = "right" if right else "wrong"
        except AgentprefError as error:
            outcome = f"{type(error).__name__}: {error}"
        note(Request(begin, time.monotonic(), outcome, streams))

    return once


def _ask(router: Router, prompt: str, streams: bool) -> tuple[Reply, bool]:
    """A reply, and whether the streamed pieces are its text."""
    if not streams:
        return router.generate(request(prompt)), True
    *pieces, reply = router.stream(request(prompt))
    assert isinstance(reply, Reply)
    return reply, "".join(map(str, pieces)) == reply.message["content"]


@contextmanager
def _noted(measured: Measured, kind: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    measured.windows[kind].append((begin, time.monotonic()))
