"""Distribution shift: what is told apart, what is not, and how often by chance."""

from __future__ import annotations

import numpy as np
import pytest

from agentpref.prove.shift import ALL, FEWEST, SURE, Point, shifts


def points(seed: int, count: int, *, tag: str = "a", centre: float = 0.0, first: int = 0):
    source = np.random.default_rng(seed)
    return [
        Point(tag, f"{tag}{first + n:05d}", centre + source.normal(size=8)) for n in range(count)
    ]


def test_prompts_of_another_kind_raise_an_alarm_that_names_them() -> None:
    old = points(0, 100)
    new = [*points(1, 40, first=500), *points(2, 40, centre=6.0, first=900)]
    (found,) = shifts(new, old, seed=0)
    assert (found.tag, found.new, found.old) == (ALL, 80, 100)
    assert found.alarm
    assert 0.45 <= found.unlike <= 0.65
    assert all(int(name[1:]) >= 900 for name in found.farthest)
    assert "like none that live has learned" in found.note


def test_prompts_of_the_same_kind_raise_none() -> None:
    p_values = []
    for seed in range(60):
        (found,) = shifts(points(seed, 40, first=500), points(1000 + seed, 60), seed=seed)
        assert not found.alarm
        p_values.append(found.p)
    assert np.mean(np.array(p_values) <= 0.1) <= 0.2
    assert 0.35 <= np.mean(p_values) <= 0.65


def test_a_small_difference_is_sure_and_no_alarm() -> None:
    (found,) = shifts(points(1, 300, centre=0.4, first=500), points(0, 300), seed=0)
    assert found.p <= SURE
    assert not found.alarm


def test_the_tag_that_moved_is_told_from_the_others() -> None:
    old = [*points(0, 60), *points(1, 60, tag="b")]
    new = [*points(2, 60, first=500), *points(3, 60, tag="b", centre=5.0, first=500)]
    found = {one.tag: one for one in shifts(new, old, seed=0)}
    assert {tag: one.alarm for tag, one in found.items()} == {ALL: True, "a": False, "b": True}
    assert "of 'b'" in found["b"].note


@pytest.mark.parametrize("sides", [(FEWEST - 1, 100), (100, FEWEST - 1), (0, 0)])
def test_of_few_prompts_nothing_is_said(sides: tuple[int, int]) -> None:
    new, old = sides
    assert shifts(points(0, new), points(1, old, first=500), seed=0) == []


def test_a_prompt_counts_once() -> None:
    new = points(0, 30) * 4
    (found,) = shifts(new, points(1, 30, first=500), seed=0)
    assert found.new == 30


def test_of_many_tags_one_that_moved_is_still_told() -> None:
    old = [one for n in range(20) for one in points(n, 30, tag=f"t{n:02}")]
    new = [
        one
        for n in range(20)
        for one in points(100 + n, 30, tag=f"t{n:02}", centre=8.0 * (n == 7), first=500)
    ]
    assert [one.tag for one in shifts(new, old, seed=0) if one.alarm] == ["t07"]
