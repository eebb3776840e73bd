from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from agentpref.prefer.strata import age_third, by_stratum, coarsen, sample, stratify
from agentpref.types import Origin, Pair, Prompt, Stratum, Thumb

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


def pair(created_at: float, *, tag: str = "t", origin: Origin = "comparison") -> Pair:
    said = {"role": "assistant", "content": "yes"}
    prompt = Prompt(id="p", messages=({"role": "user", "content": "?"},))
    return Pair("id", "n", created_at, prompt, said, said, origin, tag)


def cells(origin: str, old: int, middle: int, new: int, *, tag: str = "t") -> list[Stratum]:
    sizes = {"old": old, "middle": middle, "new": new}
    return [Stratum("n", tag, origin, age) for age, size in sizes.items() for _ in range(size)]


def test_age_thirds_follow_the_order_and_not_the_spacing() -> None:
    assert age_third([900.0, 1.0, 2.0, 3.0, 901.0, 4.0]) == (
        ("new", "old", "old", "middle", "new", "middle")
    )


def test_equal_times_share_a_third() -> None:
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


def test_pairs_are_filed_by_namespace_tag_origin_and_age_over_all() -> None:
    pairs = [pair(3.0, tag="u", origin="thumbs"), pair(1.0), pair(2.0)]
    assert stratify(pairs) == (
        Stratum("n", "u", "thumbs", "new"),
        Stratum("n", "t", "comparison", "old"),
        Stratum("n", "t", "comparison", "middle"),
    )


def test_cells_that_are_large_enough_stay_as_they_are() -> None:
    filed = cells("thumbs", 5, 5, 5)
    assert coarsen(filed, 5) == tuple(filed)


def test_one_small_age_pools_the_ages_of_its_origin_alone() -> None:
    filed = cells("thumbs", 5, 4, 5) + cells("correction", 5, 5, 5)
    assert Counter(coarsen(filed, 5)) == {
        Stratum("n", "t", "thumbs", "any"): 14,
        Stratum("n", "t", "correction", "old"): 5,
        Stratum("n", "t", "correction", "middle"): 5,
        Stratum("n", "t", "correction", "new"): 5,
    }


def test_one_small_origin_pools_its_tag_alone() -> None:
    filed = cells("thumbs", 9, 9, 9) + cells("correction", 2, 2, 0)
    other = cells("thumbs", 6, 0, 0, tag="u")
    assert Counter(coarsen(filed + other, 5)) == {
        Stratum("n", "t", "any", "any"): 31,
        Stratum("n", "u", "thumbs", "old"): 6,
    }


def test_a_small_tag_is_kept_whatever_its_size() -> None:
    assert coarsen(cells("thumbs", 1, 0, 0), 5) == (Stratum("n", "t", "any", "any"),)


@given(CELLS, st.integers(1, 12))
def test_every_pair_is_in_one_group_that_is_large_or_a_whole_tag(
    filed: list[Stratum], minimum: int
) -> None:
    groups = coarsen(filed, minimum)
    assert len(groups) == len(filed)
    for group, size in Counter(groups).items():
        assert size >= minimum or (group.origin, group.age) == ("any", "any")
    for cell, group in zip(filed, groups, strict=True):
        assert all(g in (c, "any") for c, g in zip(cell, group, strict=True))


@given(CELLS, st.integers(1, 12))
def test_a_group_named_any_holds_all_its_siblings(filed: list[Stratum], minimum: int) -> None:
    groups = coarsen(filed, minimum)
    for pooled in set(groups):
        named = [i for i, field in enumerate(pooled) if field != "any"]
        for cell, group in zip(filed, groups, strict=True):
            if all(cell[i] == pooled[i] for i in named):
                assert group == pooled


def named(number: int, tag: str = "t") -> Pair:
    pair_id = blake2b(str(number).encode(), digest_size=16).hexdigest()
    return replace(pair(float(number), tag=tag), pair_id=pair_id)


@given(st.lists(st.sampled_from("tuv"), max_size=60), st.integers(1, 40))
def test_a_sample_is_as_large_as_it_may_be_and_in_order(tags: list[str], size: int) -> None:
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


def test_most_of_a_sample_stays_as_the_pairs_grow() -> None:
    """What live scored on earlier nights is known, and need not be scored again."""
    nights = [sample([named(n) for n in range(size)], 300) for size in (3000, 3300)]
    kept = {pair.pair_id for pair in nights[0]} & {pair.pair_id for pair in nights[1]}
    assert len(kept) > 200
    chance = 300 * 300 / 3300
    assert len(kept) > 7 * chance


def test_lone_thumbs_have_strata_of_their_own() -> None:
    pairs = [pair(1.0, origin="thumbs")] * 3
    lone = Thumb("r", "n", 9.0, pairs[0].prompt, pairs[0].chosen, True, "t", thumb_id="lone")
    filed = stratify([*pairs, lone])
    assert filed[-1] == Stratum("n", "t", "thumb", "new")
    assert {stratum.origin for stratum in filed[:-1]} == {"thumbs"}
    assert lone in sample([*pairs, lone], 2), "strata share alike"
