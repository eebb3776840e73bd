"""Losses of comparisons: margins, anchors and WPO weights of pairs, and means over groups."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import LossSettings, UpdateConfig
from agentpref.learn.kernels.head import log_collision
from agentpref.learn.losses import LossInputs, load_loss
from agentpref.learn.losses.apo_zero import apo_zero_loss
from agentpref.learn.losses.dpo import Sigmoid, dpo_loss
from agentpref.learn.losses.hinge import hinge_loss
from agentpref.learn.losses.ipo import ipo_loss
from agentpref.learn.losses.kto import kto_loss
from agentpref.learn.losses.pairwise import nll_anchor, wpo_weight
from agentpref.learn.losses.robust import robust_loss
from tests.core.learn.examples import make_group, make_pair, with_completions

margins = st.floats(-200, 200, allow_nan=False)
KINDS = ("sigmoid", "robust", "ipo", "ipo_sum", "hinge", "apo_zero")
GRADES = {"four": 1.0, "about four": 0.7, "five": 0.2, "six": 0.2}
RATIOS = (1.5, -0.5, 0.25, -2.0)


def test_wpo_weight_is_the_mean_likelihood_of_a_token():
    logps = torch.tensor([0.5, 0.25]).log().sum()[None].requires_grad_()
    weight = wpo_weight(logps, torch.tensor([2.0]))
    assert weight.item() == pytest.approx(math.sqrt(0.5 * 0.25))
    assert not weight.requires_grad


def test_aligned_wpo_weights_are_relative_to_what_the_policy_would_draw():
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
def test_gradients_of_all_losses_are_those_of_finite_differences(loss):
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


def inputs_of(examples, ratios, lengths=None):
    """Inputs of a loss; the reference is -1 per completion, so the policy is the ratio less 1."""
    ratios = torch.tensor(ratios, dtype=torch.float64)
    lengths = torch.ones_like(ratios).long() if lengths is None else torch.tensor(lengths)
    return LossInputs(examples, ratios - 1, torch.full_like(ratios, -1.0), lengths)


def loss_of(kind, examples, ratios, lengths=None, **settings):
    config = UpdateConfig(loss=LossSettings(kind=kind, **{"beta": 0.5, "nll": 0.0, **settings}))
    return load_loss(kind)(config, examples, "base")(inputs_of(examples, ratios, lengths))


def test_the_loss_of_a_group_is_the_mean_over_its_comparisons_by_hand():
    """Four answers of which two have the same grade: five comparisons."""
    group = make_group(0, GRADES, weight=3.0, noise=0.1)
    margins = [RATIOS[i] - RATIOS[j] for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))]
    good = [math.log1p(math.exp(-0.5 * h)) for h in margins]
    bad = [math.log1p(math.exp(0.5 * h)) for h in margins]
    expected = sum(0.9 * g + 0.1 * b for g, b in zip(good, bad, strict=True)) / 5
    found = loss_of("sigmoid", [group], [RATIOS])
    assert found.loss.item() == pytest.approx(3.0 * expected)
    assert found.margin.item() == pytest.approx(sum(margins) / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_group_is_the_mean_of_its_pairs(kind):
    """Of the pairs that its comparisons would be on their own, in every kind of loss."""
    lengths = (4, 2, 3, 5)
    pairs, ratios, tokens = [], [], []
    for (i, one), (j, other) in combinations(enumerate(GRADES), 2):
        if GRADES[one] != GRADES[other]:
            pairs.append(make_pair(i, one, other, noise=0.2))
            ratios.append((RATIOS[i], RATIOS[j]))
            tokens.append((lengths[i], lengths[j]))
    found = loss_of(kind, [make_group(0, GRADES, noise=0.2)], [RATIOS], [lengths])
    expected = loss_of(kind, pairs, ratios, tokens)
    assert found.loss.item() == pytest.approx(expected.loss.mean().item())
    assert found.margin.item() == pytest.approx(expected.margin.mean().item())


def test_the_order_of_the_completions_of_a_group_does_not_matter():
    turned = dict(reversed(GRADES.items()))
    found = loss_of("sigmoid", [make_group(0, turned)], [RATIOS[::-1]], nll=0.7)
    expected = loss_of("sigmoid", [make_group(0, GRADES)], [RATIOS], nll=0.7)
    torch.testing.assert_close(found.loss, expected.loss)


def test_the_anchor_of_a_group_is_on_its_best_completion():
    worst_first = {"six": 0.2, "four": 1.0, "five": 0.0}
    group, ratios, lengths = [make_group(0, worst_first)], [(0.5, -3.0, 0.1)], [(2, 4, 3)]
    plain = loss_of("sigmoid", group, ratios, lengths).loss
    anchored = loss_of("sigmoid", group, ratios, lengths, nll=0.25).loss
    assert (anchored - plain).item() == pytest.approx(0.25 * 4.0 / 4)  # policy: -3 - 1


def test_wpo_weighs_each_comparison_of_a_group_by_both_of_its_answers():
    group = make_group(0, {"four": 1.0, "five": 0.5, "six": 0.0})
    group = with_completions(group, {}, {"author": "base"})
    ratios, lengths = [(0.5, 0.0, -1.0)], [(2, 1, 4)]
    weights = [math.exp(-0.5 / 2), 1.0, math.exp(-2.0 / 4)]  # of the mean token; live wrote one
    costs = [
        weights[i] * weights[j] * math.log1p(math.exp(-0.5 * (ratios[0][i] - ratios[0][j])))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    found = loss_of("sigmoid", [group], ratios, lengths, wpo=True, noise=0.0)
    assert found.loss.item() == pytest.approx(sum(costs) / 3)


def test_a_group_without_a_preference_costs_nothing():
    tied = make_group(0, {"four": 0.5, "five": 0.5})
    alone = loss_of("sigmoid", [tied], [(0.5, -2.0)], nll=0.3)
    assert (alone.loss.tolist(), alone.margin.tolist()) == ([0.0], [0.0])
    pair = make_pair(1, "yes", "no")
    both = loss_of("sigmoid", [tied, pair], [(0.5, -2.0), (0.5, -0.5)], nll=0.3)
    assert both.loss.tolist() == [0.0, loss_of("sigmoid", [pair], [(0.5, -0.5)], nll=0.3).loss]


def test_no_gradient_flows_between_examples():
    examples = [make_pair(0, "yes", "no"), make_pair(1, "yes", "no")]
    policy = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(examples, policy, torch.zeros(2, 2).double(), torch.ones(2, 2).long())
    Sigmoid(UpdateConfig(), examples, "base")(inputs).loss[0].backward()
    assert policy.grad[1].tolist() == [0.0, 0.0]
