"""One update's model at work: encode, score, train, save.

Holds the base with live and candidate on it and the batch layout that this model can be trusted
with, so that callers speak of pairs and policies and never of tensors. It does not know which
pairs are new, what a held-out pair is for, or where anything is stored.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.learn import adapter, encode, logps, replay, trainer
from agentpref.learn.base import BaseModel
from agentpref.learn.cache import LogpCache
from agentpref.learn.encode import Encoded, EncodedPair, EncodedThumb, Encoding, R
from agentpref.learn.logps import PairLogps, Route
from agentpref.learn.objective import Means, TrainingRow
from agentpref.learn.state import Checkpoint
from agentpref.learn.trainer import Limits, Observer, TrainingReport
from agentpref.types import Pair, Thumb

if TYPE_CHECKING:
    from peft import PeftModel

Progress = Callable[[str, int, int], object]

_SPEED_ROWS = 32


class Learner:
    """A candidate in the making.

    ``left_out`` counts pairs and thumbs that could not be encoded, by reason; ``shortened`` those
    whose prompt lost old turns, and ``retokenised`` those whose logged tokens could not be used.

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
        self._scored_tokens, self._scored_seconds = 0, 0.0

    @cached_property
    def pad(self) -> int:
        """The token that fills rows up; no mask ever lets it be seen."""
        tokenizer = self.base.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Encode pairs, counting those that cannot be."""
        limit = self.config.max_length
        return self._counted(encode.encode_pairs(pairs, self.base.tokenizer, max_length=limit))

    def encode_thumbs(self, thumbs: Sequence[Thumb]) -> list[EncodedThumb]:
        """Encode thumbs, each with another one's answer beside its own, counting the others."""
        limit = self.config.max_length
        return self._counted(encode.encode_thumbs(thumbs, self.base.tokenizer, max_length=limit))

    def _counted(self, found: Encoding[R]) -> list[R]:
        self.left_out.update(found.left_out)
        self.shortened.update(found.shortened)
        self.retokenised.update(found.retokenised)
        return found.rows

    def draw(self, strata: Mapping[str, Sequence[Pair]], size: int) -> list[EncodedPair]:
        """Draw old pairs to train again, of which fewer than ``size`` may come.

        Only what may be drawn is encoded, or counted where it cannot be, so that a night's cost
        does not grow with the log.
        """
        rows: dict[str, EncodedPair | None] = {}

        def encoded(pairs: Sequence[Pair]) -> list[EncodedPair | None]:
            unseen = [pair for pair in pairs if pair.pair_id not in rows]
            rows.update((pair.pair_id, None) for pair in unseen)
            rows.update((row.pair.pair_id, row) for row in self.encode(unseen))
            return [rows[pair.pair_id] for pair in pairs]

        def hardness(pairs: Sequence[Pair]) -> list[float]:
            """Minus the margin under live; what cannot be encoded comes last."""
            found = [row for row in encoded(pairs) if row is not None]
            margins = zip(found, self.margins("live", found), strict=True)
            hard = {row.pair.pair_id: -margin for row, margin in margins}
            return [hard.get(pair.pair_id, -math.inf) for pair in pairs]

        drawn = replay.draw(
            strata,
            size,
            hard_share=self.config.replay.hard_share,
            hardness=hardness,
            rng=random.Random(self.config.seed),
        )
        return [row for row in encoded(drawn) if row is not None]

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

    def score(self, policy: adapter.Policy, rows: Sequence[Encoded]) -> list[PairLogps]:
        """Sequence log-probs of both completions of each row under one policy."""
        cache = self._caches.get(policy)
        if cache is None:
            return self._compute(policy, rows)
        return cache.score(rows, lambda missing: self._compute(policy, missing))

    def ratios(self, policy: adapter.Policy, rows: Sequence[Encoded]) -> list[PairLogps]:
        """log[π/π_0] of both completions of each row, in nats."""
        scored = zip(self.score(policy, rows), self.score("base", rows), strict=True)
        return [PairLogps(s.chosen - b.chosen, s.rejected - b.rejected) for s, b in scored]

    def margins(self, policy: adapter.Policy, rows: Sequence[EncodedPair]) -> list[float]:
        """h of each pair: how much further than the base a policy prefers the chosen answer."""
        return [ratio.chosen - ratio.rejected for ratio in self.ratios(policy, rows)]

    def _compute(self, policy: adapter.Policy, rows: Sequence[Encoded]) -> list[PairLogps]:
        if not rows:
            return []
        route = self.route(rows)
        started = time.monotonic()
        with self.speaking_as(policy) as model:
            scores = logps.score(
                model,
                rows,
                route=route,
                pad=self.pad,
                progress=lambda done: self._progress(f"score {policy}", done, len(rows)),
            )
        self._scored_seconds += time.monotonic() - started
        self._scored_tokens += sum(row.width for row in rows)
        return scores

    def scoring_speed(self, rows: Sequence[Encoded]) -> float:
        """Tokens scored in a second, as seen so far, or on some of ``rows`` if none was seen."""
        if self._scored_tokens == 0:
            self._compute("base", rows[:_SPEED_ROWS])
        return self._scored_tokens / max(self._scored_seconds, 1e-9)

    def fit(
        self,
        rows: Sequence[Encoded],
        *,
        new: int,
        observe: Observer | None = None,
        checkpoint: Checkpoint | None = None,
        limits: Limits | None = None,
    ) -> TrainingReport:
        """Train the candidate on ``rows``, pairs and thumbs, of which ``new`` are tonight's.

        ``checkpoint`` and ``limits`` are those of :func:`~agentpref.learn.trainer.train`.
        """
        references = self.score("base", rows)
        return trainer.train(
            self._model,
            [TrainingRow(row, logps) for row, logps in zip(rows, references, strict=True)],
            means=self._means(rows),
            config=self.config,
            epochs=self.config.epochs or trainer.epochs_for(new),
            live=self._live,
            progress=lambda done, total: self._progress("train", done, total),
            observe=observe,
            identity={"numbers": self.base.numbers},
            checkpoint=checkpoint,
            limits=limits,
        )

    def _means(self, rows: Sequence[Encoded]) -> Means:
        """How this machine will train on rows: their route, and how many go into one pass."""
        from agentpref.learn import memory

        route = self.route(rows)
        widest = max(rows, key=route.cost)
        batch = route.layout([widest], self.pad).to(self._model.device)
        with self.speaking_as("candidate") as model:
            room = memory.room(
                model,
                lambda: route.states(model, batch),
                batch.ids.numel(),
                longest=batch.ids.numel(),
            )
        return Means(route, self.pad, room, self.base.precision)

    def save(self, folder: Path) -> None:
        """Write the candidate's adapter into ``folder``."""
        adapter.save(self._model, self.base, folder)
