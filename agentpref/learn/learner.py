"""One update's model at work: encode, score, train, save.

Holds the base with live and candidate on it and the batch layout that this model can be trusted
with, so that callers speak of pairs and policies and never of tensors. In a team it scores and
trains together with the learners of the other processes; answers are written by the main one alone.
It does not know which pairs are new, what a held-out pair is for, or where anything is stored.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.errors import UpdateError
from agentpref.learn import adapter, encode, logps, orders, replay, trainer
from agentpref.learn.cache import LogpCache
from agentpref.learn.encode import Encoded, EncodedPair, EncodedThumb, Encoding, R
from agentpref.learn.logps import PairLogps, Route
from agentpref.learn.objective import Means, TrainingRow
from agentpref.learn.state import Checkpoint
from agentpref.learn.team import Team
from agentpref.learn.trainer import Limits, Observer, TrainingReport
from agentpref.models.base import BaseModel
from agentpref.types import Pair, Progress, Thumb

if TYPE_CHECKING:
    from peft import PeftModel

    from agentpref.learn.batch import Batch
    from agentpref.learn.kernels.head import Reading


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
        team: the processes to share the work with; none unless given.

    Raises:
        UpdateError: another process of the team has not the same model, or is gone.
    """

    def __init__(
        self,
        base: BaseModel,
        live: Path | None,
        config: UpdateConfig,
        *,
        caches: Mapping[adapter.Policy, LogpCache],
        progress: Progress,
        team: Team | None = None,
    ) -> None:
        self.base = base
        self.config = config
        self.left_out: Counter[str] = Counter()
        self._live = None if live is None else live.name
        self.shortened: Counter[str] = Counter()
        self.retokenised: Counter[str] = Counter()
        self._caches = caches
        self._progress = progress
        from agentpref.learn.kernels.fuse import fuse
        from agentpref.learn.memory import unmap

        self._team = team or Team()
        with self._team.ordered(lambda: self._attach_order(live)):
            self._model = adapter.attach(base, live, config.lora, seed=config.seed)
            fuse(self._model)
            unmap(self._model)
            troubles = self._team.gather(b"") if self._team.main else []
        self._route: Route | None = None
        self._scored_tokens, self._scored_seconds = 0, 0.0
        for rank, trouble in enumerate(troubles):
            if trouble:
                raise UpdateError(f"process {rank} of the team: {trouble.decode()}")

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

    def take_route(self, name: str) -> None:
        """Take the way that the main process of the team has found."""
        if self._route is None:
            self._route = logps.known_route(self._model, name)

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
        with self._team.ordered(lambda: _score_order(policy, rows, route)):
            scores = self.score_share(policy, rows)
        self._scored_seconds += time.monotonic() - started
        self._scored_tokens += sum(row.width for row in rows)
        return scores

    def score_share(self, policy: adapter.Policy, rows: Sequence[Encoded]) -> list[PairLogps]:
        """Score this process's share of the rows, and gather the scores of all, in order."""
        by_width = sorted(range(len(rows)), key=lambda number: rows[number].width)
        with self.speaking_as(policy) as model:
            own = logps.score(
                model,
                [rows[number] for number in self._team.deal(by_width)],
                route=self.route(rows),
                pad=self.pad,
                progress=lambda done: self._progress(
                    f"score {policy}", min(done * self._team.size, len(rows)), len(rows)
                ),
            )
        return _in_order(by_width, self._team.gather_numbers(n for logps in own for n in logps))

    def divergences(self, rows: Sequence[Encoded]) -> list[tuple[float, float]]:
        """KL(π_0 ‖ π_θ) of both completions of each row: means over their tokens, in nats.

        The candidate's scores of the rows come of the same pass, and are kept. In a team this is
        the main process's work alone.
        """
        import torch

        route, found = self.route(rows), dict[int, tuple[float, float]]()
        scored: list[Encoded] = []
        scores: list[PairLogps] = []
        with torch.no_grad():
            for run, batch in logps.passes(self._model, rows, route, self.pad):
                read = self._beside_base(batch, route)
                assert read.kl is not None  # it was asked for
                found.update(zip(run, logps.by_row(batch.means(read.kl)), strict=True))
                scored += [rows[number] for number in run]
                scores += starmap(PairLogps, logps.by_row(batch.sums(read.logps)))
                self._progress("score candidate", len(found), len(rows))
        if (cache := self._caches.get("candidate")) is not None:
            cache.remember(scored, scores)
        return [found[number] for number in range(len(rows))]

    def _beside_base(self, batch: Batch, route: Route) -> Reading:
        """What the candidate says of a batch, its divergence from the base with it."""
        with self.speaking_as("base") as model:
            base = route.states(model, batch)
        with self.speaking_as("candidate") as model:
            return route.read(route.states(model, batch), batch, live=base)

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
        training = [TrainingRow(row, logps) for row, logps in zip(rows, references, strict=True)]
        epochs = self.config.epochs or trainer.epochs_for(new)
        route = self.route(rows)
        with self._team.ordered(lambda: _fit_order(training, epochs, route)):
            return self.train(
                training, epochs=epochs, observe=observe, checkpoint=checkpoint, limits=limits
            )

    def train(
        self,
        rows: Sequence[TrainingRow],
        *,
        epochs: int,
        observe: Observer | None = None,
        checkpoint: Checkpoint | None = None,
        limits: Limits | None = None,
    ) -> TrainingReport:
        """Train the candidate on rows whose references are known, all of the team together."""
        return trainer.train(
            self._model,
            rows,
            means=self._means([row.encoded for row in rows]),
            config=self.config,
            epochs=epochs,
            live=self._live,
            progress=lambda done, total: self._progress("train", done, total),
            observe=observe,
            identity={"numbers": self.base.numbers},
            checkpoint=checkpoint,
            limits=limits,
            team=self._team,
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
                free=memory.share_of_free_bytes(model.device.type, self._team),
            )
            room = memory.agreed(model, room, self._team)
        return Means(route, self.pad, room, self.base.precision)

    def _attach_order(self, live: Path | None) -> dict[str, object]:
        return {
            "do": "attach",
            "model": self.base.name,
            "numbers": self.base.numbers,
            "precision": self.base.precision,
            "live": None if live is None else str(live.absolute()),
            "config": self.config.to_mapping(),
        }

    def save(self, folder: Path) -> None:
        """Write the candidate's adapter into ``folder``."""
        adapter.save(self._model, self.base, folder)


def _score_order(
    policy: adapter.Policy, rows: Sequence[Encoded], route: Route
) -> dict[str, object]:
    frozen = [orders.freeze_row(row) for row in rows]
    return {"do": "score", "policy": policy, "route": route.name, "rows": frozen}


def _fit_order(rows: Sequence[TrainingRow], epochs: int, route: Route) -> dict[str, object]:
    frozen = orders.freeze_training(rows)
    return {"do": "fit", "epochs": epochs, "route": route.name, "rows": frozen}


def _in_order(numbers: Sequence[int], shares: Sequence[Sequence[float]]) -> list[PairLogps]:
    """Put scores where their rows stood: ``numbers`` was dealt out, and ``shares`` came back."""
    scores: dict[int, PairLogps] = {}
    for rank, share in enumerate(shares):
        own = numbers[rank :: len(shares)]
        scores.update(zip(own, map(PairLogps, share[::2], share[1::2]), strict=True))
    return [scores[number] for number in range(len(numbers))]
