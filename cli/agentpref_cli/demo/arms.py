"""Compares the demo's updates with the same updates without protection: the naive arm.

The naive arm trains on the same pairs in the same order, each time from its own previous adapter,
without replay, KL penalty and gate. Both arms are evaluated on the held-out pairs of every update.
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
from agentpref.models.base import load_base
from agentpref.prove.evaluate import policy_scores
from agentpref.prove.metrics import RMatrix, accuracy
from agentpref.serve.folders import is_revision_id
from agentpref.types import BASE, Example, Progress


@dataclass(frozen=True)
class Arms:
    """What both arms share: the model, the settings, and the home that caches log-probabilities."""

    model: str
    config: UpdateConfig
    connection: sqlite3.Connection
    progress: Progress

    def train_naively(self, updates: Sequence[Sequence[Example]], folder: Path) -> list[Path]:
        """Train on the pairs of each update without protection; return the adapter after each."""
        naive = replace(self.config, replay=ReplaySettings(minimum=0), kl=KLSettings(weight=0.0))
        live: Path | None = None
        adapters: list[Path] = []
        for number, pairs in enumerate(updates, start=1):
            learner = self._learner("naive arm", live, naive)
            rows = learner.encode(pairs)
            learner.fit(rows, new=len(rows))
            live = folder / str(number)
            learner.save(live)
            adapters.append(live)
        return adapters

    def r_matrix(
        self, adapters: Sequence[Path | None], held_out: Mapping[str, Sequence[Example]]
    ) -> RMatrix:
        """Accuracy on the held-out pairs of every update: one row for the base, one per adapter.

        An adapter that is ``None`` stands for the base model.
        """
        rows = [tuple(0.5 for _ in held_out)]  # the base is its own reference: .5 by definition
        for adapter in adapters:
            learner = self._learner("evaluation", adapter, self.config)
            rows.append(
                tuple(
                    accuracy(policy_scores(learner, "live", learner.encode(pairs)))
                    for pairs in held_out.values()
                )
            )
        return RMatrix(tuple(held_out), tuple(rows))

    def _learner(self, name: str, live: Path | None, config: UpdateConfig) -> Learner:
        base = load_base(self.model, held_in=self.config.precision)
        caches: dict[Policy, LogpCache] = {"base": LogpCache(self.connection, base.numbers, BASE)}
        if live is not None and is_revision_id(live.name):
            caches["live"] = LogpCache(self.connection, base.numbers, live.name)
        return Learner(
            base,
            live,
            config,
            caches=caches,
            progress=lambda stage, done, total: self.progress(f"{name}: {stage}", done, total),
        )
