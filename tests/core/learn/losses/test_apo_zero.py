"""APO-zero compares each answer with the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.learn.losses.apo_zero import apo_zero_loss

betas = st.floats(0.01, 5)


@given(betas)
def test_apo_zero_of_the_reference_is_one(beta):
    assert apo_zero_loss(torch.zeros(1), torch.zeros(1), beta=beta).item() == 1.0


def test_apo_zero_moves_both_answers_at_any_margin():
    """DPO asks only for a gap between the answers."""
    chosen = torch.tensor([-1.0], requires_grad=True)  # less likely than before, but less so
    rejected = torch.tensor([-5.0], requires_grad=True)
    loss = apo_zero_loss(chosen, rejected, beta=1.0)
    assert loss.item() == pytest.approx(1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(5)))
    loss.backward()
    assert chosen.grad.item() < -0.19
    assert 0 < rejected.grad.item() < 0.01
