"""Which old pairs are trained again beside tonight's, so that nothing learned is forgotten.

Pure: what is kept (everything in the log) is apart from how it is mixed (here). Old pairs are
drawn in equal shares from every stratum; part of each share uniformly, the rest those that the
live policy gets most wrong. Knows nothing of models.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from agentpref.config import ReplaySettings
from agentpref.prefer.strata import equal_shares

T = TypeVar("T")

LARGE_NIGHT = 1000
"""New pairs above which replay is half of them and no longer as many."""


def replay_size(new: int, settings: ReplaySettings) -> int:
    """How many old pairs to train beside ``new`` ones; 0 when replay is off."""
    if settings.minimum == 0:
        return 0
    return max(settings.minimum, new if new <= LARGE_NIGHT else new // 2)


def draw(
    strata: Mapping[str, Sequence[T]],
    size: int,
    *,
    hard_share: float,
    hardness: Callable[[Sequence[T]], Sequence[float]],
    rng: random.Random,
) -> list[T]:
    """Draw ``size`` rows, without repetition, in shares as equal as the strata allow.

    Of each stratum's share, ``hard_share`` are the hardest of a uniform sample three times as
    large as is needed (so that a night's cost does not grow with the log), and the rest uniform.
    ``hardness`` maps rows to numbers, larger for harder. It is asked once, of all strata together,
    and not of those that are drawn whole.
    """
    shares = equal_shares({name: len(rows) for name, rows in strata.items()}, size)
    drawn: list[T] = []
    samples: list[tuple[int, list[T]]] = []
    for name in sorted(shares):
        hard = round(shares[name] * hard_share)
        pool = rng.sample(list(strata[name]), min(len(strata[name]), shares[name] + 2 * hard))
        easy, sample = pool[: shares[name] - hard], pool[shares[name] - hard :]
        if hard < len(sample):
            samples.append((hard, sample))
            drawn += easy
        else:
            drawn += pool
    return drawn + _hardest(samples, hardness)


def _hardest(
    samples: Sequence[tuple[int, list[T]]], hardness: Callable[[Sequence[T]], Sequence[float]]
) -> list[T]:
    """As many rows of each sample as are wanted of it, the hardest ones."""
    if not samples:
        return []
    found = iter(hardness([row for _, sample in samples for row in sample]))
    drawn: list[T] = []
    for wanted, sample in samples:
        scores = list(islice(found, len(sample)))
        ranked = sorted(range(len(sample)), key=lambda i: (scores[i], i), reverse=True)
        drawn.extend(sample[i] for i in ranked[:wanted])
    return drawn


def group(rows: Sequence[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Rows by stratum, each in its given order."""
    groups: defaultdict[str, list[T]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)
