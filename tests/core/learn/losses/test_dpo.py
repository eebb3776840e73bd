"""DPO's loss against numbers worked by hand and published ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.learn.losses import LossInputs
from agentpref.learn.losses.dpo import dpo_loss

margins = st.floats(-200, 200, allow_nan=False)


def test_loss_by_hand():
    assert dpo_loss(torch.tensor([1.5]), beta=2.0).item() == pytest.approx(math.log1p(math.exp(-3)))


def test_conservative_loss_by_hand():
    good, bad = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    loss = dpo_loss(torch.tensor([1.5]), beta=2.0, noise=torch.tensor([0.1]))
    assert loss.item() == pytest.approx(0.9 * good + 0.1 * bad)


def test_torchtune_published_values():
    policy = torch.tensor([[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]])
    reference = torch.tensor([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
    ratios = LossInputs((), policy, reference, torch.ones_like(policy)).ratios
    margin = ratios[:, 0] - ratios[:, 1]
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
