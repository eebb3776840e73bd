"""What the nights did to everything that was learned before, with protection and without.

The naive arm trains on the same pairs in the same order from its own previous adapter, with no
replay and no KL penalty and no gate. Both arms sit the same exams: the held-out pairs of each
night. Knows nothing of how pairs came about.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentpref.config import KLSettings, ReplaySettings, UpdateConfig
from agentpref.learn.adapter import Policy
from agentpref.learn.cache import LogpCache
from agentpref.learn.learner import Learner
from agentpref.models.base import BaseModel, load_base
from agentpref.prove.metrics import RMatrix, accuracy, correctness
from agentpref.serve.manifest import is_revision_id
from agentpref.types import BASE, Pair, Progress

Exams = Mapping[str, Sequence[Pair]]


@dataclass(frozen=True)
class Arms:
    """What both arms share: the model, the settings, and the home that keeps the base's scores."""

    model: str
    config: UpdateConfig
    connection: sqlite3.Connection
    progress: Progress

    def train_naively(self, nights: Sequence[Sequence[Pair]], folder: Path) -> list[Path]:
        """Train night after night with no protection; return the adapter after each."""
        naive = replace(self.config, replay=ReplaySettings(minimum=0), kl=KLSettings(weight=0.0))
        live: Path | None = None
        adapters: list[Path] = []
        for number, pairs in enumerate(nights, start=1):
            learner = self._learner("naive arm", live, naive)
            rows = learner.encode(pairs)
            learner.fit(rows, new=len(rows))
            live = folder / str(number)
            learner.save(live)
            adapters.append(live)
        return adapters

    def r_matrix(self, adapters: Sequence[Path | None], exams: Exams) -> RMatrix:
        """Accuracy on every night's exam, before any update and with the adapter after each.

        Where an adapter is ``None``, the base still serves.
        """
        rows = [tuple(0.5 for _ in exams)]  # the base is its own reference: a coin, by definition
        for adapter in adapters:
            learner = self._learner("exams", adapter, self.config)
            rows.append(tuple(_mark(learner, pairs) for pairs in exams.values()))
        return RMatrix(tuple(exams), tuple(rows))

    def _learner(self, name: str, live: Path | None, config: UpdateConfig) -> Learner:
        base = load_base(self.model, held_in=self.config.precision)
        return Learner(
            base,
            live,
            config,
            caches=self._caches(base, live),
            progress=lambda stage, done, total: self.progress(f"{name}: {stage}", done, total),
        )

    def _caches(self, base: BaseModel, live: Path | None) -> dict[Policy, LogpCache]:
        """What the home knows already: the base's scores, and those of published revisions."""
        caches: dict[Policy, LogpCache] = {"base": LogpCache(self.connection, base.numbers, BASE)}
        if live is not None and is_revision_id(live.name):
            caches["live"] = LogpCache(self.connection, base.numbers, live.name)
        return caches


def _mark(learner: Learner, pairs: Sequence[Pair]) -> float:
    return accuracy(correctness(learner.margins("live", learner.encode(pairs))))
