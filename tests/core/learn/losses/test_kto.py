"""KTO: its loss, its running reference point, and the balance of likes and dislikes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import ThumbSettings, UpdateConfig
from agentpref.learn.losses import LossInputs
from agentpref.learn.losses.kto import (
    DECAY,
    KTO,
    ReferencePoint,
    Seen,
    balance,
    is_liked,
    kto_loss,
    kto_margin,
)
from tests.core.learn.examples import answer, make_pair, make_thumb

ratios = st.floats(-50, 50, allow_nan=False)
batches = st.lists(st.lists(ratios, max_size=6), max_size=6)
counts = st.integers(1, 5_000)
log_ratios = st.floats(-20, 20, allow_nan=False)
betas = st.floats(0.01, 5)


def fed(*batches: list[float]) -> ReferencePoint:
    point = ReferencePoint()
    for batch in batches:
        point.note(torch.tensor(batch, dtype=torch.float64))
        point.end_batch(point.seen())
    return point


@given(log_ratios, st.floats(0, 20), betas)
def test_likes_and_dislikes_are_symmetric_about_the_reference_point(ratio, z0, beta):
    above = torch.tensor([z0 + ratio, z0 - ratio], dtype=torch.float64)
    liked = torch.tensor([True, False])
    loss = kto_loss(above, liked, beta=beta, reference_point=z0)
    margin = kto_margin(above, liked, reference_point=z0)
    assert loss[0].item() == pytest.approx(loss[1].item(), abs=1e-9)
    assert margin.tolist() == pytest.approx([ratio, ratio], abs=1e-9)
    assert loss.sum().item() == pytest.approx(2 / (1 + math.exp(beta * ratio)))


@pytest.mark.parametrize("liked", [True, False])
def test_kto_of_the_reference_is_one_half(liked):
    loss = kto_loss(torch.zeros(3), torch.tensor([liked] * 3), beta=0.1, reference_point=0.0)
    assert loss.tolist() == [0.5, 0.5, 0.5]


def test_kto_of_a_batch_is_that_of_its_rows():
    ratios, liked = torch.tensor([-2.0, 0.3, 7.0]), torch.tensor([True, False, True])
    together = kto_loss(ratios, liked, beta=0.3, reference_point=0.4)
    apart = [
        kto_loss(ratios[i : i + 1], liked[i : i + 1], beta=0.3, reference_point=0.4)
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize(
    ("label", "liked"), [(1.0, True), (0.3, True), (0.0, False), (-1.0, False)]
)
def test_a_label_above_0_is_a_like(label, liked):
    assert is_liked(make_thumb(0, "yes", completions=(answer("yes", label),))) is liked


def test_the_reference_point_is_0_before_the_first_batch_ends() -> None:
    assert ReferencePoint().value == 0.0
    assert fed([]).value == 0.0


@given(st.lists(ratios, min_size=1, max_size=20))
def test_after_one_batch_the_reference_point_is_its_mean(batch: list[float]) -> None:
    """It is bias-corrected as Adam's moments are, so the zero it starts from does not count."""
    assert fed(batch).value == pytest.approx(max(0.0, sum(batch) / len(batch)), abs=1e-9)


def test_later_batches_count_more_by_hand() -> None:
    point = fed([1.0, 3.0], [5.0])
    kept = DECAY
    mean = kept * (1 - kept**2) * 2 + (1 - kept) * 5
    weight = kept * (1 - kept**2) + (1 - kept)
    assert point.value == pytest.approx(mean / weight)


def test_the_reference_point_follows_a_policy_that_moves() -> None:
    point = fed(*[[0.0] * 16] * 8, *[[4.0] * 16] * 8)
    assert 3.9 < point.value <= 4.0


@given(batches)
def test_the_reference_point_is_never_below_zero(seen: list[list[float]]) -> None:
    assert fed(*seen).value >= 0.0


def test_batches_with_a_mean_below_zero_lower_later_values() -> None:
    """Clamping each batch instead of the value would bias it upwards."""
    assert fed([-4.0], [1.0]).value == 0.0
    assert fed([-4.0], [1.0], [30.0]).value < fed([0.0], [1.0], [30.0]).value


