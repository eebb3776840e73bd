"""What the nights did to everything that was learned before, with protection and without.

The naive arm trains on the same pairs in the same order from its own previous adapter, with no
replay and no KL penalty and no gate. Both arms sit the same exams: the held-out pairs of each
night. Knows nothing of how pairs came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agentpref.config import KLSettings, ReplaySettings, UpdateConfig
from agentpref.learn.base import load_base
from agentpref.learn.learner import Learner, Progress
from agentpref.prove.metrics import RMatrix, accuracy, correctness
from agentpref.types import Pair

Exams = Mapping[str, Sequence[Pair]]


def naive_arm(
    model: str,
    nights: Sequence[Sequence[Pair]],
    config: UpdateConfig,
    folder: Path,
    progress: Progress,
) -> list[Path]:
    """Train night after night with no protection; return the adapter after each."""
    naive = replace(config, replay=ReplaySettings(minimum=0), kl=KLSettings(weight=0.0))
    live: Path | None = None
    adapters: list[Path] = []
    for number, pairs in enumerate(nights, start=1):
        learner = _learner(model, live, naive, _named("naive arm", progress))
        rows = learner.encode(pairs)
        learner.fit(rows, new=len(rows))
        live = folder / str(number)
        learner.save(live)
        adapters.append(live)
    return adapters


def r_matrix(
    model: str, adapters: Sequence[Path], exams: Exams, config: UpdateConfig, progress: Progress
) -> RMatrix:
    """Accuracy on every night's exam, before any update and after each."""
    rows = [tuple(0.5 for _ in exams)]  # the base is its own reference: a coin, by definition
    for adapter in adapters:
        learner = _learner(model, adapter, config, _named("exams", progress))
        rows.append(tuple(_mark(learner, pairs) for pairs in exams.values()))
    return RMatrix(tuple(exams), tuple(rows))


def _mark(learner: Learner, pairs: Sequence[Pair]) -> float:
    return accuracy(correctness(learner.margins("live", learner.encode(pairs))))


def _learner(model: str, live: Path | None, config: UpdateConfig, progress: Progress) -> Learner:
    return Learner(load_base(model), live, config, caches={}, progress=progress)


def _named(name: str, progress: Progress) -> Progress:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)
