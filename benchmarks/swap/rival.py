"""Ways to swap that change what answers in place, under the same load.

Each client notes which adapter was in before it asked, as a server would log it, and its answer is
compared with that one's. An answer of another adapter was logged wrongly; one of no adapter at all
was written by two of them.
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
"""Of the time and the swaps that an engine is given: it is soon seen what they do."""


class _Judge:
    """What became of the requests."""

    def __init__(self, stage: Stage, answer: Callable[[str], Ids]) -> None:
        self.current = 0
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[float] = []
        self._stage, self._answer = stage, answer
        self._noting = threading.Lock()

    def client(self, number: int) -> Callable[[], None]:
        """Ask whatever is in."""
        source = random.Random(number)

        def once() -> None:
            prompt = source.choice(self._stage.prompts)
            begin, named = time.monotonic(), self.current
            answer = self._answer(prompt)
            with self._noting:
                self.latencies.append(time.monotonic() - begin)
                self.outcomes[self._judge(answer, named, prompt)] += 1

        return once

    def _judge(self, answer: Ids, named: int, prompt: str) -> str:
        expected = self._stage.expected
        if answer == expected[named, prompt]:
            return "right"
        others = range(len(self._stage.folders))
        return "another" if any(answer == expected[o, prompt] for o in others) else "mixed"


def measure(
    stage: Stage, options: Options, *, swap: Callable[[int], None], answer: Callable[[str], Ids]
) -> Mapping[str, Any]:
    """Swap in place while clients ask, and judge what they were answered.

    Args:
        stage: the adapters, the first of which is in, and what they answer.
        options: how long, by how many clients, and how many swaps, before the share is taken.
        swap: puts another adapter in.
        answer: asks whatever is in; called from several threads.
    """
    judge = _Judge(stage, answer)
    judge.client(0)()
    assert judge.outcomes == {"right": 1}, "alone, it answers as it should"
    seconds, swaps = options.seconds * SHARE, int(options.swaps * SHARE)
    with clients(options.clients, judge.client):
        for adapter in itertools.islice(itertools.cycle(range(len(stage.folders))), 1, swaps + 1):
            time.sleep(seconds / swaps)
            swap(adapter)
            judge.current = adapter
    found = judge.outcomes
    return {
        "swaps": swaps,
        "requests": found.total(),
        "right": found["right"],
        "mixed": found["mixed"],
        "of_another_revision": found["another"],
        "p50_ms": quantile(judge.latencies, 0.5),
        "p99_ms": quantile(judge.latencies, 0.99),
    }
