"""SLiC's hinge loss is flat beyond a margin of 1/β."""

from __future__ import annotations

import torch

from agentpref.learn.losses.hinge import hinge_loss


def test_hinge_by_hand_is_flat_beyond_one_over_beta():
    margin = torch.tensor([-2.0, 0.0, 1.0, 4.0], requires_grad=True)
    loss = hinge_loss(margin, beta=0.5)
    assert loss.tolist() == [2.0, 1.0, 0.5, 0.0]
    loss.sum().backward()
    assert margin.grad.tolist() == [-0.5, -0.5, -0.5, 0.0]
