"""One update's model at work: encodes, scores, trains and saves.

A learner holds the base with the live adapter and the candidate on it. Callers pass examples, rows
and the name of a policy, and never tensors. In a team it scores and trains together with the
learners of the other processes; only the main one generates.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.errors import UpdateError
from agentpref.learn import adapter, logps, trainer
from agentpref.learn import encode as encoding
from agentpref.learn.cache import LogpCache
from agentpref.learn.encode import EncodedExample, Encoding
from agentpref.learn.logps import Choice, Logps, Route, Scored
from agentpref.learn.objective import ForwardPlan, Leash, Losses, TrainingRow
from agentpref.learn.schedule import epochs_for, is_small, plan_batches
from agentpref.learn.team import Team
from agentpref.learn.trainer import Limits, Observer, TrainingReport
from agentpref.models.adapter_files import AdapterFiles
from agentpref.models.base import BaseModel
from agentpref.models.decoding import Decoding
from agentpref.models.reasons import Objection
from agentpref.types import Example, Progress

if TYPE_CHECKING:
    from peft import PeftModel

    from agentpref.learn.checkpoint import Checkpoint

_SPEED_ROWS = 32
_SPENT_ROWS = 64
"""How many rows tell how far live is from the base: the mean over these is within a tenth."""


class Learner:
    """A candidate in the making.

    ``objections`` say why some examples could not be encoded, by their ids; ``shortened`` counts
    those whose prompt lost old turns, and ``retokenized`` those whose logged tokens could not be
    used. ``reached`` has the ids of the examples that training got to before its time was up.

    Args:
        base: a base model of the learner's own; adapters are put into it.
        live: the checked bytes of the adapter to start from; ``None`` starts from the base.
        config: the settings of the update.
        candidate: the checked bytes of an adapter that was trained elsewhere, which is then the
            candidate; else it starts as a copy of live.
        told: the instructions that live and the candidate are asked with, where they have any.
        caches: where the scores of frozen policies are kept, by policy; none unless given.
        progress: called with ``(stage, done, total)`` as work goes on.
        team: the processes to share the work with; none unless given.

    Raises:
        UnsupportedModel: the base's generation settings are damaged.
        UpdateError: another process of the team has another model, or has ended.
    """

    def __init__(
        self,
        base: BaseModel,
        live: AdapterFiles | None,
        config: UpdateConfig,
        *,
        candidate: AdapterFiles | None = None,
        told: Mapping[adapter.Policy, str] | None = None,
        caches: Mapping[adapter.Policy, LogpCache] | None = None,
        progress: Progress | None = None,
        team: Team | None = None,
    ) -> None:
        from agentpref.learn.kernels.fuse import fuse

        self.base = base
        self.decoding = Decoding.of(base)
        self.config = config
        self.objections: dict[str, Objection] = {}
        self.shortened: Counter[str] = Counter()
        self.retokenized: Counter[str] = Counter()
        self.reached: set[str] = set()
        self._live = None if live is None else live.folder.name
        self._told = {name: text for name, text in (told or {}).items() if text}
        self._caches = caches or {}
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self._team = team or Team()
        self._start: adapter.Start = "live"
        self._choice: Choice | None = None
        self._scored_tokens, self._scored_seconds = 0, 0.0
        with self._team.order(lambda: self._attach_order(live)):
            if live is not None and self._team.main:
                self._team.broadcast(live.config)
                self._team.broadcast(live.weights)
            self._model = adapter.attach(
                base, live, config.lora, seed=config.seed, candidate=candidate
            )
            fuse(self._model)
            failures = self._team.gather(b"") if self._team.main else []
        for rank, failure in enumerate(failures):
            if failure:
                raise UpdateError(f"process {rank} of the team: {failure.decode()}")

    @property
    def pad(self) -> int:
        """The token that fills rows up; masks hide it everywhere."""
        return self.decoding.pad

    @cached_property
    def max_length(self) -> int:
        """Tokens of a prompt with an answer, at most: the setting's, or the model's positions."""
        return min(self.config.max_length, self.decoding.positions or self.config.max_length)

    def notes(self) -> list[str]:
        """Says where a setting could not be kept."""
        if self.max_length == self.config.max_length:
            return []
        return [
            f"max_length is {self.max_length} instead of {self.config.max_length}: the model has "
            f"{self.max_length} positions"
        ]

    def restart(self, start: adapter.Start) -> None:
        """Undo all training: the candidate starts again from live or, to refit, from the base.

        Live stays what the candidate is compared with. Without a live adapter, live is the base.
        Training after it gives what it gives with a new learner, bit for bit.
        """
        with self._team.order(lambda: {"do": "restart", "start": start}):
            adapter.restart(self._model, start, seed=self.config.seed)
        self._start, self.reached = start, set()
        if "candidate" in self._caches:
            self._caches["candidate"].forget()

    def encode(
        self, examples: Sequence[Example], *, told: Iterable[str] = ()
    ) -> list[EncodedExample]:
        """Encode examples, and count those that cannot be encoded.

        ``told`` are instructions with which rows will be asked beside those of the policies.
        """
        found = self._encode(examples, told)
        self.objections.update(found.objections)
        self.shortened.update(found.shortened)
        self.retokenized.update(found.retokenized)
        return found.rows

    def measure(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Encode examples to see what they would cost, and count nothing."""
        return self._encode(examples).rows

    def _encode(self, examples: Sequence[Example], told: Iterable[str] = ()) -> Encoding:
        return encoding.encode(
            examples,
            self.base.template,
            max_length=self.max_length,
            embedded=self.base.embedded,
            instructions=sorted({*self._told.values(), *told} - {""}),
        )

    def instructions(self, policy: adapter.Policy) -> str:
        """What a policy is told before each conversation; the base is told nothing."""
        return self._told.get(policy, "")

    def instruct(self, instructions: str) -> None:
        """Ask the candidate with other instructions; rows have to be encoded anew."""
        self._told = {**self._told, "candidate": instructions}

    def asked(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[EncodedExample]:
        """Rows as a policy is asked them: with its instructions."""
        return [row.asked_with(self.instructions(policy)) for row in rows]

    def policy(self, name: adapter.Policy) -> AbstractContextManager[PeftModel]:
        """The model with one policy active, for a block."""
        return adapter.policy(self._model, name)

    def route(self, rows: Sequence[EncodedExample]) -> Route:
        """The way from rows to log-probs for this model, tried out on the first rows given."""
        return self._chosen(rows).route

    def _chosen(self, rows: Sequence[EncodedExample]) -> Choice:
        if self._choice is None:
            with self.policy("base") as model:
                self._choice = logps.choose_route(
                    model, rows, pad=self.pad, longest=self.max_length
                )
        return self._choice

    def use_route(self, name: str) -> None:
        """Use the route that the main process of the team has found."""
        if self._choice is None:
            self._choice = Choice(logps.known_route(self._model, name), "the main process chose it")

    def score(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[Logps]:
        """Sequence log-probs of the completions of each row under one policy."""
        rows, cache = self.asked(policy, rows), self._caches.get(policy)
        if cache is None:
            return [one.sums for one in self._compute(policy, rows)]
        known = cache.known(rows)
        missing = [row for row, scores in zip(rows, known, strict=True) if scores is None]
        fresh = iter(self._compute(policy, missing))
        return [next(fresh).sums if scores is None else scores for scores in known]

    def scored(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[Scored]:
        """As :meth:`score`, with the log-probs of the tokens that decide between two completions.

        They come from the same passes and are kept with the sums, so whoever asks first, for one or
        the other, a row is scored once.
        """
        rows = self.asked(policy, rows)
        if policy == "live" and self._live is None:
            policy = "base"
        cache = self._caches.get(policy)
        if cache is None:
            return self._compute(policy, rows)
        known = cache.known_whole(rows)
        missing = [row for row, scores in zip(rows, known, strict=True) if scores is None]
        fresh = iter(self._compute(policy, missing))
        return [next(fresh) if scores is None else scores for scores in known]

    def sampled_logps(
        self, policy: adapter.Policy, rows: Sequence[EncodedExample], temperature: float
    ) -> list[Logps]:
        """As :meth:`score`, of sampling at a temperature; nothing of it is kept."""
        if temperature == 1.0:
            return self.score(policy, rows)
        asked = self.asked(policy, rows)
        route = self.route(rows).at(temperature)
        with self.policy(policy) as model:
            return logps.score(model, asked, route=route, pad=self.pad)

    def is_scored(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[bool]:
        """Whether the scores of each row under base or live are kept already."""
        cache = self._caches.get("base" if self._live is None else policy)
        known = [None] * len(rows) if cache is None else cache.known(self.asked(policy, rows))
        return [scores is not None for scores in known]

    def ratios(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[Logps]:
        """log[π/π_0] of the completions of each row, in nats."""
        scored = zip(self.score(policy, rows), self.score("base", rows), strict=True)
        return [tuple(p - b for p, b in zip(own, base, strict=True)) for own, base in scored]

    def hardness(self, examples: Sequence[Example]) -> list[float]:
        """How wrong live is about each example: minus its margin; −∞ if it cannot be encoded.

        The margin is the log-ratio of the best completion less that of the worst.
        """
        rows = self.measure(examples)
        found: dict[str, float] = {}
        for row, ratios in zip(rows, self.ratios("live", rows), strict=True):
            labels = [completion.label or 0.0 for completion in row.example.completions]
            best, worst = (labels.index(pick(labels)) for pick in (max, min))
            found[row.example.example_id] = ratios[worst] - ratios[best]
        return [found.get(example.example_id, -math.inf) for example in examples]

    def _compute(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[Scored]:
        """Score rows as they are asked, and store the scores of each pass.

        An update that is ended loses one pass.
        """
        if not rows:
            return []
        route, cache = self.route(rows), self._caches.get(policy)
        order = {"do": "score", "policy": policy, "route": route.name}
        scores: dict[int, Scored] = {}
        for run in logps.runs(self._model, rows, route, side_by_side=self._team.size):
            some, started = [rows[number] for number in run], time.monotonic()
            with self._team.order(lambda: order | {"rows": [row.freeze() for row in some]}):  # noqa: B023
                found = self.score_share(policy, some)
            self._scored_seconds += time.monotonic() - started
            self._scored_tokens += sum(row.width for row in some)
            if cache is not None:
                cache.remember(some, found)
            scores.update(zip(run, found, strict=True))
            self.progress(f"score {policy}", len(scores), len(rows))
        return [scores[number] for number in range(len(rows))]

    def score_share(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[Scored]:
        """Score this process's share of the rows, and gather the scores of all, in order."""
        by_width = sorted(range(len(rows)), key=lambda number: rows[number].width)
        with self.policy(policy) as model:
            own = logps.score_whole(
                model,
                [rows[number] for number in self._team.deal(by_width)],
                route=self.route(rows),
                pad=self.pad,
            )
        shares = self._team.gather_numbers(logp for s in own for part in s for logp in part)
        scores: dict[int, Scored] = {}
        for rank, share in enumerate(shares):
            numbers = iter(share)
            for number in by_width[rank :: len(shares)]:
                size = len(rows[number].completions)
                parts = (tuple(islice(numbers, size)) for _ in Scored._fields)
                scores[number] = Scored(*parts)
        return [scores[number] for number in range(len(rows))]

    def divergences(self, rows: Sequence[EncodedExample]) -> list[Logps]:
        """KL(π_0 ‖ π_θ) of the completions of each row, in nats per token; see ``Batch.spread``.

        The same pass gives the candidate's scores of the rows, which are cached. In a team this is
        the main process's work alone.
        """
        return self._divergences("candidate", rows)

    def _divergences(self, policy: adapter.Policy, rows: Sequence[EncodedExample]) -> list[Logps]:
        import torch

        route, cache, found = self.route(rows), self._caches.get(policy), dict[int, Logps]()
        asked = self.asked(policy, rows)
        with torch.no_grad():
            for run, batch in logps.passes(self._model, asked, route, self.pad):
                some = [asked[number] for number in run]
                plain = batch
                if self.instructions(policy):  # the same tokens in the same order, asked otherwise
                    plain = route.layout([rows[number] for number in run], self.pad)
                with self.policy("base") as model:
                    base = route.states(model, plain.to(batch.ids.device))
                with self.policy(policy) as model:
                    read = route.read(route.states(model, batch), batch, live=base)
                assert read.kl is not None  # it was asked for
                found.update(zip(run, map(tuple, batch.spread(read.kl).tolist()), strict=True))
                if cache is not None:
                    cache.remember(some, logps.scored(some, batch, read.logps))
                self.progress(f"score {policy}", len(found), len(rows))
        return [found[number] for number in range(len(rows))]

    def scoring_speed(self, rows: Sequence[EncodedExample]) -> float:
        """Tokens scored per second so far, or on some of ``rows`` if none were scored yet."""
        if self._scored_tokens == 0:
            self.score("base", rows[:_SPEED_ROWS])
        if self._scored_tokens == 0:  # their scores were known
            self._compute("base", rows[:_SPEED_ROWS])
        return self._scored_tokens / max(self._scored_seconds, 1e-9)

    def fit(
        self,
        rows: Sequence[EncodedExample],
        *,
        new: int,
        epochs: int | None = None,
        longer: int = 1,
        imitation: float = 0.0,
        observe: Observer | None = None,
        checkpoint: Checkpoint | None = None,
        limits: Limits | None = None,
    ) -> TrainingReport:
        """Train the candidate on ``rows``, of which ``new`` are new to the live revision.

        Ordinary answers among the rows are no preferences: they are trained beside the others.

        ``epochs`` takes the place of those of the settings, and ``longer`` multiplies them;
        ``imitation`` is the least weight of the chosen answers' NLL. The others are those of
        :func:`~agentpref.learn.trainer.train`.
        """
        judged = [row for row in rows if not row.example.ordinary]
        said = [row for row in judged if not row.example.cloned]
        known = iter(self.score("base", said))  # decisions are compared with nothing
        references = [(0.0,) if row.example.cloned else next(known) for row in judged]
        config = self._imitating(imitation)
        losses = Losses(config, [row.example for row in judged], self._live)
        live: Sequence[Logps | None] = [None] * len(judged)
        if losses.needs_live:
            live = self.score("live", judged)
        asked = self.asked("candidate", judged)
        training = [TrainingRow(*each) for each in zip(asked, references, live, strict=True)]
        ordinary = [row for row in rows if row.example.ordinary]
        training += [TrainingRow(row, ()) for row in self.asked("candidate", ordinary)]
        own = epochs_for(new, small=is_small(self.base.model))
        epochs = longer * (epochs or self.config.epochs or own)
        leash = self._leash(judged)
        order = {"do": "fit", "epochs": epochs, "imitation": imitation, "leash": [*leash]}
        order["route"] = self.route(rows).name
        with self._team.order(lambda: order | {"rows": [row.freeze() for row in training]}):
            report = self.train(
                training,
                epochs=epochs,
                imitation=imitation,
                leash=leash,
                observe=observe,
                checkpoint=checkpoint,
                limits=limits,
            )
        planned = plan_batches(
            training, size=self.config.batch_size, epochs=epochs, seed=self.config.seed
        )
        taken = (row.encoded for batch in planned[: report.steps] for row in batch)
        self.reached = {row.example.example_id for row in taken}
        return replace(report, imitation=imitation)

    @contextmanager
    def trial(
        self,
        rows: Sequence[EncodedExample],
        *,
        epochs: int | None = None,
        imitation: float = 0.0,
        limits: Limits | None = None,
    ) -> Iterator[TrainingReport]:
        """Within the block another candidate is in place, which was trained on ``rows`` alone.

        It starts where the candidate started; all of its rows count as new. Nothing of it is kept:
        afterwards the candidate is what it was, bit for bit. Not for a team, whose followers would
        keep the other candidate. The block gets its training report.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            KeyboardInterrupt: a signal came.
        """
        with self.aside(self._start, what="cross-fit"):
            yield self.fit(rows, new=len(rows), epochs=epochs, imitation=imitation, limits=limits)

    @contextmanager
    def aside(self, start: adapter.Start, *, what: str = "beside") -> Iterator[None]:
        """Within the block the candidate is what it would start from; nothing of it is kept.

        Afterwards it is what it was, bit for bit. Progress is told as that of ``what``.
        """
        kept = adapter.weights(self._model)
        caches, reached, progress = self._caches, self.reached, self.progress
        told = self._told
        self._caches = {name: cache for name, cache in caches.items() if name != "candidate"}
        self.progress = lambda stage, done, total: progress(f"{what}: {stage}", done, total)
        try:
            adapter.restart(self._model, start, seed=self.config.seed)
            yield
        finally:
            adapter.set_weights(self._model, kept)
            self._caches, self.reached, self.progress = caches, reached, progress
            self._told = told

    def _leash(self, rows: Sequence[EncodedExample]) -> Leash:
        """How far the candidate may go, given how far live is from the base on these rows."""
        spent = 0.0
        if self._live is not None and self._start == "live" and self.config.kl.weight > 0:
            some = random.Random(self.config.seed).sample(list(rows), min(_SPENT_ROWS, len(rows)))
            values = [
                kl
                for row, kls in zip(some, self._divergences("live", some), strict=True)
                for kl in kls[: len(row.own)]
            ]
            spent = sum(values) / len(values)
        return Leash.of(self.config, self._start, live=self._live is not None, spent=spent)

    def train(
        self,
        rows: Sequence[TrainingRow],
        *,
        epochs: int,
        imitation: float = 0.0,
        leash: Leash,
        observe: Observer | None = None,
        checkpoint: Checkpoint | None = None,
        limits: Limits | None = None,
    ) -> TrainingReport:
        """Train the candidate on rows with known references, all processes of the team together."""
        return trainer.train(
            self._model,
            rows,
            plan=self._plan([row.encoded for row in rows]),
            config=self._imitating(imitation),
            epochs=epochs,
            live=self._live,
            leash=leash,
            progress=lambda done, total: self.progress("train", done, total),
            observe=observe,
            identity={"numbers": self.base.numbers},
            checkpoint=checkpoint,
            limits=limits,
            team=self._team,
        )

    def _imitating(self, least: float) -> UpdateConfig:
        """The settings, with no smaller weights of the chosen answers' NLL than this."""
        loss = self.config.loss
        if least <= min(loss.nll, loss.nll_on_corrections):
            return self.config
        nll, on_corrections = max(loss.nll, least), max(loss.nll_on_corrections, least)
        loss = replace(loss, nll=nll, nll_on_corrections=on_corrections)
        return replace(self.config, loss=loss)

    def _plan(self, rows: Sequence[EncodedExample]) -> ForwardPlan:
        """How this machine trains on rows: their route, and how many tokens go into one pass."""
        from agentpref.learn import memory

        choice = self._chosen(rows)
        route = choice.route
        widest = max(rows, key=route.cost)
        batch = route.layout([widest], self.pad).to(self._model.device)
        with self.policy("candidate") as model:
            room = memory.room(
                model,
                lambda: route.states(model, batch),
                batch.ids.numel(),
                longest=batch.ids.numel(),
                free=memory.share_of_free_bytes(model.device.type, self._team),
            )
            room = memory.agreed(model, room, self._team)
        return ForwardPlan(choice, self.pad, room, self.base.precision)

    def _attach_order(self, live: AdapterFiles | None) -> dict[str, object]:
        return {
            "do": "attach",
            "model": self.base.name,
            "numbers": self.base.numbers,
            "precision": self.base.precision,
            "live": None if live is None else str(live.folder.absolute()),
            "config": self.config.to_mapping(),
        }

    def detach(self) -> None:
        """Take the adapters out of the base, for another learner to use it; this one ends."""
        adapter.detach(self._model)

    def save(self, folder: Path) -> None:
        """Write the candidate's adapter into ``folder``."""
        adapter.save(self._model, self.base, folder)
