"""The loss of mixed batches, row by row, on log-probs made up for the purpose."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import LossSettings, ThumbSettings
from agentpref.errors import ConfigError
from agentpref.learn import loss as losses
from agentpref.learn.criterion import Criterion
from agentpref.learn.encode import EncodedPair
from agentpref.learn.kto import Seen
from agentpref.learn.logps import PairLogps
from agentpref.types import Pair, Prompt, Thumb

KINDS = ("sigmoid", "robust", "ipo", "ipo_sum", "hinge", "apo_zero")
PURE = LossSettings(beta=0.5, nll=0.0, nll_on_corrections=0.0)
"""The preference loss alone."""


@dataclass(frozen=True)
class Judgement:
    """An encoded thumb, as far as a criterion looks at one."""

    thumb: Thumb


ASKED = Prompt("q", ({"role": "user", "content": "?"},))
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
PAIR = Pair("pair", "test", 0.0, ASKED, YES, NO, "comparison", noise=0.0)


class Row(NamedTuple):
    encoded: EncodedPair | Judgement
    reference: PairLogps


def pair_row(reference=(0.0, 0.0), lengths=(4, 2), **changes) -> Row:
    chosen, rejected = (tuple(range(n)) for n in lengths)
    return Row(EncodedPair(replace(PAIR, **changes), (1,), chosen, rejected), PairLogps(*reference))


def thumb_row(desirable=True, reference=(0.0, 0.0)) -> Row:
    thumb = Thumb("run", "test", 0.0, ASKED, YES, desirable)
    return Row(Judgement(thumb), PairLogps(*reference))


def make(settings=PURE, thumbs=None, desirable=1, undesirable=1, live=None) -> Criterion:
    thumbs = thumbs or ThumbSettings()
    return Criterion(settings, thumbs, desirable=desirable, undesirable=undesirable, live=live)


def laid_out(*sides: tuple[float, float], dtype=torch.float64) -> torch.Tensor:
    """Log-probs as a layout gives them: all first completions, then all second ones."""
    return torch.tensor([*(a for a, _ in sides), *(b for _, b in sides)], dtype=dtype)


def test_a_pair_by_hand():
    settings = LossSettings(beta=2.0, nll=0.25)
    row = pair_row(reference=(-2.0, -2.5), weight=3.0, noise=0.1)
    found = make(settings)([row], laid_out((-1.0, -3.0)))
    good, bad = math.log1p(math.exp(-3)), math.log1p(math.exp(3))  # βh = 2·1.5
    assert found.loss.item() == pytest.approx(3 * (0.9 * good + 0.1 * bad) + 0.25 * 1 / 4)
    assert found.margin.item() == 1.5


def test_the_anchor_of_corrections_is_their_own():
    settings = LossSettings(beta=0.5, nll=0.25, nll_on_corrections=2.0)
    rows = [pair_row(origin=origin) for origin in ("comparison", "correction")]
    sides = laid_out((-1.0, -3.0), (-1.0, -3.0))
    anchors = make(settings)(rows, sides).loss - make(PURE)(rows, sides).loss
    assert anchors.tolist() == pytest.approx([0.25 / 4, 2.0 / 4])


def test_each_kind_is_its_formula():
    chosen, rejected = torch.tensor([1.0]).double(), torch.tensor([-0.6]).double()
    expected = {
        "sigmoid": losses.dpo_loss(chosen - rejected, beta=0.5, noise=0.1),
        "robust": losses.robust_loss(chosen - rejected, beta=0.5, noise=0.1),
        "ipo": losses.ipo_loss(chosen / 4 - rejected / 2, beta=0.5),
        "ipo_sum": losses.ipo_loss(chosen - rejected, beta=0.5),
        "hinge": losses.hinge_loss(chosen - rejected, beta=0.5),
        "apo_zero": losses.apo_zero_loss(chosen, rejected, beta=0.5),
    }
    assert expected.keys() == set(KINDS)
    row = pair_row(reference=(-3.0, -3.0), noise=0.1)
    for kind, loss in expected.items():
        found = make(replace(PURE, kind=kind))([row], laid_out((-2.0, -3.6)))
        assert found.loss.item() == pytest.approx(loss.item()), kind
        assert found.margin.item() == pytest.approx(1.6), kind
    assert len({round(loss.item(), 6) for loss in expected.values()}) == len(KINDS)


def test_one_noise_rate_overrides_those_of_the_rows():
    rows = [pair_row(noise=0.02), pair_row(noise=0.4)]
    sides = laid_out((-1.0, -3.0), (-1.0, -3.0))
    own = make()(rows, sides).loss
    assert own[0] < own[1]
    for_all = make(replace(PURE, noise=0.2))(rows, sides).loss
    expected = losses.dpo_loss(torch.tensor(2.0), beta=0.5, noise=0.2).item()
    assert for_all.tolist() == pytest.approx([expected, expected])


def test_a_coin_has_no_robust_loss():
    rows = [pair_row(), pair_row(noise=0.5, pair_id="coin")]
    criterion = make(replace(PURE, kind="robust"))
    with pytest.raises(ConfigError, match=r"pair coin has a noise rate of 0\.5.*set loss\.noise"):
        criterion(rows, laid_out((-1.0, -3.0), (-1.0, -3.0)))
    assert (
        make(replace(PURE, kind="robust", noise=0.1))(rows, laid_out((-1.0, -3.0), (-1.0, -3.0)))
        .loss.isfinite()
        .all()
    )


def wpo_weights(live, collision=None):
    """How much less each of three pairs costs with WPO than without."""
    rows = [
        pair_row(chosen_by=chosen, rejected_by=rejected)
        for chosen, rejected in (("rev-1", "rev-1"), ("rev-1", None), (None, "base"))
    ]
    sides = laid_out(*[(-4.0, -6.0)] * 3).requires_grad_()
    weighed = make(replace(PURE, wpo=True), live=live)(rows, sides, collision).loss
    (gradient,) = torch.autograd.grad(weighed.sum(), sides)
    plain = make()(rows, sides).loss
    (unweighted,) = torch.autograd.grad(plain.sum(), sides)
    weights = (weighed / plain).detach()
    torch.testing.assert_close(gradient, unweighted * weights.repeat(2))  # detached
    return weights.tolist()


def test_wpo_weighs_down_what_the_live_policy_did_not_write():
    chosen, rejected = math.exp(-4 / 4), math.exp(-6 / 2)  # the mean token of each answer
    assert wpo_weights("rev-1") == pytest.approx([1.0, rejected, chosen * rejected])
    assert wpo_weights(None) == pytest.approx([chosen * rejected, chosen * rejected, chosen])


def test_wpo_can_be_aligned():
    collision = laid_out(*[(-2.0, -8.0)] * 3)
    chosen = math.exp(-(4 - 2) / 4)  # and the rejected answer is likelier than a draw: 1
    assert wpo_weights("rev-1", collision) == pytest.approx([1.0, 1.0, chosen])


def test_wpo_leaves_the_anchor_and_the_thumbs_alone():
    settings = LossSettings(beta=0.5, nll=1.0)
    rows, sides = [pair_row(weight=0.0), thumb_row()], laid_out((-4.0, -6.0), (-1.0, 0.0))
    found = make(replace(settings, wpo=True))(rows, sides)
    assert torch.equal(found.loss, make(settings)(rows, sides).loss)


def test_a_thumb_by_hand():
    criterion = make(thumbs=ThumbSettings(weight=0.5, desirable=2.0, undesirable=3.0))
    criterion([thumb_row(reference=(0.0, -7.0))], laid_out((0.0, -6.6)))
    criterion.end_batch()  # z0 = 0.4
    rows = [thumb_row(True, (-3.0, 0.0)), thumb_row(False, (-3.0, 0.0))]
    found = criterion(rows, laid_out((-1.0, 0.0), (-1.0, 0.0)))
    assert found.margin.tolist() == pytest.approx([1.6, -1.6])
    like, dislike = 1 / (1 + math.exp(0.5 * 1.6)), 1 / (1 + math.exp(-0.5 * 1.6))
    assert found.loss.tolist() == pytest.approx([0.5 * 2 * like, 0.5 * 3 * dislike])


@given(st.integers(1, 99), st.integers(1, 99), st.floats(0, 3))
def test_a_thumb_on_the_reference_costs_half_its_weight(likes, dislikes, weight):
    criterion = make(thumbs=ThumbSettings(weight=weight), desirable=likes, undesirable=dislikes)
    rows = [thumb_row(True), thumb_row(False)]
    found = criterion(rows, laid_out((0.0, 0.0), (0.0, 0.0)))
    all_rows = likes + dislikes
    expected = [weight * all_rows / (2 * n) / 2 for n in (likes, dislikes)]
    assert found.loss.tolist() == pytest.approx(expected)
    assert found.margin.tolist() == [0.0, 0.0]


def test_no_gradient_flows_into_a_mismatched_answer():
    criterion = make()
    rows = [thumb_row(True), thumb_row(False)]
    for _ in range(2):
        sides = laid_out((-1.0, 0.7), (-1.0, 0.7)).requires_grad_()
        criterion(rows, sides).loss.sum().backward()
        criterion.end_batch()
        liked, disliked, *mismatched = sides.grad.tolist()
        assert liked < 0 < disliked
        assert mismatched == [0.0, 0.0]
    assert criterion.state()["mean"] > 0  # though they were seen


def test_the_first_loss_of_a_run_is_what_it_must_be():
    """Where the policy is the reference: log 2 for a pair, half of its weight for a thumb."""
    reference = (-5.0, -9.0)
    rows = [pair_row(reference), thumb_row(True, reference), thumb_row(False, reference)]
    found = make()(rows, laid_out(*[reference] * 3))
    assert found.loss.tolist() == pytest.approx([math.log(2), 0.5, 0.5])


FLOATS = st.floats(-9, 0, allow_nan=False)
SIDES = st.tuples(FLOATS, FLOATS)
ROWS = st.lists(
    st.tuples(
        st.one_of(
            st.builds(
                pair_row,
                reference=SIDES,
                lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
                noise=st.floats(0, 0.4),
                weight=st.floats(0, 2),
                origin=st.sampled_from(["correction", "comparison", "judge"]),
                chosen_by=st.sampled_from([None, "rev-1"]),
            ),
            st.builds(thumb_row, desirable=st.booleans(), reference=SIDES),
        ),
        SIDES,
    ),
    min_size=1,
    max_size=7,
)


def gradient_of(criterion, batch, size):
    """The gradient of a batch's mean loss, in passes of ``size`` rows; and losses and margins."""
    rows, sides = zip(*batch, strict=True)
    policy = torch.tensor(sides, dtype=torch.float64, requires_grad=True)
    judged = []
    for start in range(0, len(rows), size):
        part = policy[start : start + size]
        judged.append(criterion(rows[start : start + size], part.T.reshape(-1)))
        (judged[-1].loss.sum() / len(rows)).backward()
    criterion.end_batch()
    loss, margin = (torch.cat(column).detach() for column in zip(*judged, strict=True))
    return policy.grad, loss, margin


