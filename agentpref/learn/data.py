"""What one update works on: new examples, old ones it replays, ordinary answers, held-out ones.

Replay draws old examples in equal shares from every stratum; part of each share uniformly, the rest
those that the live policy gets most wrong. An interrupted update continues with exactly the
examples it started with: their ids and what the loss reads of them are stored without any text, and
looked up again. If one is gone or has changed, the update starts over.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from agentpref.config import ReplaySettings, UpdateConfig
from agentpref.errors import UnusableState
from agentpref.prefer.strata import L, Listed, by_stratum, equal_shares, sample
from agentpref.types import Example

if TYPE_CHECKING:
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner

LARGE_UPDATE = 1000
"""New examples above which replay is half as many, and no longer as many."""


@dataclass(frozen=True, slots=True)
class Available:
    """All the examples there are, listed by use: trained or held out, new or learned by live.

    ``aside`` are new ones that were set aside with a refused update, and ``aged`` are learned ones
    that people think otherwise of since: neither is trained or evaluated. ``exam`` are those of
    the tags that never train, as far as live has not learned them before.

    ``read`` reads listed examples whole, in order, without those that are gone meanwhile. The list
    of whole examples is one of its own. ``ordinary`` draws ordinary answers, given what was judged.
    """

    new: tuple[Listed, ...] = ()
    old: tuple[Listed, ...] = ()
    new_held_out: tuple[Listed, ...] = ()
    old_held_out: tuple[Listed, ...] = ()
    aside: tuple[Listed, ...] = ()
    aged: tuple[Listed, ...] = ()
    exam: tuple[Listed, ...] = ()
    read: Callable[[Sequence[Any]], list[Example]] = list
    ordinary: Callable[[Sequence[Example]], Sequence[Example]] = field(
        default=lambda judged: (), compare=False
    )

    @classmethod
    def split(
        cls,
        examples: Iterable[Listed],
        learned: Container[str],
        read: Callable[[Sequence[Any]], list[Example]] = list,
        *,
        aside: Container[str] = frozenset(),
        aged: Container[str] = frozenset(),
        exam: Container[str] = frozenset(),
    ) -> Available:
        """Split examples.

        ``learned`` holds the ids that the live revision has learned; of these, the ``aged`` ones no
        longer count, and of the others those that were set ``aside``. ``exam`` are tags.
        """
        parts: dict[str, list[Listed]] = {}
        for example in examples:
            is_old = example.example_id in learned
            if not is_old and example.tag in exam:
                name = "exam"
            elif example.example_id in (aged if is_old else aside):
                name = "aged" if is_old else "aside"
            else:
                name = ("old" if is_old else "new") + ("_held_out" if example.held_out else "")
            parts.setdefault(name, []).append(example)
        split = cls(**{name: tuple(found) for name, found in parts.items()})  # type: ignore[arg-type]
        return replace(split, read=read)

    def sorted_anew(self, *, aside: Container[str], aged: Container[str]) -> Available:
        """The same examples, of which others are set aside or aged out."""
        learned = {one.example_id for one in (*self.old, *self.old_held_out, *self.aged)}
        ordered = sorted(self.all(), key=lambda one: (one.lone, one.created_at, one.example_id))
        split = Available.split(ordered, learned, aside=aside, aged=aged)
        return replace(
            self,
            new=split.new,
            old=split.old,
            new_held_out=split.new_held_out,
            old_held_out=split.old_held_out,
            aside=split.aside,
            aged=split.aged,
        )

    def all(self) -> Iterator[Listed]:
        """The examples of every use but those of the exam."""
        learned = (self.old, self.old_held_out, self.aged)
        return chain(self.new, self.new_held_out, self.aside, *learned)

    @property
    def fresh(self) -> set[str]:
        """Ids of the examples that are new, trained or held out."""
        return {example.example_id for example in (*self.new, *self.new_held_out)}


@dataclass(frozen=True, slots=True)
class UpdateData:
    """The examples that one update uses: ``old`` are replayed, ``old_held_out`` are sampled.

    ``ordinary`` are the answers that nobody judged, trained or held out.
    """

    new: tuple[Example, ...] = ()
    old: tuple[Example, ...] = ()
    new_held_out: tuple[Example, ...] = ()
    old_held_out: tuple[Example, ...] = ()
    ordinary: tuple[Example, ...] = ()

    def all(self) -> tuple[Example, ...]:
        """The judged examples of every use."""
        return (*self.new, *self.old, *self.new_held_out, *self.old_held_out)

    def freeze(self) -> dict[str, list[list[Any]]]:
        """Plain values without text, from which :meth:`thaw` makes the same data again."""
        return {
            part.name: [_facts(example) for example in getattr(self, part.name)]
            for part in fields(self)
        }

    @staticmethod
    def frozen_runs(frozen: Mapping[str, Any]) -> list[str]:
        """The runs of the ordinary answers in what :meth:`freeze` gave.

        Raises:
            UnusableState: ``frozen`` is damaged.
        """
        try:
            return [str(run) for facts in frozen["ordinary"] for run in facts[-1]]
        except (KeyError, TypeError, IndexError) as error:
            raise UnusableState("it is damaged (its examples)") from error

    @staticmethod
    def frozen_ids(frozen: Mapping[str, Any]) -> set[str]:
        """The ids of the examples in what :meth:`freeze` gave.

        Raises:
            UnusableState: ``frozen`` is damaged.
        """
        try:
            return {str(facts[0]) for part in fields(UpdateData) for facts in frozen[part.name]}
        except (KeyError, TypeError, IndexError) as error:
            raise UnusableState("it is damaged (its examples)") from error

    @classmethod
    def thaw(cls, frozen: Mapping[str, Any], examples: Sequence[Example]) -> UpdateData:
        """Find frozen examples among those that there are now.

        An example may have gained feedback that agrees with it. One that lost some, because it was
        forgotten or retracted, is no longer what was trained.

        Raises:
            UnusableState: an example is gone or has changed, or ``frozen`` is damaged.
        """
        known = {example.example_id: example for example in examples}

        def found(name: str) -> tuple[Example, ...]:
            held_out = None if name == "ordinary" else "held_out" in name
            return tuple(_find(facts, known, held_out=held_out) for facts in frozen[name])

        try:
            return cls(**{part.name: found(part.name) for part in fields(cls)})
        except UnusableState:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableState("it is damaged (its examples)") from error


@dataclass(frozen=True, slots=True)
class UpdateRows:
    """The data of an update, and the rows of it that could be encoded.

    Where no new example could be encoded there is nothing to train, and nothing else is encoded.
    ``known`` are new ones that nothing is to be learned from, since live is right about them.
    """

    data: UpdateData
    new: list[EncodedExample] = field(default_factory=list)
    old: list[EncodedExample] = field(default_factory=list)
    new_held_out: list[EncodedExample] = field(default_factory=list)
    old_held_out: list[EncodedExample] = field(default_factory=list)
    ordinary: list[EncodedExample] = field(default_factory=list)
    ordinary_held_out: list[EncodedExample] = field(default_factory=list)
    known: list[EncodedExample] = field(default_factory=list)

    @property
    def trained(self) -> list[EncodedExample]:
        """All rows to train, in order."""
        return [*self.new, *self.old, *self.ordinary]

    @property
    def held_out(self) -> list[EncodedExample]:
        """All judged rows to evaluate."""
        return [*self.new_held_out, *self.old_held_out]

    def only(self, trained: Container[str]) -> UpdateRows:
        """These rows without those to train that training did not get to; ids are of examples."""
        new, old, ordinary = (
            [row for row in rows if row.example.example_id in trained]
            for rows in (self.new, self.old, self.ordinary)
        )
        return replace(self, new=new, old=old, ordinary=ordinary)


def prepare(
    learner: Learner,
    available: Available,
    started: UpdateData | None,
    config: UpdateConfig,
    *,
    replay: int | None = None,
) -> UpdateRows:
    """Choose and encode what an update works on.

    Args:
        learner: encodes examples, and scores old ones under the live policy.
        available: the examples to choose from: all there are, or those there is time for.
        started: what an interrupted update had chosen, to continue with; else ``None``.
        config: the settings of replay and gate, and the seed.
        replay: how many old examples of each kind to replay instead of the usual number.
    """
    read = available.read
    new = tuple(read(available.new)) if started is None else started.new
    lone = _draw(available, started, config, lone=True, size=replay)
    # Lone examples are encoded together: even a single new one then finds its mismatch.
    rows = learner.encode([*new, *lone])
    ids = {example.example_id for example in new}
    new_rows = [row for row in rows if row.example.example_id in ids]
    old_lone = [row for row in rows if row.example.example_id not in ids]
    new_held_out = tuple(read(available.new_held_out)) if started is None else started.new_held_out
    if not new_rows:
        return UpdateRows(started or UpdateData(new, (), new_held_out, ()))
    compared = _draw(available, started, config, lone=False, size=replay, learner=learner)
    old_rows = [*learner.encode(compared), *old_lone]
    data = started or UpdateData(
        new,
        (*(row.example for row in old_rows if not row.example.lone), *lone),
        new_held_out,
        tuple(read(sample(available.old_held_out, config.gate.max_old_pairs))),
    )
    if started is None:
        data = replace(data, ordinary=tuple(available.ordinary(data.all())))
    held_out = learner.encode([*data.new_held_out, *data.old_held_out])
    ordinary = learner.encode(data.ordinary)
    ids = {example.example_id for example in data.new_held_out}
    return UpdateRows(
        data,
        new_rows,
        old_rows,
        [row for row in held_out if row.example.example_id in ids],
        [row for row in held_out if row.example.example_id not in ids],
        [row for row in ordinary if not row.example.held_out],
        [row for row in ordinary if row.example.held_out],
    )


def _draw(
    available: Available,
    started: UpdateData | None,
    config: UpdateConfig,
    *,
    lone: bool,
    size: int | None,
    learner: Learner | None = None,
) -> list[Example]:
    """Old examples to replay, of one kind: those that an interrupted update had drawn, or new ones.

    How hard a lone example is depends on its mismatch, so those are drawn uniformly.
    """
    if started is not None:
        return [example for example in started.old if example.lone is lone]
    new = sum(example.lone is lone for example in available.new)
    old = [example for example in available.old if example.lone is lone]

    def hardness(few: Sequence[Listed]) -> list[float]:
        examples = available.read(few)
        scores = [0.0] * len(examples) if learner is None else learner.hardness(examples)
        found = dict(zip((example.example_id for example in examples), scores, strict=True))
        return [found.get(one.example_id, -math.inf) for one in few]

    drawn = draw(
        by_stratum(old),
        replay_size(new, config.replay) if size is None else size,
        hard_share=0.0 if learner is None else config.replay.hard_share,
        hardness=hardness,
        rng=random.Random(config.seed),
    )
    return available.read(drawn)


def replay_size(new: int, settings: ReplaySettings) -> int:
    """How many old examples to train beside ``new`` ones; 0 when replay is off."""
    if settings.minimum == 0:
        return 0
    return max(settings.minimum, new if new <= LARGE_UPDATE else new // 2)


def draw(
    strata: Mapping[str, Sequence[L]],
    size: int,
    *,
    hard_share: float,
    hardness: Callable[[Sequence[L]], Sequence[float]],
    rng: random.Random,
) -> list[L]:
    """Draw ``size`` examples without repetition, in shares as equal as the strata allow.

    Of each stratum's share, ``hard_share`` are the hardest of a uniform sample three times as
    large as is needed (so an update's cost does not grow with the log), and the rest uniform.
    ``hardness`` maps examples to numbers, larger for harder. It is called once, for all strata
    together, and not for those that are drawn whole.
    """
    shares = equal_shares({name: len(rows) for name, rows in strata.items()}, size)
    drawn: list[L] = []
    samples: list[tuple[int, list[L]]] = []
    for name in sorted(shares):
        hard = round(shares[name] * hard_share)
        pool = rng.sample(list(strata[name]), min(len(strata[name]), shares[name] + 2 * hard))
        easy, candidates = pool[: shares[name] - hard], pool[shares[name] - hard :]
        if hard < len(candidates):
            samples.append((hard, candidates))
            drawn += easy
        else:
            drawn += pool
    if not samples:
        return drawn
    scores = iter(hardness([example for _, candidates in samples for example in candidates]))
    for wanted, candidates in samples:
        found = list(islice(scores, len(candidates)))
        ranked = sorted(range(len(candidates)), key=lambda i: (found[i], i), reverse=True)
        drawn.extend(candidates[i] for i in ranked[:wanted])
    return drawn


def _facts(example: Example) -> list[Any]:
    """What identifies an example, what the loss reads of it, and what it was made of."""
    labels = [completion.label for completion in example.completions]
    read = [example.origin, example.weight, example.noise, labels]
    return [example.example_id, *read, list(example.provenance)]


def _find(facts: Any, known: Mapping[str, Example], *, held_out: bool | None) -> Example:
    example_id, *read, provenance = facts
    example = known.get(example_id)
    if example is None or not set(provenance) <= set(example.provenance):
        raise UnusableState("an example that it trained on is no longer there")
    if read != _facts(example)[1:-1]:
        raise UnusableState("the feedback on an example that it trained on has changed")
    if held_out not in (None, example.held_out):
        raise UnusableState("another share of the prompts is held out now")
    return example
