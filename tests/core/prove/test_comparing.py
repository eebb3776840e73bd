"""Revisions compared on the same examples: intervals, differences and groups, without a model."""

from __future__ import annotations

import pytest

from agentpref.learn.encode import EncodedExample
from agentpref.prove.comparing import compare, difference, interval, proportion, short
from agentpref.types import Stratum


def row(example):
    return EncodedExample(example, (9,), ((1, 2), (3,)), (None, None))


def prompts(number):
    return [f"p{n}" for n in range(number)]


def compared(rows, scores, **changes):
    options = {"trained": [False] * len(rows), "by_age": False, "minimum": 3, "seed": 0}
    return compare(rows, scores, confidence=0.95, **{**options, **changes})


def test_an_interval_of_right_and_wrong_prompts_is_that_of_clopper_and_pearson() -> None:
    found = interval([1.0] * 8 + [0.0] * 2, prompts(10))
    assert (found.accuracy, found.method) == (0.8, "exact")
    # Tables of the binomial distribution: 8 of 10 at 95 %.
    assert (found.lower, found.upper) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert proportion(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)


def test_prompts_with_ties_or_several_examples_are_resampled() -> None:
    ties = interval([1.0, 0.5, 0.0, 1.0, 1.0] * 8, prompts(40))
    assert ties.method == "bootstrap"
    assert 0 < ties.lower < ties.accuracy < ties.upper < 1
    repeated = interval([1.0, 0.0] * 40, [f"p{n // 4}" for n in range(80)])
    assert repeated.method == "none", "all prompts are alike, so resampling shows nothing"
    apart = [float(n % 3 == 0) for n in range(80)]
    alone = interval(apart, prompts(80))
    together = interval(apart, [f"p{n // 8}" for n in range(80)])
    assert (alone.method, together.method) == ("exact", "bootstrap")


def test_the_base_is_right_about_half_and_has_no_interval() -> None:
    found = interval([0.5] * 20, prompts(20))
    assert (found.accuracy, found.lower, found.upper, found.method) == (0.5, None, None, "none")


def test_a_difference_counts_prompts_that_change_and_is_exact_at_any_number() -> None:
    five = difference("b", [1.0] * 5, "a", [0.0] * 5, prompts(5))
    assert (five.change, five.wins, five.losses) == (1.0, 5, 0)
    assert five.p == pytest.approx(2 * 0.5**5)
    assert five.finding == "not told apart"
    six = difference("b", [1.0] * 6, "a", [0.0] * 6, prompts(6))
    assert (six.p, six.finding) == (pytest.approx(2 * 0.5**6), "better")
    assert difference("a", [0.0] * 6, "b", [1.0] * 6, prompts(6)).finding == "worse"


def test_the_bounds_of_a_difference_enclose_it_and_turn_with_it() -> None:
    right, against = [1.0] * 20 + [0.0] * 10, [0.0] * 15 + [1.0] * 5 + [0.0] * 10
    found = difference("b", right, "a", against, prompts(30))
    assert (found.wins, found.losses) == (15, 0)
    assert 0 < found.lower < found.change < found.upper < 1
    back = difference("a", against, "b", right, prompts(30))
    assert (back.lower, back.upper) == pytest.approx((-found.upper, -found.lower))


def test_revisions_that_never_differ_are_not_told_apart() -> None:
    found = difference("b", [1.0, 0.0], "a", [1.0, 0.0], prompts(2))
    assert (found.change, found.p, found.finding) == (0.0, 1.0, "not told apart")
    assert found.lower < 0 < found.upper, "two prompts do not show that there is no difference"


def test_prompts_that_all_changed_alike_do_not_make_a_difference_certain() -> None:
    """It was +.50 to +.50, on 19 prompts."""
    found = difference("b", [1.0] * 19, "base", [0.5] * 19, prompts(19))
    assert (found.change, found.finding) == (0.5, "better")
    assert (found.lower, found.upper) == (pytest.approx(0.361, abs=1e-3), 0.5)
    several = [f"p{n // 2}" for n in range(38)]
    twice = difference("b", [1.0] * 38, "base", [0.5] * 38, several)
    assert (twice.lower, twice.upper) == (found.lower, found.upper), "the unit is the prompt"


