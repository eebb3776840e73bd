"""The pairs and thumbs of one update, by what they are for, and how they are frozen while it runs.

An update that was interrupted goes on with exactly the examples that it had begun with, whatever
came in since. So their ids and what the loss reads of them are kept, without any text, and looked
up again: where one of them is gone, or is no longer what it was, the night cannot be had back.
Pure; knows nothing of tokens, files and training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentpref.errors import UnusableState
from agentpref.types import Example, Pair, Thumb


@dataclass(frozen=True, slots=True)
class Night:
    """What there is: the examples that live has learned, or not, on either side of the split."""

    new: tuple[Example, ...]
    old: tuple[Example, ...]
    new_held_out: tuple[Example, ...]
    old_held_out: tuple[Example, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], learned: set[str]) -> Night:
        """Part examples by side of the split, and by whether the live revision has learned them."""
        parts: dict[tuple[bool, bool], list[Example]] = {}
        for example in examples:
            parts.setdefault((example.held_out, example.id in learned), []).append(example)
        sides = ((False, False), (False, True), (True, False), (True, True))
        return cls(*(tuple(parts.get(side, ())) for side in sides))

    @property
    def fresh(self) -> set[str]:
        """Ids of the examples that no ancestor has learned, on either side."""
        return {example.id for example in (*self.new, *self.new_held_out)}

    def counts(self) -> dict[str, int]:
        """How many pairs of each kind there are, as ``new``, and thumbs, as ``new_thumbs``."""
        return count(**{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Agenda:
    """What is used of a night: all that is new, and of the old what was drawn, in this order."""

    new: tuple[Example, ...]
    replayed: tuple[Example, ...]
    new_held_out: tuple[Example, ...]
    old_held_out: tuple[Example, ...]

    def all(self) -> tuple[Example, ...]:
        """The examples of every kind."""
        return (*self.new, *self.replayed, *self.new_held_out, *self.old_held_out)

    def freeze(self) -> dict[str, list[list[Any]]]:
        """The agenda as plain values without text, from which :meth:`thaw` makes it again."""
        return {
            name: [_ticket(example) for example in getattr(self, name)]
            for name in self.__dataclass_fields__
        }

    @classmethod
    def thaw(cls, frozen: Mapping[str, Any], examples: Sequence[Example]) -> Agenda:
        """Find the examples of a frozen agenda among those that there are now.

        One may have gained words that agree with it. One that lost some, since they were forgotten
        or taken back, is not what was trained on.

        Raises:
            UnusableState: one is gone or has changed, or ``frozen`` is no agenda.
        """
        known = {example.id: example for example in examples}
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


def pairs_of(examples: Iterable[Example]) -> list[Pair]:
    """The pairs among some examples, in their order."""
    return [example for example in examples if isinstance(example, Pair)]


def thumbs_of(examples: Iterable[Example]) -> list[Thumb]:
    """The thumbs among some examples, in their order."""
    return [example for example in examples if isinstance(example, Thumb)]


def count(**groups: Sequence[Example]) -> dict[str, int]:
    """Count groups of examples by kind: the pairs under the group's name, thumbs beside them.

    >>> count(new=())
    {'new': 0, 'new_thumbs': 0}
    """
    counts: dict[str, int] = {}
    for name, examples in groups.items():
        counts[name] = len(pairs_of(examples))
        counts[f"{name}_thumbs"] = len(examples) - counts[name]
    return counts


def _ticket(example: Example) -> list[Any]:
    """Id, what the loss reads of it, and what it was made of."""
    if isinstance(example, Thumb):
        facts: list[Any] = ["thumb", example.desirable]
    else:
        facts = [example.origin, example.weight, example.noise]
    return [example.id, *facts, list(example.provenance)]


def _redeem(ticket: Any, known: Mapping[str, Example], *, held_out: bool) -> Example:
    key, *facts, provenance = ticket
    example = known.get(key)
    if example is None or not set(provenance) <= set(example.provenance):
        raise UnusableState("what it was trained on is no longer there")
    if facts != _ticket(example)[1:-1]:
        raise UnusableState("what was said of its pairs has changed")
    if example.held_out != held_out:
        raise UnusableState("another share of the prompts is held out now")
    return example
