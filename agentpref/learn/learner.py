"""One update's model at work: encode, score, train, save.

Holds the base with live and candidate on it and the batch layout that this model can be trusted
with, so that callers speak of pairs and policies and never of tensors. It does not know which
pairs are new, what a held-out pair is for, or where anything is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.learn import adapter, encode, logps, trainer
from agentpref.learn.base import BaseModel
from agentpref.learn.cache import LogpCache
from agentpref.learn.encode import Encoded, EncodedPair
from agentpref.learn.logps import PairLogps, Route
from agentpref.learn.objective import TrainingRow
from agentpref.learn.trainer import Observer, TrainingReport
from agentpref.types import Pair

if TYPE_CHECKING:
    from peft import PeftModel

Progress = Callable[[str, int, int], object]


class Learner:
    """A candidate in the making.

    ``left_out`` counts pairs that could not be encoded, by reason; ``shortened`` those whose prompt
    lost old turns, and ``retokenised`` those whose logged tokens could not be used.

    Args:
        base: a base model of the learner's own; adapters are put into it.
        live: folder of the adapter to start from; ``None`` starts from the base.
        config: the settings of the update.
        caches: where the scores of frozen policies are kept, by policy.
        progress: told ``(stage, done, total)`` as work goes on.
    """

    def __init__(
        self,
        base: BaseModel,
        live: Path | None,
        config: UpdateConfig,
        *,
        caches: Mapping[adapter.Policy, LogpCache],
        progress: Progress,
    ) -> None:
        self.base = base
        self.config = config
        self.left_out: Counter[str] = Counter()
        self._live = None if live is None else live.name
        self.shortened: Counter[str] = Counter()
        self.retokenised: Counter[str] = Counter()
        self._caches = caches
        self._progress = progress
        from agentpref.learn.fuse import fuse

        self._model = adapter.attach(base, live, config.lora, seed=config.seed)
        fuse(self._model)
        self._route: Route | None = None

    @cached_property
    def pad(self) -> int:
        """The token that fills rows up; no mask ever lets it be seen."""
        tokenizer = self.base.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Encode pairs, counting those that cannot be."""
        found = encode.encode_pairs(pairs, self.base.tokenizer, max_length=self.config.max_length)
        self.left_out.update(found.left_out)
        self.shortened.update(found.shortened)
        self.retokenised.update(found.retokenised)
        return found.rows

    def speaking_as(self, policy: adapter.Policy) -> AbstractContextManager[PeftModel]:
        """The model with one policy active."""
        return adapter.policy(self._model, policy)

    def route(self, rows: Sequence[Encoded]) -> Route:
        """The way from rows to log-probs for this model, tried out on the first rows given."""
        if self._route is None:
            with self.speaking_as("base") as model:
                self._route = logps.trusted_route(
                    model, rows, pad=self.pad, longest=self.config.max_length
                )
        return self._route

    def score(self, policy: adapter.Policy, rows: Sequence[EncodedPair]) -> list[PairLogps]:
        """Sequence log-probs of both completions of each row under one policy."""
        cache = self._caches.get(policy)
        if cache is None:
            return self._compute(policy, rows)
        return cache.score(rows, lambda missing: self._compute(policy, missing))

    def margins(self, policy: adapter.Policy, rows: Sequence[EncodedPair]) -> list[float]:
        """h of each row: how much further than the base a policy prefers the chosen answer."""
        scored = zip(self.score(policy, rows), self.score("base", rows), strict=True)
        return [(s.chosen - b.chosen) - (s.rejected - b.rejected) for s, b in scored]

    def _compute(self, policy: adapter.Policy, rows: Sequence[EncodedPair]) -> list[PairLogps]:
        if not rows:
            return []
        route = self.route(rows)
        with self.speaking_as(policy) as model:
            return logps.score(
                model,
                rows,
                route=route,
                pad=self.pad,
                progress=lambda done: self._progress(f"score {policy}", done, len(rows)),
            )

    def fit(
        self, rows: Sequence[EncodedPair], *, new: int, observe: Observer | None = None
    ) -> TrainingReport:
        """Train the candidate on ``rows``, of which ``new`` are tonight's."""
        references = self.score("base", rows)
        return trainer.train(
            self._model,
            [TrainingRow(row, logps) for row, logps in zip(rows, references, strict=True)],
            route=self.route(rows),
            pad=self.pad,
            config=self.config,
            epochs=self.config.epochs or trainer.epochs_for(new),
            live=self._live,
            progress=lambda done, total: self._progress("train", done, total),
            observe=observe,
        )

    def save(self, folder: Path) -> None:
        """Write the candidate's adapter into ``folder``."""
        adapter.save(self._model, self.base, folder)
