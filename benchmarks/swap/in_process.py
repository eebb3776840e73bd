"""The engine inside the process, and peft's own way to swap, under the same load.

``hotswap_adapter`` writes the new adapter's weights over the old one's, in place, while threads
generate. Each client notes which adapter was in before it asked, as a server would log it.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from agentpref.learn.base import load_base
from agentpref.serve.router import Router
from agentpref_adapters.transformers import open_router
from benchmarks.swap.load import Engine, Options, Rival, clients, quantile
from benchmarks.swap.stage import MAX_TOKENS, Stage, encoded

HOTSWAP_SHARE = 1 / 3
"""Of the time and the swaps that the engine is given: it is slower, and soon wrong."""


@contextmanager
def serve(stage: Stage) -> Iterator[Router]:
    """Serve the stage's home from this process."""
    with open_router(stage.home, stage.base) as router:
        yield router


class _Hotswapped:
    """A plain peft model in which one adapter's weights are overwritten by the next one's."""

    def __init__(self, stage: Stage) -> None:
        from peft import PeftModel

        self.base = load_base(stage.base)
        self.model = PeftModel.from_pretrained(self.base.model, str(stage.folders[0]))
        self.stage = stage
        self.current = 0
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[float] = []
        self._noting = threading.Lock()

    def swap(self, adapter: int) -> None:
        """Put another adapter in, as peft's documentation shows."""
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(self.model, str(self.stage.folders[adapter]), adapter_name="default")
        self.current = adapter

    def client(self, number: int) -> Callable[[], None]:
        """Ask with the adapter that is in."""
        source = random.Random(number)

        def once() -> None:
            prompt = source.choice(self.stage.prompts)
            begin, named = time.monotonic(), self.current
            inputs = encoded(self.base, prompt)
            ids = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            answer = tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())
            with self._noting:
                self.latencies.append(time.monotonic() - begin)
                self.outcomes[self._judge(answer, named, prompt)] += 1

        return once

    def _judge(self, answer: tuple[int, ...], named: int, prompt: str) -> str:
        expected = self.stage.expected
        if answer == expected[named, prompt]:
            return "right"
        others = range(len(self.stage.folders))
        return "another" if any(answer == expected[o, prompt] for o in others) else "mixed"


def hotswap(stage: Stage, options: Options) -> Mapping[str, Any]:
    """Swap by ``hotswap_adapter`` while clients generate, and judge what they were answered."""
    served = _Hotswapped(stage)
    served.client(0)()  # alone, it answers as it should
    assert served.outcomes == {"right": 1}
    seconds, swaps = options.seconds * HOTSWAP_SHARE, int(options.swaps * HOTSWAP_SHARE)
    with clients(options.clients, served.client):
        for adapter in itertools.islice(itertools.cycle(range(len(stage.folders))), 1, swaps + 1):
            time.sleep(seconds / swaps)
            served.swap(adapter)
    found = served.outcomes
    return {
        "swaps": swaps,
        "requests": found.total(),
        "right": found["right"],
        "mixed": found["mixed"],
        "of_another_revision": found["another"],
        "p50_ms": quantile(served.latencies, 0.5),
        "p99_ms": quantile(served.latencies, 0.99),
    }


ENGINE = Engine("transformers", serve, activation=1.0, rivals=(Rival("hotswap", hotswap),))
