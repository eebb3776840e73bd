"""The objective, checked against numbers worked by hand and against published ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.learn.loss import dpo_loss, kl_excess, nll_anchor, reward_margin, token_kl

margins = st.floats(-200, 200, allow_nan=False)


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


def test_anchor_is_per_token():
    assert nll_anchor(torch.tensor([-6.0]), torch.tensor([3.0])).tolist() == [2.0]


def test_token_kl_by_hand():
    live, candidate = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(live, candidate).item() == pytest.approx(expected)


def test_token_kl_of_equals_is_zero():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert token_kl(logits, logits + 3.0).abs().max().item() < 1e-6


def test_kl_excess_by_hand():
    per_token = torch.tensor([[0.2, 0.4, 9.0], [0.1, 9.0, 9.0]])
    real = torch.tensor([[True, True, False], [True, False, False]])
    excess, kl = kl_excess(per_token, real, target=0.05)
    assert kl.item() == pytest.approx(
        (0.3 + 0.1) / 2
    )  # a short answer weighs as much as a long one
    assert excess.item() == pytest.approx(0.15)


def test_nothing_pulls_below_the_target():
    per_token = torch.tensor([[0.01]], requires_grad=True)
    kl_excess(per_token, torch.tensor([[True]]), target=0.05)[0].backward()
    assert per_token.grad.item() == 0.0
