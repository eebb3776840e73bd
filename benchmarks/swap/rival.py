"""Other ways to swap, which change weights in place, under the same load.

Each client notes the adapter that is loaded before its request, as a server would log it, and its
answer is compared with that adapter's. ``another`` is an answer of another adapter; ``mixed`` is
one of no single adapter.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.swap.load import Options, clients, quantile
from benchmarks.swap.stage import Ids, Stage

SHARE = 1 / 3
"""The share of an engine's time and swaps that is enough here."""


class _Results:
    """Compares the answers to requests, and counts the results."""

    def __init__(self, stage: Stage, answer: Callable[[str], Ids]) -> None:
        self.current = 0
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[float] = []
        self._stage, self._answer = stage, answer
        self._noting = threading.Lock()

    def client(self, number: int) -> Callable[[], None]:
        """A client that sends requests to the loaded adapter."""
        source = random.Random(number)

        def once() -> None:
            prompt = source.choice(self._stage.prompts)
            begin, named = time.monotonic(), self.current
            answer = self._answer(prompt)
            with self._noting:
                self.latencies.append(time.monotonic() - begin)
                self.outcomes[self._compare(answer, named, prompt)] += 1

        return once

    def _compare(self, answer: Ids, named: int, prompt: str) -> str:
        expected = self._stage.expected
        if answer == expected[named, prompt]:
            return "right"
        others = range(len(self._stage.folders))
        return "another" if any(answer == expected[o, prompt] for o in others) else "mixed"


def measure(
    stage: Stage, options: Options, *, swap: Callable[[int], None], answer: Callable[[str], Ids]
) -> Mapping[str, Any]:
    """Swap in place while clients send requests, and count right and wrong answers.

    Args:
        stage: the adapters, the first of which is loaded, and their answers.
        options: the seconds, clients and swaps of the engine; a share of them is used.
        swap: loads another adapter.
        answer: sends a request to the loaded adapter; called from several threads.
    """
    results = _Results(stage, answer)
    results.client(0)()
    assert results.outcomes == {"right": 1}, "without swaps the answer is right"
    seconds, swaps = options.seconds * SHARE, int(options.swaps * SHARE)
    with clients(options.clients, results.client):
        for adapter in itertools.islice(itertools.cycle(range(len(stage.folders))), 1, swaps + 1):
            time.sleep(seconds / swaps)
            swap(adapter)
            results.current = adapter
    found = results.outcomes
    return {
        "swaps": swaps,
        "requests": found.total(),
        "right": found["right"],
        "mixed": found["mixed"],
        "of_another_revision": found["another"],
        "p50_ms": quantile(results.latencies, 0.5),
        "p99_ms": quantile(results.latencies, 0.99),
    }
