"""The objective, checked against numbers worked by hand and against published ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.learn.loss import (
    apo_zero_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kl_penalty,
    kto_loss,
    kto_margin,
    log_collision,
    nll_anchor,
    per_token,
    reward_margin,
    robust_loss,
    token_kl,
    wpo_weight,
)

margins = st.floats(-200, 200, allow_nan=False)
betas = st.floats(0.01, 5)
log_ratios = st.floats(-20, 20, allow_nan=False)


def test_margin_by_hand():
    margin = reward_margin(*map(torch.tensor, ([-1.0], [-3.0], [-2.0], [-2.5])))
    assert margin.tolist() == [1.5]  # (-1 + 2) - (-3 + 2.5)


def test_loss_by_hand():
    assert dpo_loss(torch.tensor([1.5]), beta=2.0).item() == pytest.approx(math.log1p(math.exp(-3)))


def test_conservative_loss_by_hand():
    good, bad = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    loss = dpo_loss(torch.tensor([1.5]), beta=2.0, noise=torch.tensor([0.1]))
    assert loss.item() == pytest.approx(0.9 * good + 0.1 * bad)


def test_torchtune_published_values():
    margin = reward_margin(
        torch.tensor([-0.5, -10.0, -1.0]),
        torch.tensor([-0.1, -30.0, -21.0]),
        torch.tensor([-0.5, -10.1, -0.1]),
        torch.tensor([-0.1, -20.1, -0.1]),
    )
    expected = torch.tensor([0.6931, 0.3133, 0.1269])
    torch.testing.assert_close(dpo_loss(margin, beta=0.1), expected, atol=1e-4, rtol=0)


@given(margins, st.floats(0.001, 5))
def test_a_coin_label_makes_the_loss_symmetric(margin, beta):
    there, back = torch.tensor([margin]), torch.tensor([-margin])
    assert dpo_loss(there, beta=beta, noise=0.5).item() == pytest.approx(
        dpo_loss(back, beta=beta, noise=0.5).item()
    )


@given(margins, st.floats(0, 1))
def test_a_flipped_label_is_the_opposite_margin(margin, noise):
    flipped = dpo_loss(torch.tensor([-margin]), beta=0.1, noise=1 - noise).item()
    assert dpo_loss(torch.tensor([margin]), beta=0.1, noise=noise).item() == pytest.approx(
        flipped, abs=1e-4
    )


@given(st.floats(0, 1))
def test_policy_equal_to_reference_costs_log_2(noise):
    assert dpo_loss(torch.zeros(1), beta=0.1, noise=noise).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_label_smoothing_sweep(noise):
    """As LLaMA-Factory's: worked from probabilities, and the more noise the flatter the loss."""
    margin = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    right = [1 / (1 + math.exp(-0.4 * h)) for h in margin.tolist()]
    expected = [-(1 - noise) * math.log(p) - noise * math.log(1 - p) for p in right]
    found = dpo_loss(margin, beta=0.4, noise=noise)
    assert found.tolist() == pytest.approx(expected)
    steepness = (found[0] - found[-1]).item()
    assert steepness == pytest.approx((1 - 2 * noise) * 0.4 * 3)  # ℓ(-z) - ℓ(z) = z


@given(margins, st.floats(0, 0.49), betas)
def test_robust_loss_is_the_clean_one_on_average_over_flips(margin, noise, beta):
    said, unsaid = torch.tensor([[margin], [-margin]], dtype=torch.float64)
    over_flips = (1 - noise) * robust_loss(said, beta=beta, noise=noise) + noise * robust_loss(
        unsaid, beta=beta, noise=noise
    )
    assert over_flips.item() == pytest.approx(dpo_loss(said, beta=beta).item(), abs=1e-9)


def test_robust_loss_by_hand():
    good, bad = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    loss = robust_loss(torch.tensor([1.5]), beta=2.0, noise=torch.tensor([0.1]))
    assert loss.item() == pytest.approx((0.9 * good - 0.1 * bad) / 0.8, abs=1e-6)


@given(st.floats(0, 0.49), betas)
def test_robust_loss_of_the_reference_is_log_2(noise, beta):
    loss = robust_loss(torch.zeros(1, dtype=torch.float64), beta=beta, noise=noise)
    assert loss.item() == pytest.approx(math.log(2))


@given(betas, st.floats(-5, 5))
def test_ipo_is_least_at_half_of_one_over_beta(beta, off):
    best = torch.tensor([1 / (2 * beta)], dtype=torch.float64)
    assert ipo_loss(best, beta=beta).item() == 0.0
    assert ipo_loss(best + off, beta=beta).item() == pytest.approx(off**2)


def test_hinge_by_hand_and_flat_beyond_one_over_beta():
    margin = torch.tensor([-2.0, 0.0, 1.0, 4.0], requires_grad=True)
    loss = hinge_loss(margin, beta=0.5)
    assert loss.tolist() == [2.0, 1.0, 0.5, 0.0]
    loss.sum().backward()
    assert margin.grad.tolist() == [-0.5, -0.5, -0.5, 0.0]


