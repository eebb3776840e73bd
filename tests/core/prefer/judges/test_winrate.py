"""Win rates free of a judge's errors: known truths are covered, and nothing is made up."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import MissingDependency
from agentpref.prefer.judges.calibration import Estimate, GoldVerdict
from agentpref.prefer.judges.winrate import (
    WinRate,
    corrected_win_rate,
    length_controlled_win_rate,
    ratings,
)

scores = st.lists(st.sampled_from((0.0, 0.5, 1.0)), min_size=1, max_size=40)
winners = st.sampled_from(("a", "b", "tie"))
gold_verdicts = st.builds(
    GoldVerdict, st.just("x"), st.just("a"), winners, winners, st.sampled_from(("a", "b", None))
)


def gold(longer: tuple[int, int], shorter: tuple[int, int]) -> list[GoldVerdict]:
    """Right and wrong verdicts where the longer, and where the shorter answer is better."""
    found = []
    for counts, length in ((longer, "a"), (shorter, "b")):
        for said, count in zip(("a", "b"), counts, strict=True):
            found += [GoldVerdict("x", "a", said, said, length)] * count  # type: ignore[arg-type]
    return found


def biased(seed: int, truth: float, *, n: int = 400, labels: int = 60) -> WinRate:
    """A judge right in 90 % where the longer answer is better, in 60 % else, with 10 % ties.

    The first policy's answer is the longer one in 80 % of the pairs.
    """
    rng = random.Random(seed)

    def score(longer_is_better: bool) -> float:
        if rng.random() < 0.1:
            return 0.5
        return float(rng.random() < (0.9 if longer_is_better else 0.6))

    said, longer, known = [], [], []
    for _ in range(n):
        wins, is_longer = rng.random() < truth, rng.random() < 0.8
        right = score(wins == is_longer)
        said.append(right if wins else 1 - right)
        longer.append(is_longer)
    for _ in range(labels):
        length = rng.choice("ab")
        winner = {0.0: "b", 0.5: "tie", 1.0: "a"}[score(length == "a")]
        known.append(GoldVerdict("x", "a", winner, winner, length))  # type: ignore[arg-type]
    return corrected_win_rate(said, longer, known)


@pytest.mark.parametrize("truth", [0.3, 0.5])
def test_the_truth_is_covered_where_the_raw_interval_misses_it(truth: float) -> None:
    found = [biased(seed, truth) for seed in range(250)]
    raw = sum(one.raw.low <= truth <= one.raw.high for one in found if one.raw)
    told = [one.corrected for one in found if one.corrected]
    assert raw / 250 < 0.5
    assert len(told) >= 230
    assert sum(one.low <= truth <= one.high for one in told) / len(told) >= 0.93
    assert sum(one.value for one in told) / len(told) == pytest.approx(truth, abs=0.03)


def test_the_corrected_rate_is_that_of_the_equation_by_hand() -> None:
    # q1 = .9, q0 = .7, p = .6, all first answers longer: (.6 + .7 - 1) / (.7 + .9 - 1) = .5.
    found = corrected_win_rate([1.0] * 60 + [0.0] * 40, [True] * 100, gold((90, 10), (70, 30)))
    assert found.corrected is not None
    assert found.corrected.value == pytest.approx(0.5)
    # All shorter: (.6 + .9 - 1) / .6; half of each, or no length known: (.6 + .8 - 1) / .6.
    for longer, by_hand in (([False], 0.5 / 0.6), ([True, False], 0.4 / 0.6), ([None], 0.4 / 0.6)):
        found = corrected_win_rate(
            [1.0] * 60 + [0.0] * 40, longer * (100 // len(longer)), gold((90, 10), (70, 30))
        )
        assert found.corrected is not None
        assert found.corrected.value == pytest.approx(by_hand)


def test_ties_are_corrected_as_scores_of_a_half() -> None:
    # Half of all verdicts are ties and the rest are right, so q = .75, and .6 comes from .7.
    tie = [GoldVerdict("x", "a", "tie", "tie", longer) for longer in ("a", "b")]  # type: ignore[arg-type]
    said = [0.5] * 50 + [1.0] * 35 + [0.0] * 15
    found = corrected_win_rate(said, [None] * 100, [*gold((20, 0), (20, 0)), *tie * 20])
    assert found.raw is not None
    assert found.raw.value == pytest.approx(0.6)
    assert found.corrected is not None
    assert found.corrected.value == pytest.approx(0.7)


def test_a_judge_without_errors_leaves_the_rate_as_it_is() -> None:
    found = corrected_win_rate([1.0] * 30 + [0.0] * 70, [None] * 100, gold((500, 0), (500, 0)))
    assert found.corrected is not None
    assert found.raw is not None
    assert found.corrected == pytest.approx(found.raw, abs=0.01)


def test_less_gold_makes_a_wider_interval() -> None:
    wide = []
    for labels in (10, 100, 1_000):
        known = gold((labels, labels // 10), (labels, labels // 10))
        found = corrected_win_rate([1.0, 0.0] * 200, [None] * 400, known)
        assert found.corrected is not None
        wide.append(found.corrected.high - found.corrected.low)
    assert wide == sorted(wide, reverse=True)


@pytest.mark.parametrize(
    "known", [gold((10, 10), (10, 10)), gold((1, 0), (0, 0)), gold((0, 20), (0, 20))]
)
def test_a_judge_that_may_be_a_coin_gets_no_corrected_rate_but_the_reason(
    known: list[GoldVerdict],
) -> None:
    found = corrected_win_rate([1.0, 1.0, 0.0], [True, False, None], known)
    assert found.corrected is None
    assert "better than a coin" in found.why
    assert found.raw is not None


def test_nothing_to_correct_and_nothing_to_correct_with_are_told() -> None:
    assert corrected_win_rate([], [], gold((9, 1), (9, 1))).why == "there are no pairs"
    assert "no gold" in corrected_win_rate([1.0], [True], []).why


def test_gold_that_is_not_like_the_pairs_is_told() -> None:
    found = corrected_win_rate([1.0] * 2_000, [None] * 2_000, gold((76, 4), (76, 4)))
    assert found.corrected is None
    assert "not like these pairs" in found.why


def test_all_wins_leave_room_for_a_loss() -> None:
    found = corrected_win_rate([1.0] * 20, [None] * 20, gold((200, 0), (200, 0)))
    assert found.corrected is not None
    assert found.corrected.value == 1
    assert 0.7 < found.corrected.low < 0.95


def test_gold_on_one_side_only_is_pooled_and_that_is_told() -> None:
    found = corrected_win_rate([1.0, 0.0, 1.0] * 30, [True] * 90, gold((36, 4), (0, 0)))
    assert found.corrected is not None
    assert not found.separately
    assert "length is not corrected" in found.why
    assert found.corrected.value == pytest.approx((2 / 3 + 0.9 - 1) / 0.8)


@given(scores, st.lists(gold_verdicts, max_size=40), st.data())
def test_the_rates_of_both_policies_add_up_to_one(
    said: list[float], known: list[GoldVerdict], data: Any
) -> None:
    size = len(said)
    longer = data.draw(st.lists(st.sampled_from((True, False, None)), min_size=size, max_size=size))
    one = corrected_win_rate(said, longer, known)
    other = corrected_win_rate(
        [1 - score for score in said], [None if it is None else not it for it in longer], known
    )
    for mine, theirs in ((one.raw, other.raw), (one.corrected, other.corrected)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert theirs == pytest.approx(Estimate(1 - mine.value, 1 - mine.high, 1 - mine.low))
            assert 0 <= mine.low <= mine.value <= mine.high <= 1


def test_the_length_controlled_rate_covers_what_equal_lengths_would_give() -> None:
    truth, covered, raw = 1 / (1 + math.exp(0.4)), 0, 0
    for seed in range(400):
        rng = random.Random(seed)
        differences = [rng.gauss(100, 200) for _ in range(300)]
        mean = sum(differences) / 300
        wide = math.sqrt(sum((one - mean) ** 2 for one in differences) / 299)
        odds = [-0.4 + 1.5 * math.tanh(one / wide) for one in differences]
        said = [float(rng.random() < 1 / (1 + math.exp(-one))) for one in odds]
        found = length_controlled_win_rate(said, differences)
        assert found.controlled is not None
        assert found.raw is not None
        covered += found.controlled.low <= truth <= found.controlled.high
        raw += found.raw.low <= truth <= found.raw.high
    assert covered / 400 >= 0.93
    assert raw / 400 < 0.5


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    found = length_controlled_win_rate([1.0] * 140 + [0.0] * 60, [7] * 200)
    assert found.slope == pytest.approx(0, abs=1e-6)
    assert found.controlled is not None
    assert found.controlled.value == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize(
    ("said", "differences"),
    [
        ([1.0] * 50, [0.0] * 50),
        ([0.0] * 50, [*range(50)]),
        ([1.0, 0.0] * 9, [3.0, -3.0] * 9),
        ([1.0], [5.0]),
    ],
)
def test_degenerate_comparisons_have_a_finite_rate_with_an_interval(
    said: list[float], differences: list[float]
) -> None:
    found = length_controlled_win_rate(said, differences)
    assert found.controlled is not None
    assert 0 < found.controlled.low < found.controlled.value < found.controlled.high < 1
    assert found.slope is not None
    assert math.isfinite(found.slope)


def test_no_comparisons_have_no_length_controlled_rate() -> None:
    assert length_controlled_win_rate([], []) == (0, None, None, None)


@given(scores, st.data())
def test_the_length_controlled_rates_of_both_policies_add_up_to_one(
    said: list[float], data: Any
) -> None:
    numbers = st.integers(-500, 500)
    differences = data.draw(st.lists(numbers, min_size=len(said), max_size=len(said)))
    one = length_controlled_win_rate(said, differences).controlled
    other = length_controlled_win_rate([1 - score for score in said], [-it for it in differences])
    assert one is not None
    assert other.controlled is not None
    assert one.value + other.controlled.value == pytest.approx(1, abs=1e-4)


def test_ratings_are_those_that_the_comparisons_were_drawn_from() -> None:
    rng, truth = random.Random(0), {"new": 4.0, "old": 1.0, "base": 0.25}
    drawn = []
    for _ in range(6_000):
        a, b = rng.sample(list(truth), 2)
        drawn.append((a, b, "a" if rng.random() < truth[a] / (truth[a] + truth[b]) else "b"))
    found = ratings(drawn)  # type: ignore[arg-type]
    assert list(found) == ["new", "old", "base"]
    assert found == pytest.approx(truth, rel=0.12)


def test_ratings_are_finite_where_one_policy_never_lost() -> None:
    found = ratings([("new", "old", "a")] * 10)
    assert found["new"] > found["old"] > 0
    assert math.isfinite(found["new"])


def test_no_policies_and_one_have_ratings_too() -> None:
    assert ratings([]) == {}
    assert ratings([("new", "new", "tie")]) == {"new": 1.0}


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "evalica", None)
    with pytest.raises(MissingDependency, match=r"pip install 'agentpref\[judge\]'"):
        ratings([("new", "old", "a")])
