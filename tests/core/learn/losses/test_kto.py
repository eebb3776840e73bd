"""The running reference point, and how likes and dislikes are balanced."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import ThumbSettings
from agentpref.learn.kto import DECAY, ReferencePoint, Seen, balance

ratios = st.floats(-50, 50, allow_nan=False)
batches = st.lists(st.lists(ratios, max_size=6), max_size=6)
counts = st.integers(1, 5_000)


def fed(*batches: list[float]) -> ReferencePoint:
    point = ReferencePoint()
    for batch in batches:
        point.note(torch.tensor(batch, dtype=torch.float64))
        point.end_batch()
    return point


def test_it_is_zero_before_anything_was_seen() -> None:
    assert ReferencePoint().value == 0.0
    assert fed([]).value == 0.0


@given(st.lists(ratios, min_size=1, max_size=20))
def test_the_first_batch_counts_in_full(batch: list[float]) -> None:
    """Bias-corrected, as Adam's moments are: a mean, not a mean with the zero it began with."""
    assert fed(batch).value == pytest.approx(max(0.0, sum(batch) / len(batch)), abs=1e-9)


def test_later_batches_count_more_by_hand() -> None:
    point = fed([1.0, 3.0], [5.0])
    kept = DECAY
    mean = kept * (1 - kept**2) * 2 + (1 - kept) * 5
    weight = kept * (1 - kept**2) + (1 - kept)
    assert point.value == pytest.approx(mean / weight)


def test_it_follows_a_policy_that_moves() -> None:
    point = fed(*[[0.0] * 16] * 8, *[[4.0] * 16] * 8)
    assert 3.9 < point.value <= 4.0


@given(batches)
def test_it_is_never_below_zero(seen: list[list[float]]) -> None:
    assert fed(*seen).value >= 0.0


def test_it_is_clamped_only_in_its_value() -> None:
    """Estimates below zero still count: clamping each batch would only ever err upwards."""
    assert fed([-4.0], [1.0]).value == 0.0
    assert fed([-4.0], [1.0], [30.0]).value < fed([0.0], [1.0], [30.0]).value


@given(batches, st.integers(1, 4), st.randoms(use_true_random=False))
def test_it_does_not_matter_how_a_batch_is_cut(seen, size, random) -> None:
    cut = ReferencePoint()
    for batch in seen:
        shuffled = random.sample(batch, len(batch))
        for start in range(0, len(shuffled), size):
            cut.note(torch.tensor(shuffled[start : start + size], dtype=torch.float64))
        cut.end_batch()
    assert cut.state() == fed(*seen).state()


def test_it_stands_still_during_a_batch() -> None:
    point = fed([2.0])
    before = point.value
    point.note(torch.tensor([90.0]))
    assert point.value == before
    point.end_batch()
    assert point.value > before


@given(batches)
def test_processes_that_share_a_batch_agree_with_one_alone(seen: list[list[float]]) -> None:
    ranks = [ReferencePoint(), ReferencePoint()]
    for batch in seen:
        for rank, point in enumerate(ranks):
            point.note(torch.tensor(batch[rank::2], dtype=torch.float64))
        parts = [point.seen() for point in ranks]
        total = Seen(sum(p.total for p in parts), sum(p.rows for p in parts))
        for point in ranks:
            point.end_batch(total)
    alone = fed(*seen).value
    assert ranks[0].state() == ranks[1].state()
    assert ranks[0].value == pytest.approx(alone, abs=1e-9)


@given(batches, batches)
def test_it_goes_on_from_its_state(first: list[list[float]], then: list[list[float]]) -> None:
    resumed = ReferencePoint()
    resumed.restore(json.loads(json.dumps(fed(*first).state())))
    for batch in then:
        resumed.note(torch.tensor(batch, dtype=torch.float64))
        resumed.end_batch()
    assert resumed.state() == fed(*first, *then).state()


def test_a_restored_one_has_forgotten_the_batch_that_was_cut_short() -> None:
    point = fed([2.0])
    state = point.state()
    point.note(torch.tensor([90.0]))
    point.restore(state)
    point.end_batch()
    assert point.state() == state


def test_what_was_seen_is_a_sum_and_a_number() -> None:
    point = fed([8.0])
    point.note(torch.tensor([1.0, -3.0], requires_grad=True) * 2)
    point.note(torch.tensor([0.5]))
    assert point.seen() == Seen(-3.5, 3)
    point.end_batch()
    assert point.seen() == Seen(0, 0)


@given(counts, counts)
def test_both_sides_weigh_the_same_and_a_thumb_weighs_one(likes: int, dislikes: int) -> None:
    found = balance(ThumbSettings(), desirable=likes, undesirable=dislikes)
    assert found.desirable * likes == pytest.approx(found.undesirable * dislikes)
    total = found.desirable * likes + found.undesirable * dislikes
    assert total / (likes + dislikes) == pytest.approx(1)


@given(counts, counts, st.floats(0.1, 10))
def test_the_side_left_open_follows_the_one_that_is_set(likes, dislikes, weight) -> None:
    for settings in (ThumbSettings(desirable=weight), ThumbSettings(undesirable=weight)):
        found = balance(settings, desirable=likes, undesirable=dislikes)
        assert weight in found
        assert 1 - 1e-9 <= found.desirable * likes / (found.undesirable * dislikes) <= 4 / 3


def test_what_is_set_is_kept() -> None:
    settings = ThumbSettings(desirable=3.0, undesirable=0.5)
    assert balance(settings, desirable=1, undesirable=9) == (3.0, 0.5)


@pytest.mark.parametrize(("likes", "dislikes"), [(7, 0), (0, 7), (0, 0)])
def test_one_side_alone_weighs_one(likes: int, dislikes: int) -> None:
    assert balance(ThumbSettings(), desirable=likes, undesirable=dislikes) == (1.0, 1.0)
    set_ = ThumbSettings(desirable=2.0)
    assert balance(set_, desirable=likes, undesirable=dislikes) == (2.0, 1.0)
