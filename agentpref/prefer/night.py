"""The pairs of one update, by what they are for, and how they are frozen while it runs.

An update that was interrupted goes on with exactly the pairs that it had begun with, whatever came
in since. So their ids and what the loss reads of them are kept, without any text, and looked up
again: where one of them is gone, or is no longer what it was, the night cannot be had back. Pure;
knows nothing of tokens, files and training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentpref.errors import UnusableState
from agentpref.types import Pair


@dataclass(frozen=True, slots=True)
class Night:
    """What there is: the pairs that live has learned, or not, on either side of the split."""

    new: tuple[Pair, ...]
    old: tuple[Pair, ...]
    new_held_out: tuple[Pair, ...]
    old_held_out: tuple[Pair, ...]

    @classmethod
    def of(cls, pairs: Sequence[Pair], learned: set[str]) -> Night:
        """Part pairs by side of the split, and by whether the live revision has learned them."""
        parts: dict[tuple[bool, bool], list[Pair]] = {}
        for pair in pairs:
            parts.setdefault((pair.held_out, pair.pair_id in learned), []).append(pair)
        sides = ((False, False), (False, True), (True, False), (True, True))
        return cls(*(tuple(parts.get(side, ())) for side in sides))

    @property
    def fresh(self) -> set[str]:
        """Ids of the pairs that no ancestor has learned, on either side."""
        return {pair.pair_id for pair in (*self.new, *self.new_held_out)}

    def counts(self) -> dict[str, int]:
        """How many pairs of each kind there are."""
        return {name: len(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Agenda:
    """What is used of a night: all that is new, and of the old what was drawn, in this order."""

    new: tuple[Pair, ...]
    replayed: tuple[Pair, ...]
    new_held_out: tuple[Pair, ...]
    old_held_out: tuple[Pair, ...]

    def all(self) -> tuple[Pair, ...]:
        """The pairs of every kind."""
        return (*self.new, *self.replayed, *self.new_held_out, *self.old_held_out)

    def freeze(self) -> dict[str, list[list[Any]]]:
        """The agenda as plain values without text, from which :meth:`thaw` makes it again."""
        return {
            name: [_ticket(pair) for pair in getattr(self, name)]
            for name in self.__dataclass_fields__
        }

    @classmethod
    def thaw(cls, frozen: Mapping[str, Any], pairs: Sequence[Pair]) -> Agenda:
        """Find the pairs of a frozen agenda among those that there are now.

        A pair may have gained words that agree with it. One that lost some, since they were
        forgotten or taken back, is not what was trained on.

        Raises:
            UnusableState: one is gone or has changed, or ``frozen`` is no agenda.
        """
        known = {pair.pair_id: pair for pair in pairs}
        try:
            parts = [
                tuple(
                    _redeem(ticket, known, held_out="held_out" in name) for ticket in frozen[name]
                )
                for name in cls.__dataclass_fields__
            ]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UnusableState):
                raise
            raise UnusableState("it is damaged (its pairs)") from error
        return cls(*parts)


def _ticket(pair: Pair) -> list[Any]:
    return [pair.pair_id, pair.origin, pair.weight, pair.noise, list(pair.provenance)]


def _redeem(ticket: Any, known: Mapping[str, Pair], *, held_out: bool) -> Pair:
    pair_id, origin, weight, noise, provenance = ticket
    pair = known.get(pair_id)
    if pair is None or not set(provenance) <= set(pair.provenance):
        raise UnusableState("what it was trained on is no longer there")
    if (pair.origin, pair.weight, pair.noise) != (origin, weight, noise):
        raise UnusableState("what was said of its pairs has changed")
    if pair.held_out != held_out:
        raise UnusableState("another share of the prompts is held out now")
    return pair