@given(betas)
def test_apo_zero_of_the_reference_is_one(beta):
    assert apo_zero_loss(torch.zeros(1), torch.zeros(1), beta=beta).item() == 1.0


def test_apo_zero_moves_both_answers_whatever_the_gap():
    """DPO is content with a gap; here each answer is held against the reference itself."""
    chosen = torch.tensor([-1.0], requires_grad=True)  # less likely than before, but less so
    rejected = torch.tensor([-5.0], requires_grad=True)
    loss = apo_zero_loss(chosen, rejected, beta=1.0)
    assert loss.item() == pytest.approx(1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(5)))
    loss.backward()
    assert chosen.grad.item() < -0.19
    assert 0 < rejected.grad.item() < 0.01


@given(log_ratios, st.floats(0, 20), betas)
def test_likes_and_dislikes_mirror_each_other_about_the_reference_point(ratio, z0, beta):
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


def test_per_token_divides_each_by_its_own_length():
    assert per_token(torch.tensor([-6.0, 2.0]), torch.tensor([3.0, 4.0])).tolist() == [-2.0, 0.5]


def test_wpo_weight_is_the_mean_likelihood_of_a_token():
    logps = torch.tensor([0.5, 0.25]).log().sum()[None].requires_grad_()
    weight = wpo_weight(logps, torch.tensor([2.0]))
    assert weight.item() == pytest.approx(math.sqrt(0.5 * 0.25))
    assert not weight.requires_grad


def test_wpo_alignment_measures_against_what_the_policy_would_draw():
    """A token drawn from k equally likely ones weighs 1 for any k; a surprising one less."""
    for k in (1, 4, 100):
        logits = torch.zeros(1, 3, k)
        logps = torch.full((1,), -3 * math.log(k))
        lengths = torch.tensor([3.0])
        aligned = wpo_weight(logps, lengths, log_collision(logits).sum(-1))
        assert aligned.item() == pytest.approx(1, abs=1e-5)
        assert wpo_weight(logps, lengths).item() == pytest.approx(1 / k)
    sure = log_collision(torch.tensor([[[0.9, 0.1]]]).log()).sum(-1)
    assert sure.item() == pytest.approx(math.log(0.82))
    likely, unlikely = (
        wpo_weight(torch.tensor([math.log(p)]), torch.ones(1), sure).item() for p in (0.9, 0.1)
    )
    assert (likely, unlikely) == (1.0, pytest.approx(0.1 / 0.82))  # never above 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r: dpo_loss(c - r, beta=0.7, noise=0.2),
        lambda c, r: robust_loss(c - r, beta=0.7, noise=0.2),
        lambda c, r: ipo_loss(c - r, beta=0.7),
        lambda c, r: hinge_loss(c - r, beta=0.7),
        lambda c, r: apo_zero_loss(c, r, beta=0.7),
        lambda c, r: kto_loss(c, r.detach() > 0, beta=0.7, reference_point=0.3),
        lambda c, r: nll_anchor(c, torch.tensor([3.0, 4.0, 5.0])),
    ],
    ids=["sigmoid", "robust", "ipo", "hinge", "apo_zero", "kto", "nll"],
)
def test_gradients_are_those_of_finite_differences(loss):
    chosen = torch.tensor([-1.5, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, -0.9, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


@given(margins, st.floats(0, 0.49))
def test_no_margin_makes_a_loss_or_its_gradient_infinite(margin, noise):
    h = torch.tensor([margin, -margin], requires_grad=True)
    liked = torch.tensor([True, False])
    total = (
        dpo_loss(h, beta=5.0, noise=noise)
        + robust_loss(h, beta=5.0, noise=noise)
        + ipo_loss(h, beta=5.0)
        + hinge_loss(h, beta=5.0)
        + apo_zero_loss(h, -h, beta=5.0)
        + kto_loss(h, liked, beta=5.0, reference_point=1.0)
    ).sum()
    total.backward()
    assert math.isfinite(total.item())
    assert h.grad.isfinite().all()


def test_anchor_is_per_token():
    assert nll_anchor(torch.tensor([-6.0]), torch.tensor([3.0])).tolist() == [2.0]


def test_token_kl_by_hand():
    live, candidate = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(live, candidate).item() == pytest.approx(expected)


def test_token_kl_of_equals_is_zero():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert token_kl(logits, logits + 3.0).abs().max().item() < 1e-6


def test_kl_penalty_by_hand():
    assert kl_penalty(torch.tensor(0.2), weight=3.0, target=0.05).item() == pytest.approx(0.45)


def test_nothing_pulls_below_the_target():
    kl = torch.tensor(0.01, requires_grad=True)
    kl_penalty(kl, weight=3.0, target=0.05).backward()
    assert kl.grad.item() == 0.0
