"""Whether people changed their minds: exact tests on the order of judgements."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from agentpref.prove.drift import Judged, by_prompt, contradiction, fall, more_than_chance

LEVEL = 0.05


def judged(right, start=0.0):
    return [Judged(start + place, bool(one)) for place, one in enumerate(right)]


def mostly(share, n, seed=0):
    return [random.Random(seed * 1000 + place).random() < share for place in range(n)]


@pytest.mark.parametrize("right", ["1111000100", "10110100", "1010101", "11100"])
def test_the_p_value_of_a_fall_is_the_share_of_all_orders_that_fall_as_far(right):
    found = fall([one == "1" for one in right])
    n, ones = len(right), right.count("1")
    orders = [[place in where for place in range(n)] for where in combinations(range(n), ones)]
    statistics = [point.statistic if (point := fall(order)) else 0.0 for order in orders]
    share = sum(one >= found.statistic - 1e-9 for one in statistics) / len(orders)
    assert found.p_value == pytest.approx(share)


@pytest.mark.parametrize("right", ["", "1", "0011", "1111", "0000", "0101011"])
def test_a_rate_that_rises_or_stays_falls_nowhere_for_certain(right):
    found = fall([one == "1" for one in right])
    assert found is None or found.p_value > LEVEL


def test_the_fall_is_found_where_it_is():
    assert fall([True] * 20 + [False] * 20).place == 20
    assert fall([True] * 20 + [False] * 20).p_value < 1e-9


def test_new_judgements_that_contradict_old_ones_are_a_change():
    new = judged([1, *[0] * 9, 1, *[0] * 9], start=100.0)
    found = contradiction(judged([*[1] * 18, 0, 0]), new, level=LEVEL)
    assert found[:6] == ("changed", 20, 18, 20, 18, False)
    assert found.p_value < LEVEL
    assert found.since == 18.0, "the last two old ones are like the new"


def test_a_preference_that_live_never_learned_changes_too():
    """It agrees with the new judgements, and the old ones in between contradict both."""
    found = contradiction(judged([0] * 15 + [1] * 3), judged([1] * 20, 100.0), level=LEVEL)
    assert found[:6] == ("changed", 20, 20, 18, 15, True)


def test_a_few_contradictions_are_undecided():
    found = contradiction(judged([1] * 20), judged([0, 0, 1, 0], 100.0), level=LEVEL)
    assert found.state == "undecided"
    assert found.p_value > LEVEL


def test_people_who_disagree_by_a_little_are_undecided_however_many_they_are():
    new = judged([place % 5 < 2 for place in range(400)], 1000.0)  # three in five contradict
    found = contradiction(judged([1] * 100), new, level=LEVEL)
    assert (found.state, found.contradicting) == ("undecided", 240)
    assert found.p_value < LEVEL


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([1] * 20, [1] * 20),  # they agree
        ([1, 0] * 10, [0] * 20),  # nobody knows on which side the old ones are
        ([0] * 20, [0] * 20),
        ([], [0] * 20),
        ([1] * 20, []),
    ],
)
def test_without_a_contradiction_there_is_nothing_to_say(old, new):
    assert contradiction(judged(old), judged(new, 100.0), level=LEVEL) is None


def test_judgements_that_are_older_than_those_they_contradict_change_nothing():
    """As in a file that was imported late."""
    found = contradiction(judged([1] * 20, 100.0), judged([0] * 20), level=LEVEL)
    assert found is None or found.state == "undecided"


def test_labels_thrown_by_a_coin_are_hardly_ever_a_change():
    def changed(seed):
        new = judged(mostly(0.5, 40, seed), 1000.0)
        found = contradiction(judged(mostly(0.9, 40, seed + 500)), new, level=LEVEL)
        return found is not None and found.state == "changed"

    assert sum(map(changed, range(300))) / 300 <= LEVEL


def test_a_prompt_counts_once_and_not_where_it_is_even():
    values = [("a", 1.0, 1.0), ("a", 3.0, 0.0), ("b", 2.0, 1.0), ("b", 5.0, 1.0), ("c", 0.0, 0.0)]
    assert by_prompt(values) == [Judged(0.0, False), Judged(5.0, True)]


def test_the_exact_test_against_chance():
    assert more_than_chance(5, 5) == pytest.approx(1 / 32)
    assert more_than_chance(0, 0) == 1.0
