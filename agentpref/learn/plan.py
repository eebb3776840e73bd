"""Which rows stand in which batch, of every epoch. Pure: the same rows and seed give one plan."""

from __future__ import annotations

import random
from collections.abc import Sequence

from agentpref.learn.objective import TrainingRow

_WINDOW = 8


def plan(
    rows: Sequence[TrainingRow], *, size: int, epochs: int, seed: int
) -> list[list[TrainingRow]]:
    """Batches of every epoch, each epoch in an order of its own.

    Within a window of some batches rows are put beside others of like width, so that little is
    spent on padding; the batches of a window then come in random order.
    """
    rng = random.Random(seed)
    planned: list[list[TrainingRow]] = []
    for _ in range(epochs):
        shuffled = rng.sample(list(rows), len(rows))
        for start in range(0, len(shuffled), size * _WINDOW):
            window = shuffled[start : start + size * _WINDOW]
            window.sort(key=lambda row: row.encoded.width)
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            planned.extend(rng.sample(batches, len(batches)))
    return planned
