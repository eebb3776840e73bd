"""Groups examples into the strata that are sampled, judged and protected separately.

A stratum is namespace × tag × origin × age third. Strata too small to judge are pooled with their
siblings: first over ages, then over origins. Every example is in exactly one group.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

from agentpref.types import Origin, Stratum

Age = Literal["old", "middle", "new"]


class Listed(Protocol):
    """What is known of an example, or of its entry in a list, to choose it without reading it."""

    @property
    def example_id(self) -> str: ...  # noqa: D102
    @property
    def namespace(self) -> str: ...  # noqa: D102
    @property
    def created_at(self) -> float: ...  # noqa: D102
    @property
    def origin(self) -> Origin: ...  # noqa: D102
    @property
    def tag(self) -> str: ...  # noqa: D102
    @property
    def held_out(self) -> bool: ...  # noqa: D102
    @property
    def lone(self) -> bool: ...  # noqa: D102


L = TypeVar("L", bound=Listed)

AGES: tuple[Age, Age, Age] = ("old", "middle", "new")
ANY = "any"


def age_third(created_at: Sequence[float]) -> tuple[Age, ...]:
    """Say of each time whether it lies in the old, middle or new third of their order.

    Equal times share a third (that of the earliest among them), so the answer depends on the times
    alone and not on the order they come in.
    """
    ordered = sorted(created_at)
    return tuple(AGES[bisect_left(ordered, at) * 3 // len(ordered)] for at in created_at)


def stratify(examples: Sequence[Listed]) -> tuple[Stratum, ...]:
    """The stratum of each example; thirds of age are over all the examples given.

    They are not taken within each tag: what was learned first is forgotten first, and a tag that
    one update brought is then one stratum, not three.
    """
    ages = age_third([example.created_at for example in examples])
    return tuple(
        Stratum(example.namespace, example.tag, example.origin, age)
        for example, age in zip(examples, ages, strict=True)
    )


def coarsen(strata: Sequence[Stratum], minimum: int) -> tuple[Stratum, ...]:
    """The group that each example is judged in, given the stratum of each.

    Where any age of an origin has fewer than ``minimum`` examples, that origin's ages are pooled.
    Where any origin of a tag still has fewer, the whole tag is one group, whatever its size. Pooled
    fields read ``"any"``; siblings are pooled together or not at all.
    """
    ages_pooled = _pool(strata, [cell._replace(age=ANY) for cell in strata], minimum)
    return _pool(ages_pooled, [cell._replace(origin=ANY, age=ANY) for cell in strata], minimum)


def by_stratum(examples: Sequence[L]) -> dict[str, list[L]]:
    """Examples by the name of their stratum, each in the given order."""
    groups: dict[tuple[str, ...], list[L]] = {}
    ages = age_third([example.created_at for example in examples])
    for one, age in zip(examples, ages, strict=True):
        groups.setdefault((one.namespace, one.tag, one.origin, age), []).append(one)
    return {str(Stratum(*key)): found for key, found in groups.items()}


def sample(examples: Sequence[L], size: int) -> list[L]:
    """Choose at most ``size`` examples in their order, as equally from every stratum as possible.

    Each stratum gives the examples with the lowest ids, which are hashes: as a stratum grows, most
    of those chosen stay chosen, and their cached scores are used again.
    """
    if len(examples) <= size:
        return list(examples)
    groups = by_stratum(examples)
    shares = equal_shares({name: len(found) for name, found in groups.items()}, size)
    chosen = {
        example_id
        for name, found in groups.items()
        for example_id in sorted(example.example_id for example in found)[: shares[name]]
    }
    return [example for example in examples if example.example_id in chosen]


def equal_shares(available: Mapping[str, int], size: int) -> dict[str, int]:
    """Split ``size`` equally; what a small stratum cannot fill goes to the others.

    >>> equal_shares({"a": 2, "b": 50, "c": 50}, 30)
    {'a': 2, 'b': 14, 'c': 14}
    """
    shares: dict[str, int] = {}
    left = size
    for place, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[name] = min(available[name], left // (len(available) - place))
        left -= shares[name]
    return shares


def _pool(
    groups: Sequence[Stratum], parents: Sequence[Stratum], minimum: int
) -> tuple[Stratum, ...]:
    """Replace each example's group by its parent where any group of that parent is too small."""
    sizes = Counter(groups)
    short = {p for group, p in zip(groups, parents, strict=True) if sizes[group] < minimum}
    return tuple(p if p in short else group for group, p in zip(groups, parents, strict=True))
