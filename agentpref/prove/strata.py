"""Which held-out pairs are judged together.

A stratum is namespace × tag × origin × age third. Cells too small to judge are pooled with their
siblings: first over ages, then over origins. Every pair stands in exactly one group, and a group
that is named finer than namespace/tag has at least the number of pairs asked for. Pure and
deterministic: knows nothing of policies, accuracies or the gate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from agentpref.learn.replay import equal_shares
from agentpref.types import Pair, Stratum

Age = Literal["old", "middle", "new"]

AGES: tuple[Age, Age, Age] = ("old", "middle", "new")
ANY = "any"


def age_third(created_at: Sequence[float]) -> tuple[Age, ...]:
    """Say of each time whether it lies in the old, middle or new third of their order.

    Equal times share a third (that of the earliest among them), so that the answer depends on
    the times alone and not on the order they come in.
    """
    ordered = sorted(created_at)
    return tuple(AGES[bisect_left(ordered, at) * 3 // len(ordered)] for at in created_at)


def stratify(pairs: Sequence[Pair]) -> tuple[Stratum, ...]:
    """File each pair under its stratum; thirds of age are over all the pairs given.

    Over all, and not within each tag: what was learned first is what is forgotten first, and a tag
    that came on one night is then one cell, not three.
    """
    ages = age_third([pair.created_at for pair in pairs])
    return tuple(
        Stratum(pair.namespace, pair.tag, pair.origin, age)
        for pair, age in zip(pairs, ages, strict=True)
    )


def coarsen(strata: Sequence[Stratum], minimum: int) -> tuple[Stratum, ...]:
    """Give each pair the group it is judged in, from the stratum it is filed under.

    Where any age of an origin has fewer than ``minimum`` pairs, that origin's ages are pooled;
    where any origin of a tag still has fewer, the whole tag is one group, whatever its size.
    Pooled fields read ``"any"``, and do mean any: siblings are pooled together or not at all.
    """
    ages_pooled = _pool(strata, [cell._replace(age=ANY) for cell in strata], minimum)
    return _pool(ages_pooled, [cell._replace(origin=ANY, age=ANY) for cell in strata], minimum)


def by_stratum(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by the name of their stratum, each in the given order."""
    groups: dict[str, list[Pair]] = {}
    for pair, stratum in zip(pairs, stratify(pairs), strict=True):
        groups.setdefault(str(stratum), []).append(pair)
    return groups


def sample(pairs: Sequence[Pair], size: int) -> list[Pair]:
    """Choose at most ``size`` pairs, as equally from every stratum as they allow, in their order.

    Of a stratum those with the lowest ids are taken, which are hashes: as a stratum grows, most of
    those chosen stay chosen, and what is known of them need not be found out again.
    """
    if len(pairs) <= size:
        return list(pairs)
    groups = by_stratum(pairs)
    shares = equal_shares({name: len(found) for name, found in groups.items()}, size)
    chosen = {
        pair_id
        for name, found in groups.items()
        for pair_id in sorted(pair.pair_id for pair in found)[: shares[name]]
    }
    return [pair for pair in pairs if pair.pair_id in chosen]


def _pool(
    groups: Sequence[Stratum], parents: Sequence[Stratum], minimum: int
) -> tuple[Stratum, ...]:
    """Replace each pair's group by its parent wherever any group of that parent is too small."""
    sizes = Counter(groups)
    short = {p for group, p in zip(groups, parents, strict=True) if sizes[group] < minimum}
    return tuple(p if p in short else group for group, p in zip(groups, parents, strict=True))