@given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from(KINDS), st.booleans())
def test_a_batch_comes_to_the_same_one_row_at_a_time(batches, kind, wpo):
    """Micro-batches of 1, of 3 and the whole: the same gradient and state, batch after batch."""
    settings = LossSettings(kind=kind, beta=0.5, wpo=wpo)
    whole, single, threes = (
        make(settings, desirable=3, undesirable=5, live="rev-1") for _ in range(3)
    )
    for batch in batches:
        expected = gradient_of(whole, batch, len(batch))
        for criterion, size in ((single, 1), (threes, 3)):
            for found, wanted in zip(gradient_of(criterion, batch, size), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert single.state() == whole.state() == threes.state()


@given(ROWS, st.randoms(use_true_random=False))
def test_rows_stay_in_their_order(batch, random):
    order = random.sample(range(len(batch)), len(batch))
    (rows, sides), (shuffled, their_sides) = (
        zip(*rows, strict=True) for rows in (batch, [batch[i] for i in order])
    )
    expected = make(replace(PURE, nll=0.3))(rows, laid_out(*sides))
    found = make(replace(PURE, nll=0.3))(shuffled, laid_out(*their_sides))
    torch.testing.assert_close(found.loss, expected.loss[order])
    torch.testing.assert_close(found.margin, expected.margin[order])


@given(ROWS, st.sampled_from(KINDS))
def test_gradients_are_those_of_finite_differences(batch, kind):
    rows, sides = zip(*batch, strict=True)
    settings = LossSettings(kind=kind, beta=0.5)

    def loss(logps):
        return make(settings)(rows, logps).loss

    logps = laid_out(*sides).requires_grad_()
    hinges = [1 - 0.5 * h for h in make(settings)(rows, logps).margin.tolist()]
    if kind != "hinge" or min(map(abs, hinges)) > 1e-3:  # it has no derivative at its corner
        assert torch.autograd.gradcheck(loss, (logps,))


@given(st.lists(ROWS, min_size=2, max_size=4), st.integers(0, 3))
def test_a_resumed_run_goes_on_bit_for_bit(batches, stop):
    def run(criterion, batches):
        return [gradient_of(criterion, batch, 2)[1].tolist() for batch in batches]

    expected = run(make(), batches)
    first, second = make(), make()
    found = run(first, batches[:stop])
    second.restore(json.loads(json.dumps(first.state())))
    assert found + run(second, batches[stop:]) == expected


def test_processes_share_one_reference_point():
    rows, sides = [thumb_row(), thumb_row(False)], [(-1.0, 0.5), (-1.0, 0.9)]
    alone = make()
    alone(rows, laid_out(*sides))
    alone.end_batch()
    ranks = [make(), make()]
    for criterion, row, side in zip(ranks, rows, sides, strict=True):
        criterion([row], laid_out(side))
    seen = [criterion.seen() for criterion in ranks]
    for criterion in ranks:
        criterion.end_batch(Seen(sum(s.total for s in seen), sum(s.rows for s in seen)))
    assert ranks[0].state() == ranks[1].state() == alone.state()


def test_a_batch_of_pairs_says_nothing_of_the_reference_point():
    criterion = make()
    criterion([pair_row()], laid_out((-1.0, -2.0)))
    criterion.end_batch()
    assert criterion.state() == make().state()


def test_margins_are_figures_without_gradient():
    sides = laid_out((-1.0, 0.0), (-1.0, 0.0)).requires_grad_()
    for row in (pair_row(), thumb_row()):
        found = make()([row] * 2, sides)
        assert found.loss.requires_grad
        assert not found.margin.requires_grad


def test_single_precision_stays_single():
    found = make()([pair_row(), thumb_row()], laid_out((-1.0, 0.0), (-1.0, 0.0)).float())
    assert found.loss.dtype == found.margin.dtype == torch.float32
