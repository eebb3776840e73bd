"""Which held-out pairs and thumbs are judged together.

A stratum is namespace × tag × origin × age third; the origin of a lone thumb is ``"thumb"``. Cells
too small to judge are pooled with their siblings: first over ages, then over origins. Every example
stands in exactly one group, and a group that is named finer than namespace/tag has at least the
number of examples asked for. Pure and deterministic: knows nothing of policies, accuracies or the
gate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from agentpref.types import Example, Pair, Stratum, Thumb

E = TypeVar("E", Pair, Thumb, Example)

Age = Literal["old", "middle", "new"]

AGES: tuple[Age, Age, Age] = ("old", "middle", "new")
ANY = "any"
LONE = "thumb"
"""The origin of lone thumbs; ``"thumbs"`` is that of pairs of them."""


def age_third(created_at: Sequence[float]) -> tuple[Age, ...]:
    """Say of each time whether it lies in the old, middle or new third of their order.

    Equal times share a third (that of the earliest among them), so that the answer depends on
    the times alone and not on the order they come in.
    """
    ordered = sorted(created_at)
    return tuple(AGES[bisect_left(ordered, at) * 3 // len(ordered)] for at in created_at)


def stratify(examples: Sequence[Example]) -> tuple[Stratum, ...]:
    """File each example under its stratum; thirds of age are over all the examples given.

    Over all, and not within each tag: what was learned first is what is forgotten first, and a tag
    that came on one night is then one cell, not three.
    """
    ages = age_third([example.created_at for example in examples])
    return tuple(
        Stratum(example.namespace, example.tag, _origin(example), age)
        for example, age in zip(examples, ages, strict=True)
    )


def _origin(example: Example) -> str:
    return LONE if isinstance(example, Thumb) else example.origin


def coarsen(strata: Sequence[Stratum], minimum: int) -> tuple[Stratum, ...]:
    """Give each pair the group it is judged in, from the stratum it is filed under.

    Where any age of an origin has fewer than ``minimum`` pairs, that origin's ages are pooled;
    where any origin of a tag still has fewer, the whole tag is one group, whatever its size.
    Pooled fields read ``"any"``, and do mean any: siblings are pooled together or not at all.
    """
    ages_pooled = _pool(strata, [cell._replace(age=ANY) for cell in strata], minimum)
    return _pool(ages_pooled, [cell._replace(origin=ANY, age=ANY) for cell in strata], minimum)


def by_stratum(examples: Sequence[E]) -> dict[str, list[E]]:
    """Examples by the name of their stratum, each in the given order."""
    groups: dict[str, list[E]] = {}
    for example, stratum in zip(examples, stratify(examples), strict=True):
        groups.setdefault(str(stratum), []).append(example)
    return groups


def sample(examples: Sequence[Example], size: int) -> list[Example]:
    """Choose at most ``size`` examples, as equally from every stratum as they allow, in order.

    Of a stratum those with the lowest ids are taken, which are hashes: as a stratum grows, most of
    those chosen stay chosen, and what is known of them need not be found out again.
    """
    if len(examples) <= size:
        return list(examples)
    groups = by_stratum(examples)
    shares = equal_shares({name: len(found) for name, found in groups.items()}, size)
    chosen = {
        key
        for name, found in groups.items()
        for key in sorted(example.id for example in found)[: shares[name]]
    }
    return [example for example in examples if example.id in chosen]


def equal_shares(available: Mapping[str, int], size: int) -> dict[str, int]:
    """Split ``size`` equally, passing on what small strata cannot fill; never more than there is.

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
    """Replace each pair's group by its parent wherever any group of that parent is too small."""
    sizes = Counter(groups)
    short = {p for group, p in zip(groups, parents, strict=True) if sizes[group] < minimum}
    return tuple(p if p in short else group for group, p in zip(groups, parents, strict=True))
