"""What one update works on: which old examples are replayed and examined, and the rows of all.

Pairs and thumbs are drawn apart, each kind in proportion to what is new of it, and trained side by
side. An update that goes on with an interrupted one gets the same rows in the same order. Knows
nothing of how a night came about, nor of what its rows are trained and examined for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentpref.prefer.night import Agenda, Night, count, pairs_of, thumbs_of
from agentpref.types import Example, Thumb

if TYPE_CHECKING:
    from agentpref.learn.encode import Encoded, EncodedPair, EncodedThumb
    from agentpref.learn.learner import Learner


@dataclass(frozen=True, slots=True)
class Lessons:
    """An agenda, and the rows of it that could be encoded: pairs first, then thumbs.

    Without new rows there is nothing to train, and nothing else is encoded.
    """

    agenda: Agenda
    new: list[Encoded] = field(default_factory=list)
    replayed: list[Encoded] = field(default_factory=list)
    new_held_out: list[Encoded] = field(default_factory=list)
    old_held_out: list[Encoded] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many rows are replayed and how many old ones examined, by kind."""
        replayed = [row.example for row in self.replayed]
        return count(replayed=replayed, old_examined=self.agenda.old_held_out)

    @property
    def rows(self) -> list[Encoded]:
        """All that is trained, in order."""
        return [*self.new, *self.replayed]

    @property
    def held_out(self) -> list[Encoded]:
        """All that is examined."""
        return [*self.new_held_out, *self.old_held_out]


def prepare(learner: Learner, night: Night, begun: Agenda | None) -> Lessons:
    """Encode what an update works on; without an agenda that was begun with, draw one first.

    New and replayed thumbs are encoded together, so that even a single new one finds the answer to
    another prompt that it is compared with.
    """
    new = night.new if begun is None else begun.new
    pairs, thumbs = learner.encode(pairs_of(new)), thumbs_of(new)
    if begun is not None:
        old_thumbs = thumbs_of(begun.replayed)
    else:
        old_thumbs = _draw_thumbs(learner, night) if pairs or thumbs else []
    new_thumbs, replayed_thumbs = _encode_thumbs(learner, thumbs, old_thumbs)
    if not pairs and not new_thumbs:
        return Lessons(begun or _agenda(learner, night, ()))
    if begun is not None:
        old_pairs = learner.encode(pairs_of(begun.replayed))
    else:
        old_pairs = _draw_pairs(learner, night)
    replayed: tuple[Example, ...] = (*(row.pair for row in old_pairs), *old_thumbs)
    agenda = begun or _agenda(learner, night, replayed)
    return Lessons(
        agenda,
        [*pairs, *new_thumbs],
        [*old_pairs, *replayed_thumbs],
        _encode(learner, agenda.new_held_out),
        _encode(learner, agenda.old_held_out),
    )


def _agenda(learner: Learner, night: Night, replayed: Sequence[Example]) -> Agenda:
    from agentpref.prefer.strata import sample

    examined = sample(night.old_held_out, learner.config.gate.max_old_pairs)
    return Agenda(night.new, tuple(replayed), night.new_held_out, tuple(examined))


def _draw_pairs(learner: Learner, night: Night) -> list[EncodedPair]:
    from agentpref.learn.replay import replay_size
    from agentpref.prefer.strata import by_stratum

    size = replay_size(len(pairs_of(night.new)), learner.config.replay)
    return learner.draw(by_stratum(pairs_of(night.old)), size)


def _draw_thumbs(learner: Learner, night: Night) -> list[Thumb]:
    """Old thumbs, uniformly from each stratum: how hard one is hangs on what it is drawn with."""
    from agentpref.learn.replay import draw, replay_size
    from agentpref.prefer.strata import by_stratum

    return draw(
        by_stratum(thumbs_of(night.old)),
        replay_size(len(thumbs_of(night.new)), learner.config.replay),
        hard_share=0.0,
        hardness=lambda thumbs: [0.0] * len(thumbs),
        rng=random.Random(learner.config.seed),
    )


def _encode(learner: Learner, examples: Sequence[Example]) -> list[Encoded]:
    thumbs = learner.encode_thumbs(thumbs_of(examples))
    return [*learner.encode(pairs_of(examples)), *thumbs]


def _encode_thumbs(
    learner: Learner, new: Sequence[Thumb], old: Sequence[Thumb]
) -> tuple[list[EncodedThumb], list[EncodedThumb]]:
    """Rows of new and of old thumbs."""
    rows = learner.encode_thumbs([*new, *old])
    tonight = {thumb.id for thumb in new}
    return (
        [row for row in rows if row.thumb.id in tonight],
        [row for row in rows if row.thumb.id not in tonight],
    )
