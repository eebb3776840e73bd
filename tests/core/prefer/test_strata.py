"""Strata of examples, and how they are pooled, sampled and shared out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from agentpref.prefer.strata import (
    age_third,
    by_stratum,
    coarsen,
    equal_shares,
    sample,
    stratify,
)
from agentpref.types import Completion, Example, Origin, Prompt, Stratum

CELLS = st.lists(
    st.builds(
        Stratum,
        namespace=st.sampled_from(["n"]),
        tag=st.sampled_from(["t", "u"]),
        origin=st.sampled_from(["correction", "thumbs"]),
        age=st.sampled_from(["old", "middle", "new"]),
    ),
    max_size=60,
)


def pair(created_at: float, *, tag: str = "t", origin: Origin = "comparison") -> Example:
    yes = {"role": "assistant", "content": "yes"}
    prompt = Prompt(id="p", messages=({"role": "user", "content": "?"},))
    completions = (Completion(yes, 1.0), Completion(yes, 0.0))
    return Example("id", "n", created_at, prompt, completions, origin, tag)


def cells(origin: str, old: int, middle: int, new: int, *, tag: str = "t") -> list[Stratum]:
    sizes = {"old": old, "middle": middle, "new": new}
    return [Stratum("n", tag, origin, age) for age, size in sizes.items() for _ in range(size)]


def test_age_thirds_follow_the_order_of_times_and_not_their_distance() -> None:
    assert age_third([900.0, 1.0, 2.0, 3.0, 901.0, 4.0]) == (
        ("new", "old", "old", "middle", "new", "middle")
    )


def test_equal_times_are_in_one_third() -> None:
    assert age_third([5.0, 5.0, 5.0, 9.0]) == ("old", "old", "old", "new")
    assert age_third([]) == ()


@given(st.lists(st.integers(0, 20).map(float), max_size=40).flatmap(
    lambda times: st.tuples(st.just(times), st.permutations(times))
))  # fmt: skip
def test_the_age_of_a_time_does_not_depend_on_the_order_of_the_rows(
    case: tuple[list[float], list[float]],
) -> None:
    times, shuffled = case
    assert dict(zip(times, age_third(times), strict=True)) == dict(
        zip(shuffled, age_third(shuffled), strict=True)
    )


def test_a_stratum_is_namespace_tag_origin_and_age_over_all_examples() -> None:
    pairs = [pair(3.0, tag="u", origin="thumbs"), pair(1.0), pair(2.0)]
    assert stratify(pairs) == (
        Stratum("n", "u", "thumbs", "new"),
        Stratum("n", "t", "comparison", "old"),
        Stratum("n", "t", "comparison", "middle"),
    )


def test_strata_that_are_large_enough_are_not_pooled() -> None:
    filed = cells("thumbs", 5, 5, 5)
    assert coarsen(filed, 5) == tuple(filed)


def test_one_small_age_pools_the_ages_of_its_origin_only() -> None:
    filed = cells("thumbs", 5, 4, 5) + cells("correction", 5, 5, 5)
    assert Counter(coarsen(filed, 5)) == {
        Stratum("n", "t", "thumbs", "any"): 14,
        Stratum("n", "t", "correction", "old"): 5,
        Stratum("n", "t", "correction", "middle"): 5,
        Stratum("n", "t", "correction", "new"): 5,
    }


def test_one_small_origin_pools_its_tag_only() -> None:
    filed = cells("thumbs", 9, 9, 9) + cells("correction", 2, 2, 0)
    other = cells("thumbs", 6, 0, 0, tag="u")
    assert Counter(coarsen(filed + other, 5)) == {
        Stratum("n", "t", "any", "any"): 31,
        Stratum("n", "u", "thumbs", "old"): 6,
    }


def test_a_small_tag_is_one_group() -> None:
    assert coarsen(cells("thumbs", 1, 0, 0), 5) == (Stratum("n", "t", "any", "any"),)


@given(CELLS, st.integers(1, 12))
def test_every_example_is_in_one_group_that_is_large_or_a_whole_tag(
    filed: list[Stratum], minimum: int
) -> None:
    groups = coarsen(filed, minimum)
    assert len(groups) == len(filed)
    for group, size in Counter(groups).items():
        assert size >= minimum or (group.origin, group.age) == ("any", "any")
    for cell, group in zip(filed, groups, strict=True):
        assert all(g in (c, "any") for c, g in zip(cell, group, strict=True))


@given(CELLS, st.integers(1, 12))
def test_a_pooled_group_has_all_its_siblings(filed: list[Stratum], minimum: int) -> None:
    groups = coarsen(filed, minimum)
    for pooled in set(groups):
        named = [i for i, field in enumerate(pooled) if field != "any"]
        for cell, group in zip(filed, groups, strict=True):
            if all(cell[i] == pooled[i] for i in named):
                assert group == pooled


def named(number: int, tag: str = "t") -> Example:
    example_id = blake2b(str(number).encode(), digest_size=16).hexdigest()
    return replace(pair(float(number), tag=tag), example_id=example_id)


@given(st.lists(st.sampled_from("tuv"), max_size=60), st.integers(1, 40))
def test_a_sample_has_the_size_asked_for_and_keeps_the_order(tags: list[str], size: int) -> None:
    pairs = [named(number, tag) for number, tag in enumerate(tags)]
    chosen = sample(pairs, size)
    assert len(chosen) == min(size, len(pairs))
    assert chosen == [pair for pair in pairs if pair in chosen]


def test_a_sample_takes_equally_of_every_stratum() -> None:
    pairs = [named(number, "tu"[number >= 90]) for number in range(100)]
    chosen = sample(pairs, 20)
    sizes = [len(found) for found in by_stratum(pairs).values()]
    assert sorted(sizes) == [10, 23, 33, 34]  # u is all new; t is of every age
    tags = Counter(pair.tag for pair in chosen)
    assert tags == {"t": 15, "u": 5}


def test_most_of_a_sample_stays_when_examples_are_added() -> None:
    """Scores of the live revision from earlier updates are cached and used again."""
    updates = [sample([named(n) for n in range(size)], 300) for size in (3000, 3300)]
    kept = {pair.example_id for pair in updates[0]} & {pair.example_id for pair in updates[1]}
    assert len(kept) > 200
    chance = 300 * 300 / 3300
    assert len(kept) > 7 * chance


def test_lone_thumbs_have_their_own_strata() -> None:
    pairs = [pair(1.0, origin="thumbs")] * 3
    one = pairs[0].completions[:1]
    lone = replace(pair(9.0, origin="thumb"), example_id="lone", completions=one)
    filed = stratify([*pairs, lone])
    assert filed[-1] == Stratum("n", "t", "thumb", "new")
    assert {stratum.origin for stratum in filed[:-1]} == {"thumbs"}
    assert lone in sample([*pairs, lone], 2), "every stratum gives an equal share"


sizes = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 60), max_size=6)


@given(sizes, st.integers(0, 200))
def test_shares_add_up_to_the_size_or_to_all_there_is(available: dict[str, int], size: int) -> None:
    shares = equal_shares(available, size)
    assert all(shares[name] <= available[name] for name in available)
    assert sum(shares.values()) == min(size, sum(available.values()))


@given(sizes, st.integers(0, 200))
def test_shares_are_as_equal_as_strata_allow(available: dict[str, int], size: int) -> None:
    shares = equal_shares(available, size)
    unfilled = [n for name, n in shares.items() if n < available[name]]
    assert not unfilled or max(shares.values()) - min(unfilled) <= 1
