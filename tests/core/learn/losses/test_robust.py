"""Robust DPO is DPO on average over flipped labels, and refuses labels that are coins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import LossSettings, UpdateConfig
from agentpref.errors import ConfigError
from agentpref.learn.losses.dpo import dpo_loss
from agentpref.learn.losses.robust import Robust, robust_loss
from tests.core.learn.examples import make_pair, make_thumb

margins = st.floats(-200, 200, allow_nan=False)
betas = st.floats(0.01, 5)


@given(margins, st.floats(0, 0.49), betas)
def test_the_robust_loss_is_dpos_on_average_over_flips(margin, noise, beta):
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


def test_an_example_with_a_noise_rate_of_a_half_is_refused_unless_loss_noise_is_set():
    examples = [make_pair(0, "yes", "no"), make_pair(1, "yes", "no", noise=0.5)]
    config = UpdateConfig(loss=LossSettings(kind="robust"))
    expected = r"example pair1 has a noise rate of 0\.5.*set loss\.noise"
    with pytest.raises(ConfigError, match=expected):
        Robust(config, examples, "base")
    Robust(UpdateConfig(loss=LossSettings(kind="robust", noise=0.1)), examples, "base")
    Robust(config, [examples[0], make_thumb(2, "yes", noise=0.5)], "base")
