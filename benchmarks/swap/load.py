"""Clients that ask without a pause while a thread swaps, and what became of their requests.

Windows with swaps and quiet ones take turns in one run, so that both meet the same machine. Knows
no engine: it is given a router and a stage.
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
class Asked:
    """One request: when, and ``"right"``, ``"wrong"`` or what went wrong instead of a reply."""

    begin: float
    end: float
    outcome: str
    streamed: bool


@dataclass(slots=True)
class Told:
    """What was measured, in seconds."""

    asked: list[Asked] = field(default_factory=list)
    windows: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {"quiet": [], "swaps": []}
    )
    activations: list[float] = field(default_factory=list)
    rollbacks: list[float] = field(default_factory=list)
    rollbacks_loading: list[float] = field(default_factory=list)  # room was needed meanwhile
    followed: list[float] = field(default_factory=list)
    late: int = 0  # requests admitted to another revision after activate had returned

    def latencies(self, kind: str) -> list[float]:
        """The latencies of requests that lie in windows of one kind."""
        spans = self.windows[kind]
        return [
            one.end - one.begin
            for one in self.asked
            if any(begin <= one.begin and one.end <= end for begin, end in spans)
        ]


def run(stage: Stage, router: Router, options: Options) -> Told:
    """Ask and swap for the time given, then promote from another process some times."""
    told = Told()
    asking = clients(options.clients, lambda n: _client(stage, router, n, told.asked.append))
    seconds, swaps = options.seconds / WINDOWS, -(-options.swaps // WINDOWS)
    with elsewhere(stage) as other, asking:
        swapper = _Swapper(router, other, told)
        swapper.swap()
        for _ in range(WINDOWS):
            with _noted(told, "quiet"):
                time.sleep(seconds / 2)
            with _noted(told, "swaps"):
                swapper.go_on(seconds, swaps)
        for number in range(FOLLOWED):
            time.sleep(0.37 * (number % 3))  # not always at the same moment of the watcher's round
            swapper.be_followed()
    return told


class _Swapper:
    """Swaps, rolls back and has the router follow, and notes how long each took."""

    def __init__(self, router: Router, other: Elsewhere, told: Told) -> None:
        self.router = router
        self.other = other
        self.told = told
        self._source = random.Random(0)

    def go_on(self, seconds: float, count: int) -> None:
        """So many swaps at equal distances; now and then the last one is undone."""
        begin = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begin + number * seconds / count - time.monotonic()))
            self.swap()
            if number % ROLLBACK_EVERY == ROLLBACK_EVERY - 1:
                self.roll_back()
        time.sleep(max(0.0, begin + seconds - time.monotonic()))

    def swap(self) -> None:
        """Activate a revision that was published a moment ago."""
        name = self._publish()
        begin = time.monotonic()
        self.router.activate(name)
        self.told.activations.append(time.monotonic() - begin)
        self._check(name)

    def roll_back(self) -> None:
        """Undo the last swap; the revision before it is still loaded, unless room was needed."""
        loaded = self.router.registry.previous() in self.router.backend.list_loaded()
        begin = time.monotonic()
        state = self.router.rollback()
        rollbacks = self.told.rollbacks if loaded else self.told.rollbacks_loading
        rollbacks.append(time.monotonic() - begin)
        self._check(state.live)

    def be_followed(self) -> None:
        """Have the other process promote, and wait until requests are admitted to that."""
        name = self._publish()
        promoted = self.other.promote(name)
        while self.router.serving.live != name:
            if time.monotonic() > promoted + PATIENCE:
                raise SystemExit(f"error: {name} is not followed within {PATIENCE:g} s")
            time.sleep(0.002)
        self.told.followed.append(time.monotonic() - promoted)

    def _publish(self) -> str:
        return self.other.publish(self._source.randrange(len(self.other.stage.folders)))

    def _check(self, name: str | None) -> None:
        with self.router.acquire() as lease:
            self.told.late += lease.revision != name


@contextmanager
def clients(count: int, ask: Callable[[int], Callable[[], None]]) -> Iterator[None]:
    """Have so many threads ask until the block ends; one that raises ends the run, too."""
    done = threading.Event()

    def go_on(number: int) -> None:
        once = ask(number)
        while not done.is_set():
            once()

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(go_on, number) for number in range(count)]
        try:
            yield
        finally:
            done.set()
        for one in asking:
            one.result()


def figures(told: Told) -> dict[str, Any]:
    """What is reported of a run, in milliseconds."""
    outcomes = [one.outcome for one in told.asked]
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "streamed": sum(one.streamed for one in told.asked),
        "right": outcomes.count("right"),
        "wrong": outcomes.count("wrong"),
        "failed": len(outcomes) - outcomes.count("right") - outcomes.count("wrong"),
        "failures": sorted({one for one in outcomes if one not in ("right", "wrong")})[:5],
        "late": told.late,
        "swaps": len(told.activations) + len(told.rollbacks) + len(told.rollbacks_loading),
        "activations": len(told.activations),
        "rollbacks": len(told.rollbacks),
    }
    for kind in told.windows:
        latencies = told.latencies(kind)
        found[f"requests_{kind}"] = len(latencies)
        found[f"p50_{kind}_ms"] = quantile(latencies, 0.5)
        found[f"p99_{kind}_ms"] = quantile(latencies, 0.99)
    found["p99_ratio"] = round(found["p99_swaps_ms"] / found["p99_quiet_ms"], 3)
    for name in ("activations", "rollbacks", "rollbacks_loading", "followed"):
        measured = getattr(told, name)
        found[f"{name}_p50_ms"] = quantile(measured, 0.5)
        found[f"{name}_max_ms"] = quantile(measured, 1.0)
    return found


def targets(name: str, found: Mapping[str, Any], options: Options, limit: float) -> list[Target]:
    """What was promised of an engine."""
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
    """The value that a share of all lies at or below, in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return float("nan")
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def _client(
    stage: Stage, router: Router, number: int, note: Callable[[Asked], None]
) -> Callable[[], None]:
    """One of them: every second one streams."""
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
        note(Asked(begin, time.monotonic(), outcome, streams))

    return once


def _ask(router: Router, prompt: str, streams: bool) -> tuple[Reply, bool]:
    """A reply, and whether the pieces that came before it are its text."""
    if not streams:
        return router.generate(request(prompt)), True
    *pieces, reply = router.stream(request(prompt))
    assert isinstance(reply, Reply)
    return reply, "".join(map(str, pieces)) == reply.message["content"]


@contextmanager
def _noted(told: Told, kind: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    told.windows[kind].append((begin, time.monotonic()))