def test_the_interval_is_two_sided_and_that_of_bonett_and_price() -> None:
    right, against = [1.0] * 227 + [0.0] * 33, [0.5] * 260
    found = difference("b", right, "base", against, prompts(260))
    assert (found.lower, found.upper) == pytest.approx((0.3296, 0.4109), abs=1e-4)


@pytest.mark.parametrize("size", [1.0, 0.5])
@pytest.mark.parametrize("total", [12, 40, 114])
def test_the_interval_excludes_no_difference_just_where_revisions_are_told_apart(
    total: int, size: float
) -> None:
    """Bounds of +.01 to +.16 stood beside p = .069, not told apart."""
    for up in range(total // 4):
        for down in range(total // 4):
            against = [0.0] * up + [size] * down + [0.0] * (total - up - down)
            right = [size] * up + [0.0] * down + [0.0] * (total - up - down)
            found = difference("b", right, "a", against, prompts(total))
            assert found.lower <= found.change <= found.upper
            told_apart = found.finding != "not told apart"
            assert (found.lower > 0 or found.upper < 0) is told_apart is (found.p < 0.05)


def test_many_small_gains_beside_few_large_losses_are_not_better() -> None:
    right, against = [0.6] * 30 + [0.0] * 10, [0.5] * 30 + [1.0] * 10
    found = difference("b", right, "a", against, prompts(40))
    assert (found.wins, found.losses, found.p < 0.05) == (30, 10, True)
    assert found.change < 0
    assert found.finding != "better"


def test_strata_are_judged_apart_and_small_ones_with_their_siblings(pair_of) -> None:
    rows = [row(pair_of(n, "yes", tag="ab"[n < 6])) for n in range(12)]
    scores = {"one": [1.0] * 6 + [0.0] * 6, "two": [1.0] * 12}
    everything, a, b = compared(rows, scores)
    assert [group.name for group in (everything, a, b)] == ["all", "a/comparison", "b/comparison"]
    assert everything.accuracy["one"].accuracy == 0.5
    assert (a.accuracy["one"].accuracy, b.accuracy["one"].accuracy) == (0.0, 1.0)
    (change,) = everything.differences
    assert (change.revision, change.against, change.wins) == ("two", "one", 6)
    assert {group.name for group in compared(rows, scores, minimum=50)} == {"all", "a", "b"}
    ages = {group.name for group in compared(rows, scores, by_age=True, minimum=2)}
    assert {"b/comparison/old", "a/comparison/new"} <= ages


def test_a_single_stratum_is_not_told_twice(pair_of) -> None:
    rows = [row(pair_of(n, "yes")) for n in range(4)]
    assert [group.name for group in compared(rows, {"one": [1.0] * 4})] == ["all"]


def test_examples_that_trained_a_revision_are_groups_of_their_own(pair_of) -> None:
    rows = [row(pair_of(n, "yes")) for n in range(10)]
    seen = [n < 4 for n in range(10)]
    clean, trained = compared(rows, {"one": [float(own) for own in seen]}, trained=seen)
    assert (clean.trained, clean.examples, clean.accuracy["one"].accuracy) == (False, 6, 0.0)
    assert (trained.trained, trained.examples, trained.accuracy["one"].accuracy) == (True, 4, 1.0)


def test_likes_and_dislikes_count_alike_and_thumbs_are_told_apart(pair_of, thumb_of) -> None:
    thumbs = [row(thumb_of(n, f"answer {n}", n < 8)) for n in range(100, 110)]
    thumbs += [row(thumb_of(n, f"answer {n}", n < 104)) for n in range(110, 112)]
    liked = [row(thumb_of(n, f"good {n}", True)) for n in range(200, 205)]
    rows = [*(row(pair_of(n, "yes")) for n in range(6)), *thumbs, *liked]
    everything, lone, *_ = compared(rows, {"one": [1.0] * len(rows)})
    assert (everything.name, everything.examples, everything.thumbs) == ("all", 16, 10)
    assert (lone.name, lone.examples, lone.prompts) == ("thumbs", 10, 10)


def test_thumbs_of_one_kind_make_no_group(thumb_of) -> None:
    rows = [row(thumb_of(n, f"{n}", True)) for n in range(6)]
    assert compared(rows, {"one": [1.0] * 6}) == []


def test_a_stratum_is_named_without_what_is_pooled() -> None:
    assert short(Stratum("home", "tone", "comparison", "old")) == "tone/comparison/old"
    assert short(Stratum("home", "tone", "any", "any")) == "tone"
