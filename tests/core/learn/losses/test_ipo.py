"""IPO drives a margin to 1/(2β); per token, each answer is divided by its own length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import LossSettings, UpdateConfig
from agentpref.learn.losses import LossInputs
from agentpref.learn.losses.ipo import IPO, IPOSum, ipo_loss
from tests.core.learn.examples import make_pair

betas = st.floats(0.01, 5)


@given(betas, st.floats(-5, 5))
def test_ipo_is_least_at_half_of_one_over_beta(beta, off):
    best = torch.tensor([1 / (2 * beta)], dtype=torch.float64)
    assert ipo_loss(best, beta=beta).item() == 0.0
    assert ipo_loss(best + off, beta=beta).item() == pytest.approx(off**2)


@pytest.mark.parametrize(("kind", "margin"), [(IPO, -2.0 - 0.5), (IPOSum, -6.0 - 2.0)])
def test_ipo_divides_each_log_ratio_by_its_own_length_and_ipo_sum_does_not(kind, margin):
    examples = [make_pair(0, "yes", "no")]
    config = UpdateConfig(loss=LossSettings(beta=0.5, nll=0.0))
    policy = torch.tensor([[-6.0, 2.0]], dtype=torch.float64)
    lengths = torch.tensor([[3, 4]])
    found = kind(config, examples, "base")(
        LossInputs(examples, policy, torch.zeros_like(policy), lengths)
    )
    assert found.loss.item() == pytest.approx((margin - 1.0) ** 2)
    assert found.margin.item() == -8.0, "the margin h is of sums in both"
