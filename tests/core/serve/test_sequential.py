"""The tests of two rates: exact sums show that they hold, examples that they find something."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import comb, exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.serve.sequential import (
    BLOCK,
    Rate,
    e_value,
    lower_in_time,
    lower_together,
)

RATES = (0.0, 0.1, 0.35, 0.5, 0.8, 0.95, 1.0)
Votes = list[tuple[bool, bool]]


def binomial(n: int, p: float) -> list[float]:
    return [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize(("old", "new"), [(1, 1), (4, 9), (12, 5), (30, 3)])
def test_in_time_the_bet_on_what_is_not_lower_wins_nothing_on_average(
    old: int, new: int, margin: float
) -> None:
    table = {
        (i, j): exp(lower_in_time(Rate(i, old), Rate(j, new), margin=margin))
        for i, j in product(range(old + 1), range(new + 1))
    }
    for p, higher in product(RATES, (0.0, 0.05, 0.3)):
        q = min(1.0, max(0.0, p - margin) + higher)
        before, now = binomial(old, p), binomial(new, q)
        mean = sum(before[i] * now[j] * value for (i, j), value in table.items())
        assert mean <= 1 + 1e-9, (p, q)


@cache
def after_eight(liked: int, likes: int, votes: int) -> float:
    return lower_in_time(Rate(liked, 8), Rate(likes, votes))


@pytest.mark.parametrize("p", [0.3, 0.6, 0.8, 0.9])
def test_in_time_the_chance_of_ever_reaching_a_bound_is_that_of_the_bound(p: float) -> None:
    """Every path of 24 votes after 8 of the predecessor's, looked at after each vote."""
    alpha, false = 0.2, 0.0
    for i, weight in enumerate(binomial(8, p)):
        alive = {0: weight}
        for n in range(1, 25):
            after: dict[int, float] = {}
            for likes, share in alive.items():
                for liked, chance in ((1, p), (0, 1 - p)):
                    after[likes + liked] = after.get(likes + liked, 0.0) + share * chance
            alive = {
                likes: share
                for likes, share in after.items()
                if after_eight(i, likes, n) < -log(alpha)
            }
            false += sum(after.values()) - sum(alive.values())
    assert false <= alpha


ARMS = (True, False, False, True, True, False, False, True, False, True, False, False, True)
"""A block of 6 old and 5 new votes with its last vote at place 10, and two votes of the next."""


def outcomes(arms: tuple[bool, ...]) -> Iterator[Votes]:
    for likes in product((True, False), repeat=len(arms)):
        yield list(zip(arms, likes, strict=True))


@pytest.mark.parametrize("margin", [0.0, 0.07])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.8, 0.99])
@pytest.mark.parametrize("higher", [0.0, 0.2])
def test_together_the_bet_on_what_is_not_lower_wins_nothing_on_average(
    p: float, higher: float, margin: float
) -> None:
    arms = ARMS[:10]
    q = min(1.0, max(0.0, p - margin) + higher)
    chances = [(q if is_new else p) for is_new in arms]
    mean = 0.0
    for votes in outcomes(arms):
        chance = 1.0
        for (_, liked), each in zip(votes, chances, strict=True):
            chance *= each if liked else 1 - each
        mean += chance * exp(list(lower_together(votes, margin=margin))[-1])
    assert mean <= 1 + 1e-9


def test_together_a_second_block_at_another_rate_wins_nothing_either() -> None:
    """The mood may change between blocks: after whatever happened in the first one."""
    arms = (True, False) * BLOCK
    for first in ([True] * 10, [False] * 10, [True, False] * 5, [False, True] * 5):
        begun = list(zip(arms, first, strict=True))
        before = exp(list(lower_together(begun))[-1])
        for p in (0.1, 0.5, 0.8):
            mean = 0.0
            for votes in outcomes(arms):
                likes = sum(liked for _, liked in votes)
                chance = p**likes * (1 - p) ** (10 - likes)
                if chance:
                    mean += chance * exp(list(lower_together([*begun, *votes]))[-1])
            assert mean <= before * (1 + 1e-9)


@given(st.integers(1, 400), st.integers(1, 400), st.data())
def test_a_share_that_is_not_lower_is_no_evidence(old: int, new: int, data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, old)), data.draw(st.integers(0, new))
    margin = data.draw(st.sampled_from([0.0, 0.02, 0.3]))
    before, now = Rate(i, old), Rate(j, new)
    found = lower_in_time(before, now, margin=margin)
    if j / new >= i / old - margin:
        assert found <= 1e-9
    if j:
        assert lower_in_time(before, Rate(j - 1, new), margin=margin) >= found - 1e-9
    assert lower_in_time(before, now, margin=margin + 0.05) <= found + 1e-9


def test_no_votes_are_no_evidence() -> None:
    assert lower_in_time(Rate(0, 0), Rate(0, 50)) == 0
    assert lower_in_time(Rate(50, 50), Rate(0, 0)) == 0
    assert list(lower_together([])) == []
    assert set(lower_together([(True, False)] * 300)) == {0.0}, "nothing to compare with"


def test_a_clear_drop_is_found_in_time_and_no_gain_is_taken_for_one() -> None:
    before = Rate(1600, 2000)
    assert lower_in_time(before, Rate(140, 200)) > log(20)
    assert lower_in_time(before, Rate(180, 200)) < 0
    assert lower_in_time(before.disliked(), Rate(180, 200).disliked()) > log(20)
    assert lower_in_time(before, Rate(140, 200), margin=0.08) < log(20)


def test_a_small_drop_is_found_once_there_are_many_votes() -> None:
    """Of ten points by many votes, and of five by more than the predecessor has."""
    before = Rate(1600, 2000)
    assert lower_in_time(before, Rate(70_000, 100_000)) > log(20)
    assert lower_in_time(before, Rate(7_500, 10_000)) > log(20)
    assert lower_in_time(before, Rate(7_950, 10_000)) < 0


def test_few_votes_of_the_predecessor_are_less_evidence_than_many() -> None:
    few, many = (lower_in_time(Rate(8 * n, 10 * n), Rate(140, 200)) for n in (5, 200))
    assert few < log(20) < many


def test_a_bad_canary_is_found_and_the_order_within_a_block_does_not_matter() -> None:
    old, new = [(False, n % 5 > 0) for n in range(200)], [(True, n % 2 > 0) for n in range(200)]
    votes = [vote for pair in zip(old, new, strict=True) for vote in pair]
    swapped = [vote for pair in zip(new, old, strict=True) for vote in pair]
    found = list(lower_together(votes))
    assert len(found) == 400
    assert found[-1] > log(1000)
    assert list(lower_together(swapped))[-1] == pytest.approx(found[-1])
    assert list(lower_together((new, not liked) for new, liked in votes))[-1] < 0


def test_a_mood_that_falls_convinces_the_comparison_in_time_and_not_the_one_beside() -> None:
    """2,000 votes at .80, then 1,000 at .60, whichever revision answers."""
    votes = [(False, n % 5 > 0) for n in range(2000)]
    fallen = [(n % 2 == 0, n // 2 % 5 > 1) for n in range(1000)]
    before, now = Rate(1600, 2000), Rate(sum(liked for _, liked in fallen), 1000)
    assert lower_in_time(before, now) > log(20)
    assert max(lower_together([*votes, *fallen])) < log(20)


def test_an_e_value_is_finite() -> None:
    assert e_value(1e9) < float("inf")
    assert e_value(0) == 1
