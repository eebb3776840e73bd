"""Fits a namespace's reward model on everything that people, and trusted judges, have said.

It is made anew each time, on features that are kept, so a fit costs what is new. Held-out prompts
prove it, as they prove adapters. What is not shown to be right more often than a coin, or is proven
worse than the model before, is not kept.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError, RewardError
from agentpref.home import Home
from agentpref.learn.process import LOADING
from agentpref.prefer.catalog import Catalog, Entry
from agentpref.prefer.strata import sample
from agentpref.prove.bootstrap import Paired
from agentpref.prove.signs import Signs
from agentpref.record.database import connect, exclusive, translated
from agentpref.record.spill import drain
from agentpref.record.store import Store
from agentpref.reward import heads as fitted
from agentpref.reward.heads import Heads, Judged
from agentpref.reward.kept import Shelf
from agentpref.reward.quality import CONFIDENCE, Quality, Told, quality
from agentpref.serve import decisions
from agentpref.types import Example, Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.learn.features import Features
    from agentpref.models.base import BaseModel

HEADS, MOST_HEADS = 5, 32
MOST = 4_000
"""So many examples train a model, and half as many prove it: a fit takes memory by their square."""

_READ_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What a fit came to.

    ``verdict`` is ``kept``; ``insufficient`` where the model is not shown to be right more often
    than a coin; or ``refused`` where it is proven worse than the one before, whose quality on the
    same pairs is ``before``. ``pairs`` and ``thumbs`` trained it. ``left_out`` counts examples that
    could not be read, by reason, and judgements that make none.
    """

    namespace: str
    model: str
    verdict: Literal["kept", "insufficient", "refused"]
    name: str | None
    pairs: int
    thumbs: int
    quality: Quality
    before: Quality | None = None
    strength: float = 0.0
    temperature: float = 1.0
    left_out: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain values: what ``--json`` prints."""
        before = None if self.before is None else self.before.to_mapping()
        return asdict(self) | {"quality": self.quality.to_mapping(), "before": before}


def fit_reward(
    home: Home | str | Path | None,
    *,
    model: str,
    namespace: str = "default",
    config: UpdateConfig | None = None,
    heads: int = HEADS,
    progress: Progress | None = None,
) -> RewardReport:
    """Fit the reward model of a namespace, and keep it if held-out pairs show that it is right.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        model: the base model whose features it reads, as for :func:`agentpref.update`.
        namespace: whose judgements.
        config: the settings of updates; those of the precision, the chat template, the longest
            row, the held-out share, the weight of thumbs and the seed matter.
        heads: how many, each on another bootstrap sample of the prompts.
        progress: called with ``(stage, done, total)``.

    Raises:
        ConfigError: ``heads`` is out of range.
        RewardError: there is nothing to fit it on.
        UpdateRunning: an update or a removal has locked the home.
        Everything that loading a model raises.
    """
    if not 2 <= heads <= MOST_HEADS:
        raise ConfigError(f"heads is {heads}, but must be from 2 to {MOST_HEADS}")
    begun, settings = time.monotonic(), config or UpdateConfig()
    tell: Progress = progress or (lambda stage, done, total: None)
    place = Home.open(home)
    with translated(place), exclusive(place), closing(connect(place)) as connection:
        drain(place)
        Store(connection).require_namespace(namespace)
        catalog, entries, notes = _chosen(connection, namespace, settings)
        base = _load(model, settings, tell)
        shelf = Shelf(place, namespace)
        with shelf.features(base.numbers) as memory:
            read = _Reading(base, settings, memory, tell)
            read.add_all(catalog, entries)
            memory.drop_unused()
        left_out = Counter(catalog.left_out()) + read.left_out
        if not read.trained:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in left_out.items())
            raise RewardError(f"nothing could be read under {model!r}: {reasons}")
        tell("fit", 0, 1)
        made = fitted.fit(read.judged(), heads=heads, seed=settings.seed)
        tell("fit", 1, 1)
        report = RewardReport(
            namespace,
            model,
            "kept",
            None,
            sum(not one.lone for one in read.trained),
            sum(one.lone for one in read.trained),
            read.quality_of(made),
            strength=made.strength,
            temperature=made.temperature,
            left_out=dict(left_out),
            notes=notes,
        )
        report = _proven(report, shelf, base, made, read)
        if report.verdict == "kept":
            about = {**report.to_mapping(), "base": base.identity, "at": time.time()}
            about["precision"] = base.precision
            report = replace(report, name=shelf.write(made.to_arrays(), about).name)
    return replace(report, seconds=time.monotonic() - begun)


def read_judged(
    home: Home,
    connection: sqlite3.Connection,
    base: BaseModel,
    namespace: str,
    settings: UpdateConfig,
    progress: Progress,
) -> Judged:
    """What a fit would train on now, as features under a base.

    Raises:
        RewardError: there is nothing.
    """
    catalog, entries, _ = _chosen(connection, namespace, settings)
    with Shelf(home, namespace).features(base.numbers) as memory:
        read = _Reading(base, settings, memory, progress)
        read.add_all(catalog, [one for one in entries if not one.held_out])
    if not read.trained:
        raise RewardError(f"nothing could be read under {base.name!r}")
    return read.judged()


def _chosen(
    connection: sqlite3.Connection, namespace: str, settings: UpdateConfig
) -> tuple[Catalog, list[Entry], tuple[str, ...]]:
    """The examples that train and prove a model, and a note where they are not all."""
    catalog = Catalog(connection, namespace, held_out=settings.held_out)
    catalog.refresh()
    entries = catalog.entries()
    if not settings.thumbs.weight:
        entries = [one for one in entries if not one.lone]
    sides = [[one for one in entries if one.held_out is held] for held in (False, True)]
    if not sides[0]:
        reasons = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in
                            catalog.left_out().items())  # fmt: skip
        raise RewardError(
            f"nothing in namespace {namespace!r} says which answers are good, or all of it is "
            f"held out; log comparisons first{f' (there: {reasons})' if reasons else ''}"
        )
    used = [*sample(sides[0], MOST), *sample(sides[1], MOST // 2)]
    if len(used) == len(entries):
        return catalog, used, ()
    note = f"{len(used):,} of {len(entries):,} examples, as equally of each stratum as possible"
    return catalog, used, (note,)


def _load(model: str, settings: UpdateConfig, tell: Progress) -> BaseModel:
    from agentpref.models.base import load_base

    tell(LOADING, 0, 1)
    base = load_base(
        model, precision=settings.precision, chat_template_kwargs=settings.chat_template_kwargs
    )
    tell(LOADING, 1, 1)
    return base


class _Row(NamedTuple):
    """One row to fit or to measure: what the features of its answers come to."""

    at: NDArray[Any]
    said: NDArray[Any]
    lone: bool
    sign: float
    noise: float
    weight: float
    told: Told


class _Reading:
    """Reads examples as features, those that train and those that are held out."""

    def __init__(
        self, base: BaseModel, settings: UpdateConfig, memory: Any, progress: Progress
    ) -> None:
        from agentpref.learn.features import FeatureReader

        self._base, self._settings, self._progress = base, settings, progress
        self._reader = FeatureReader(base, memory=memory)
        self._read = 0
        self.trained: list[_Row] = []
        self.held_out: list[_Row] = []
        self.left_out: Counter[str] = Counter()

    def add_all(self, catalog: Catalog, entries: Sequence[Entry]) -> None:
        """Read the examples of a catalog."""
        for start in range(0, len(entries), _READ_AT_ONCE):
            self._add(catalog.read(entries[start : start + _READ_AT_ONCE]), len(entries))

    def _add(self, examples: Sequence[Example], total: int) -> None:
        from agentpref.learn.encode import encode

        longest = min(self._settings.max_length, self._base.positions or 1 << 30)
        found = encode(
            examples, self._base.template, max_length=longest, embedded=self._base.embedded
        )
        self.left_out.update(found.left_out)
        rows = [
            replace(row, completions=row.own, masks=row.masks[: len(row.own)]) for row in found.rows
        ]
        for row, features in zip(rows, self._reader.read(rows), strict=True):
            side = self.held_out if row.example.held_out else self.trained
            side += _rows_of(row.example, features, self._settings)
        self._read += len(examples)
        self._progress("features", self._read, total)

    def judged(self) -> Judged:
        """All that trains."""
        import numpy as np

        rows = self.trained
        return Judged(
            np.stack([row.at for row in rows]),
            np.stack([row.said for row in rows]),
            np.array([row.lone for row in rows]),
            np.array([row.sign for row in rows]),
            np.array([row.noise for row in rows]),
            np.array([row.weight for row in rows]),
            tuple(row.told.prompt for row in rows),
        )

    def pairs(self) -> list[_Row]:
        """The held-out pairs."""
        return [row for row in self.held_out if not row.lone]

    def margins(self, heads: Heads) -> NDArray[Any]:
        """Of the held-out pairs, by the mean of the heads."""
        import numpy as np

        pairs = self.pairs()
        if not pairs:
            return np.zeros(0)
        at, said = (np.stack([getattr(row, of) for row in pairs]) for of in ("at", "said"))
        found: NDArray[Any] = heads.margins(at, said).mean(1)
        return found

    def quality_of(self, heads: Heads) -> Quality:
        """How right heads are about the held-out pairs."""
        return quality(self.margins(heads), [row.told for row in self.pairs()])


def _rows_of(example: Example, features: Features, settings: UpdateConfig) -> Iterator[_Row]:
    """A lone thumb, or each pair of completions of which one was liked more."""
    prompt, labels = example.prompt.id, [one.label or 0.0 for one in example.completions]
    if example.lone:
        weight = example.weight * settings.thumbs.weight
        up = 1.0 if labels[0] > 0.5 else -1.0
        told = Told(prompt, example.tag, 0.0)
        yield _Row(features.prompt, features.answers[0], True, up, example.noise, weight, told)
        return
    better = [(a, b) for a, x in enumerate(labels) for b, y in enumerate(labels) if x > y]
    for a, b in better:
        apart = features.answers[a] - features.answers[b]
        told = Told(prompt, example.tag, float(apart[-1]))
        weight = example.weight / len(better)
        yield _Row(features.prompt, apart, False, 1.0, example.noise, weight, told)


def _proven(
    report: RewardReport, shelf: Shelf, base: BaseModel, made: Heads, read: _Reading
) -> RewardReport:
    """The report with what held-out pairs say of the model, and of the one before it."""
    if not report.quality.shown:
        note = (
            f"right about {report.quality.right} of {report.quality.pairs} held-out pairs, which "
            "a coin may be; collect more comparisons"
        )
        if not report.quality.pairs:
            note = "no comparison is held out, and thumbs alone prove nothing; collect comparisons"
        return replace(report, verdict="insufficient", notes=(*report.notes, note))
    if not shelf.names():
        return report
    kept = shelf.read()
    if decisions.digests_of(kept.about["base"]) != decisions.digests_of(base.identity):
        note = f"{kept.name} reads another base, so the two were not compared"
        return replace(report, notes=(*report.notes, note))
    older = Heads.from_arrays(kept.arrays)
    right = [(read.margins(one) > 0).astype(float).tolist() for one in (older, made)]
    prompts = tuple(row.told.prompt for row in read.pairs())
    signs = Signs.of(Paired(tuple(right[0]), tuple(right[1]), prompts))
    report = replace(report, before=read.quality_of(older))
    if signs.chance_of_loss() > 1 - CONFIDENCE:
        return report
    note = (
        f"{signs.better} held-out prompts became better than with {kept.name}, {signs.worse} "
        f"worse: a proven loss, so {kept.name} stays; look at what was said since"
    )
    return replace(report, verdict="refused", notes=(*report.notes, note))
