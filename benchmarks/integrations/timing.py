"""What a call takes of its thread, beyond another one; and what is asked in all measurements."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentpref import Log

SYSTEM = {"role": "system", "content": "You are the assistant of a shop. " * 4}
ANSWER = "y" * 250


def asked(n: int) -> list[dict[str, Any]]:
    """A system prompt and a question; with the answer of 250, 1 kB of text."""
    left = 1_000 - len(ANSWER) - len(SYSTEM["content"])
    return [SYSTEM, {"role": "user", "content": f"{n:08d} ".ljust(left, "x")}]


def beyond(
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
def a_log() -> Iterator[Log]:
    """A log in a home of its own, which must drop nothing."""
    with tempfile.TemporaryDirectory() as folder, Log(Path(folder) / "home") as log:
        yield log
        log.flush()
        assert log.dropped == {}, log.dropped
