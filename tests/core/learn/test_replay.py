"""What is replayed: equal shares, no repetition, the hard ones among them, a bounded cost."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import ReplaySettings
from agentpref.learn.replay import draw, equal_shares, replay_size

sizes = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 60), max_size=6)


@given(sizes, st.integers(0, 200))
def test_shares_are_within_reach_and_exhaust_the_size(available, size):
    shares = equal_shares(available, size)
    assert all(shares[name] <= available[name] for name in available)
    assert sum(shares.values()) == min(size, sum(available.values()))


@given(sizes, st.integers(0, 200))
def test_shares_are_as_equal_as_can_be(available, size):
    shares = equal_shares(available, size)
    unfilled = [n for name, n in shares.items() if n < available[name]]
    assert not unfilled or max(shares.values()) - min(unfilled) <= 1


def test_replay_size_follows_the_night():
    settings = ReplaySettings(minimum=128)
    assert [replay_size(n, settings) for n in (10, 400, 1000, 4000)] == [128, 400, 1000, 2000]
    assert replay_size(400, ReplaySettings(minimum=0)) == 0


def rows(**counts):
    return {name: [(name, i) for i in range(n)] for name, n in counts.items()}


def by_number(pool):
    return [float(number) for _, number in pool]


def test_draw_is_without_repetition_and_repeatable():
    once, again = (
        draw(rows(a=50, b=3), 20, hard_share=0.3, hardness=by_number, rng=random.Random(1))
        for _ in range(2)
    )
    assert once == again
    assert len(set(once)) == len(once) == 20
    assert {row for row in once if row[0] == "b"} == {("b", 0), ("b", 1), ("b", 2)}


def test_hard_rows_are_preferred():
    drawn = draw(rows(a=300), 100, hard_share=1.0, hardness=by_number, rng=random.Random(0))
    assert sum(number for _, number in drawn) / 100 > 180  # the mean of a uniform draw is 149.5


def test_hardness_is_asked_of_a_bounded_pool():
    asked = []

    def spy(pool):
        asked.append(len(pool))
        return by_number(pool)

    draw(rows(a=10_000), 100, hard_share=0.3, hardness=spy, rng=random.Random(0))
    assert sum(asked) == 90


def test_hardness_is_asked_once_of_all_strata_and_each_gives_its_hardest():
    asked = []

    def spy(pool):
        asked.append(Counter(name for name, _ in pool))
        return by_number(pool)

    drawn = draw(rows(a=50, b=80, c=5), 25, hard_share=1.0, hardness=spy, rng=random.Random(3))
    assert asked == [{"a": 30, "b": 30}], "c is drawn whole"
    assert Counter(name for name, _ in drawn) == {"a": 10, "b": 10, "c": 5}
    (again,) = (draw(rows(a=50), 10, hard_share=1.0, hardness=by_number, rng=random.Random(0)),)
    assert again == sorted(again, reverse=True), "hardest first"


def test_hardness_is_not_asked_where_all_are_drawn():
    def fail(pool):
        raise AssertionError

    drawn = draw(rows(a=7, b=9), 16, hard_share=0.3, hardness=fail, rng=random.Random(0))
    assert len(set(drawn)) == 16


def test_hardness_is_not_asked_when_nothing_hard_is_wanted():
    drawn = draw(
        rows(a=30),
        10,
        hard_share=0.0,
        hardness=lambda pool: [0.0] * len(pool),
        rng=random.Random(0),
    )
    assert len(drawn) == 10