@given(batches, st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_reference_point_is_the_same_in_whatever_passes_a_batch_is_taken(
    seen, size, random
) -> None:
    cut = ReferencePoint()
    for batch in seen:
        shuffled = random.sample(batch, len(batch))
        for start in range(0, len(shuffled), size):
            cut.note(torch.tensor(shuffled[start : start + size], dtype=torch.float64))
        cut.end_batch(cut.seen())
    assert cut.state() == fed(*seen).state()


def test_the_reference_point_is_constant_during_a_batch() -> None:
    point = fed([2.0])
    before = point.value
    point.note(torch.tensor([90.0]))
    assert point.value == before
    point.end_batch(point.seen())
    assert point.value > before


@given(batches)
def test_processes_that_share_a_batch_have_the_reference_point_of_one_alone(
    seen: list[list[float]],
) -> None:
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
def test_a_restored_reference_point_continues_bit_for_bit(
    first: list[list[float]], then: list[list[float]]
) -> None:
    resumed = ReferencePoint()
    resumed.restore(json.loads(json.dumps(fed(*first).state())))
    for batch in then:
        resumed.note(torch.tensor(batch, dtype=torch.float64))
        resumed.end_batch(resumed.seen())
    assert resumed.state() == fed(*first, *then).state()


def test_restoring_drops_what_was_noted_of_an_unfinished_batch() -> None:
    point = fed([2.0])
    state = point.state()
    point.note(torch.tensor([90.0]))
    point.restore(state)
    point.end_batch(point.seen())
    assert point.state() == state


def test_seen_is_the_sum_and_number_of_this_batch() -> None:
    point = fed([8.0])
    point.note(torch.tensor([1.0, -3.0], requires_grad=True) * 2)
    point.note(torch.tensor([0.5]))
    assert point.seen() == Seen(-3.5, 3)
    point.end_batch(point.seen())
    assert point.seen() == Seen(0, 0)


@given(counts, counts)
def test_without_settings_both_sides_weigh_the_same_and_a_thumb_1_on_average(
    likes: int, dislikes: int
) -> None:
    found = balance(ThumbSettings(), desirable=likes, undesirable=dislikes)
    assert found.desirable * likes == pytest.approx(found.undesirable * dislikes)
    total = found.desirable * likes + found.undesirable * dislikes
    assert total / (likes + dislikes) == pytest.approx(1)


@given(counts, counts, st.floats(0.1, 10))
def test_a_lambda_left_out_is_balanced_to_the_one_that_is_set(likes, dislikes, weight) -> None:
    for settings in (ThumbSettings(desirable=weight), ThumbSettings(undesirable=weight)):
        found = balance(settings, desirable=likes, undesirable=dislikes)
        assert weight in found
        assert 1 - 1e-9 <= found.desirable * likes / (found.undesirable * dislikes) <= 4 / 3


def test_lambdas_that_are_set_are_kept() -> None:
    settings = ThumbSettings(desirable=3.0, undesirable=0.5)
    assert balance(settings, desirable=1, undesirable=9) == (3.0, 0.5)


@pytest.mark.parametrize(("likes", "dislikes"), [(7, 0), (0, 7), (0, 0)])
def test_without_both_likes_and_dislikes_a_lambda_left_out_is_1(likes: int, dislikes: int) -> None:
    assert balance(ThumbSettings(), desirable=likes, undesirable=dislikes) == (1.0, 1.0)
    set_ = ThumbSettings(desirable=2.0)
    assert balance(set_, desirable=likes, undesirable=dislikes) == (2.0, 1.0)


def test_beside_corrections_likes_have_their_anchor_and_at_most_as_much_of_it():
    likes, dislike = [make_thumb(n, "No") for n in range(4)], make_thumb(9, "No", liked=False)
    corrections = [make_pair(n, "Yes", "No", origin="correction") for n in (20, 21)]

    def losses(examples):
        logps = torch.tensor([[-3.0, -1.0]] * 5, dtype=torch.float64)
        lengths = torch.full((5, 2), 2)
        thumbs = [*likes, dislike]
        inputs = LossInputs(thumbs, logps[:, :1], logps[:, :1], lengths[:, :1])
        return KTO(UpdateConfig(), examples, "base")(inputs).loss

    alone, beside = losses([*likes, dislike]), losses([*likes, dislike, *corrections])
    added = (beside - alone) / KTO(UpdateConfig(), [*likes, dislike], "base")._weights[True]
    assert added[:4].tolist() == pytest.approx([0.5 * 1.5] * 4), "α · 2 of 4 · NLL of 1.5 a token"
    assert added[4] == 0
