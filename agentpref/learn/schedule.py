"""The plan of a training run: how often, how fast, and in which batches it takes its rows."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from agentpref.learn.objective import TrainingRow

_SMALL_MODEL = 50_000_000
_WARMUP_SHARE = 0.1
_WINDOW = 8

ORDINARY_SHARE = 0.25
"""Ordinary answers beside the examples of a batch, as a share of its size."""

REMARK_SHARE = 0.125
"""Remarks beside them, as such a share."""


def is_small(model: Any) -> bool:
    """Whether a model has a few million parameters, which learn otherwise than a real one's."""
    return bool(model.num_parameters() < _SMALL_MODEL)


def epochs_for(new: int, *, small: bool) -> int:
    """As many passes over the new examples as show a thousand of them, from 1 to 4.

    A small model takes up to 10: it learns little in the 24 steps of a hundred examples that were
    shown four times (docs/training.md).

    >>> [epochs_for(new, small=False) for new in (100, 400, 1000)]
    [4, 3, 1]
    >>> [epochs_for(new, small=True) for new in (50, 100, 200, 400)]
    [10, 10, 5, 3]
    """
    return min(10 if small else 4, max(1, math.ceil(1000 / max(1, new))))


def learning_rate_for(model: Any) -> float:
    """2e-3 for models of a few million parameters, 1e-4 for real ones; docs/training.md has why."""
    return 2e-3 if is_small(model) else 1e-4


def rate_share(position: float, steps: int) -> float:
    """Share of the learning rate at a position in the plan: up over a tenth of it, then to zero."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    return min((position + 1) / warmup, (steps - position) / max(1, steps - warmup))


def plan_batches(
    rows: Sequence[TrainingRow], *, size: int, epochs: int, seed: int
) -> list[list[TrainingRow]]:
    """The batches of all epochs; each epoch has another order, fixed by the seed.

    In every window of 8 batches, rows of similar width share a batch, which saves padding; the
    batches of a window come in random order. Ordinary answers come on top: a quarter of ``size`` in
    each batch, in a circle as long as the plan; and so do remarks, an eighth.
    """
    unlabelled = [row for row in rows if row.encoded.example.ordinary]
    rows = [row for row in rows if not row.encoded.example.ordinary]
    rng = random.Random(seed)
    planned: list[list[TrainingRow]] = []
    for _ in range(epochs):
        shuffled = rng.sample(list(rows), len(rows))
        for start in range(0, len(shuffled), size * _WINDOW):
            window = shuffled[start : start + size * _WINDOW]
            window.sort(key=lambda row: row.encoded.width)
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            planned.extend(rng.sample(batches, len(batches)))
    for is_remark, share in ((False, ORDINARY_SHARE), (True, REMARK_SHARE)):
        some = [row for row in unlabelled if (row.encoded.advised is not None) is is_remark]
        circle = itertools.cycle(rng.sample(some, len(some)))
        beside = min(max(1, round(share * size)), len(some))
        planned = [[*batch, *itertools.islice(circle, beside)] for batch in planned]
    return planned
