"""The losses of mixed batches, row by row, on made-up log-probs; the KL penalty by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.config import LossSettings, ThumbSettings, UpdateConfig
from agentpref.learn.encode import EncodedExample
from agentpref.learn.losses import LossOutput
from agentpref.learn.losses.apo_zero import apo_zero_loss
from agentpref.learn.losses.dpo import dpo_loss
from agentpref.learn.losses.hinge import hinge_loss
from agentpref.learn.losses.ipo import ipo_loss
from agentpref.learn.losses.robust import robust_loss
from agentpref.learn.objective import Losses, TrainingRow, kl_penalty
from tests.core.learn.examples import make_group, make_pair, make_thumb, with_completions

KINDS = ("sigmoid", "robust", "ipo", "ipo_sum", "hinge", "apo_zero")
PURE = LossSettings(beta=0.5, nll=0.0, nll_on_corrections=0.0)
"""The preference loss alone."""


def row_of(example, reference, lengths) -> TrainingRow:
    completions = tuple(tuple(range(n)) for n in lengths)
    encoded = EncodedExample(example, (1,), completions, (None,) * len(lengths))
    return TrainingRow(encoded, reference)


def pair_row(
    reference=(0.0, 0.0), lengths=(4, 2), chosen_by=None, rejected_by=None, **changes
) -> TrainingRow:
    pair = make_pair(0, "yes", "no", **{"noise": 0.0, **changes})
    pair = with_completions(pair, {"author": chosen_by}, {"author": rejected_by})
    return row_of(pair, reference, lengths)


def thumb_row(liked=True, reference=(0.0, 0.0)) -> TrainingRow:
    """A thumb; the second of its log-probs is of the mismatched completion."""
    return row_of(make_thumb(0, "yes", liked), reference, (3, 2))


def make(settings=PURE, thumbs=None, likes=1, dislikes=1, live=None) -> Losses:
    """The losses of a run with so many likes and dislikes."""
    config = UpdateConfig(loss=settings, thumbs=thumbs or ThumbSettings())
    examples = [make_thumb(0, "yes")] * likes + [make_thumb(0, "yes", liked=False)] * dislikes
    return Losses(config, examples, live)


def judge(losses, rows, logps, collision=None) -> LossOutput:
    """What ``losses`` make of rows whose log-probs are ``logps``, ``[rows, n]``."""
    lengths = torch.tensor([[len(ids) for ids in row.encoded.completions] for row in rows])
    return losses(rows, logps, lengths, collision)


def end_batch(losses) -> None:
    losses.end_batch(losses.seen())


def laid_out(*sides: tuple[float, ...], dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(sides, dtype=dtype)


def test_a_pair_by_hand():
    settings = LossSettings(beta=2.0, nll=0.25)
    row = pair_row(reference=(-2.0, -2.5), weight=3.0, noise=0.1)
    found = judge(make(settings), [row], laid_out((-1.0, -3.0)))
    good, bad = math.log1p(math.exp(-3)), math.log1p(math.exp(3))  # βh = 2·1.5
    assert found.loss.item() == pytest.approx(3 * (0.9 * good + 0.1 * bad) + 0.25 * 1 / 4)
    assert found.margin.item() == 1.5


def test_corrections_have_an_anchor_weight_of_their_own():
    settings = LossSettings(beta=0.5, nll=0.25, nll_on_corrections=2.0)
    rows = [pair_row(origin=origin) for origin in ("comparison", "correction")]
    sides = laid_out((-1.0, -3.0), (-1.0, -3.0))
    anchors = judge(make(settings), rows, sides).loss - judge(make(PURE), rows, sides).loss
    assert anchors.tolist() == pytest.approx([0.25 / 4, 2.0 / 4])


def test_each_kind_of_loss_is_its_formula():
    chosen, rejected = torch.tensor([1.0]).double(), torch.tensor([-0.6]).double()
    expected = {
        "sigmoid": dpo_loss(chosen - rejected, beta=0.5, noise=0.1),
        "robust": robust_loss(chosen - rejected, beta=0.5, noise=0.1),
        "ipo": ipo_loss(chosen / 4 - rejected / 2, beta=0.5),
        "ipo_sum": ipo_loss(chosen - rejected, beta=0.5),
        "hinge": hinge_loss(chosen - rejected, beta=0.5),
        "apo_zero": apo_zero_loss(chosen, rejected, beta=0.5),
    }
    assert expected.keys() == set(KINDS)
    row = pair_row(reference=(-3.0, -3.0), noise=0.1)
    for kind, loss in expected.items():
        found = judge(make(replace(PURE, kind=kind)), [row], laid_out((-2.0, -3.6)))
        assert found.loss.item() == pytest.approx(loss.item()), kind
        assert found.margin.item() == pytest.approx(1.6), kind
    assert len({round(loss.item(), 6) for loss in expected.values()}) == len(KINDS)


def test_loss_noise_replaces_the_noise_of_every_example():
    rows = [pair_row(noise=0.02), pair_row(noise=0.4)]
    sides = laid_out((-1.0, -3.0), (-1.0, -3.0))
    own = judge(make(), rows, sides).loss
    assert own[0] < own[1]
    for_all = judge(make(replace(PURE, noise=0.2)), rows, sides).loss
    expected = dpo_loss(torch.tensor(2.0), beta=0.5, noise=0.2).item()
    assert for_all.tolist() == pytest.approx([expected, expected])


def wpo_weights(live, collision=None):
    """How much less each of three pairs costs with WPO than without."""
    rows = [
        pair_row(chosen_by=chosen, rejected_by=rejected)
        for chosen, rejected in (("rev-1", "rev-1"), ("rev-1", None), (None, "base"))
    ]
    sides = laid_out(*[(-4.0, -6.0)] * 3).requires_grad_()
    weighed = judge(make(replace(PURE, wpo=True), live=live), rows, sides, collision).loss
    (gradient,) = torch.autograd.grad(weighed.sum(), sides)
    plain = judge(make(), rows, sides).loss
    (unweighted,) = torch.autograd.grad(plain.sum(), sides)
    weights = (weighed / plain).detach()
    torch.testing.assert_close(gradient, unweighted * weights[:, None])  # detached
    return weights.tolist()


def test_wpo_weighs_down_what_the_live_policy_did_not_write():
    chosen, rejected = math.exp(-4 / 4), math.exp(-6 / 2)  # the mean token of each answer
    assert wpo_weights("rev-1") == pytest.approx([1.0, rejected, chosen * rejected])
    assert wpo_weights(None) == pytest.approx([chosen * rejected, chosen * rejected, chosen])


def test_wpo_weights_are_aligned_by_the_collision():
    collision = laid_out(*[(-2.0, -8.0)] * 3)
    chosen = math.exp(-(4 - 2) / 4)  # and the rejected answer is likelier than a draw: 1
    assert wpo_weights("rev-1", collision) == pytest.approx([1.0, 1.0, chosen])


def test_wpo_weighs_neither_the_anchor_nor_thumbs():
    settings = LossSettings(beta=0.5, nll=1.0)
    rows, sides = [pair_row(weight=0.0), thumb_row()], laid_out((-4.0, -6.0), (-1.0, 0.0))
    found = judge(make(replace(settings, wpo=True)), rows, sides)
    assert torch.equal(found.loss, judge(make(settings), rows, sides).loss)


def test_a_thumb_by_hand():
    losses = make(thumbs=ThumbSettings(weight=0.5, desirable=2.0, undesirable=3.0))
    judge(losses, [thumb_row(reference=(0.0, -7.0))], laid_out((0.0, -6.6)))
    end_batch(losses)  # z0 = 0.4
    rows = [thumb_row(True, (-3.0, 0.0)), thumb_row(False, (-3.0, 0.0))]
    found = judge(losses, rows, laid_out((-1.0, 0.0), (-1.0, 0.0)))
    assert found.margin.tolist() == pytest.approx([1.6, -1.6])
    like, dislike = 1 / (1 + math.exp(0.5 * 1.6)), 1 / (1 + math.exp(-0.5 * 1.6))
    assert found.loss.tolist() == pytest.approx([0.5 * 2 * like, 0.5 * 3 * dislike])


@given(st.integers(1, 99), st.integers(1, 99), st.floats(0, 3))
def test_a_thumb_on_the_reference_costs_half_its_weight(likes, dislikes, weight):
    losses = make(thumbs=ThumbSettings(weight=weight), likes=likes, dislikes=dislikes)
    rows = [thumb_row(True), thumb_row(False)]
    found = judge(losses, rows, laid_out((0.0, 0.0), (0.0, 0.0)))
    all_rows = likes + dislikes
    expected = [weight * all_rows / (2 * n) / 2 for n in (likes, dislikes)]
    assert found.loss.tolist() == pytest.approx(expected)
    assert found.margin.tolist() == [0.0, 0.0]


def test_no_gradient_flows_into_a_mismatched_answer():
    losses = make()
    rows = [thumb_row(True), thumb_row(False)]
    for _ in range(2):
        sides = laid_out((-1.0, 0.7), (-1.0, 0.7)).requires_grad_()
        judge(losses, rows, sides).loss.sum().backward()
        end_batch(losses)
        (liked, *mismatched), (disliked, *mismatched_too) = sides.grad.tolist()
        assert liked < 0 < disliked
        assert mismatched == mismatched_too == [0.0]
    assert losses.state()["kto.mean"] > 0, "they move the reference point"


def test_the_first_loss_of_a_run_is_log_2_for_a_pair_and_half_its_weight_for_a_thumb():
    """The policy is then the reference."""
    reference = (-5.0, -9.0)
    rows = [pair_row(reference), thumb_row(True, reference), thumb_row(False, reference)]
    found = judge(make(), rows, laid_out(*[reference] * 3))
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
            st.builds(thumb_row, liked=st.booleans(), reference=SIDES),
        ),
        SIDES,
    ),
    min_size=1,
    max_size=7,
)


def gradient_of(losses, batch, size):
    """The gradient of a batch's mean loss, in passes of ``size`` rows; and losses and margins."""
    rows, sides = zip(*batch, strict=True)
    policy = torch.tensor(sides, dtype=torch.float64, requires_grad=True)
    outputs = []
    for start in range(0, len(rows), size):
        stop = start + size
        outputs.append(judge(losses, rows[start:stop], policy[start:stop]))
        (outputs[-1].loss.sum() / len(rows)).backward()
    end_batch(losses)
    loss, margin = (torch.cat(column).detach() for column in zip(*outputs, strict=True))
    return policy.grad, loss, margin


@given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from(KINDS), st.booleans())
def test_a_batch_has_the_same_gradient_in_passes_of_any_size(batches, kind, wpo):
    """Micro-batches of 1, of 3 and the whole: the same gradient and state, batch after batch."""
    settings = LossSettings(kind=kind, beta=0.5, wpo=wpo)
    whole, single, threes = (make(settings, likes=3, dislikes=5, live="rev-1") for _ in range(3))
    for batch in batches:
        expected = gradient_of(whole, batch, len(batch))
        for losses, size in ((single, 1), (threes, 3)):
            for found, wanted in zip(gradient_of(losses, batch, size), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert single.state() == whole.state() == threes.state()


@given(ROWS, st.randoms(use_true_random=False))
def test_losses_come_back_in_the_order_of_the_rows(batch, random):
    order = random.sample(range(len(batch)), len(batch))
    (rows, sides), (shuffled, their_sides) = (
        zip(*rows, strict=True) for rows in (batch, [batch[i] for i in order])
    )
    expected = judge(make(replace(PURE, nll=0.3)), rows, laid_out(*sides))
    found = judge(make(replace(PURE, nll=0.3)), shuffled, laid_out(*their_sides))
    torch.testing.assert_close(found.loss, expected.loss[order])
    torch.testing.assert_close(found.margin, expected.margin[order])


@given(ROWS, st.sampled_from(KINDS))
def test_gradients_are_those_of_finite_differences(batch, kind):
    rows, sides = zip(*batch, strict=True)
    settings = LossSettings(kind=kind, beta=0.5)

    def loss(logps):
        return judge(make(settings), rows, logps).loss

    logps = laid_out(*sides).requires_grad_()
    hinges = [1 - 0.5 * h for h in judge(make(settings), rows, logps).margin.tolist()]
    if kind != "hinge" or min(map(abs, hinges)) > 1e-3:  # it has no derivative at its corner
        assert torch.autograd.gradcheck(loss, (logps,))


@given(st.lists(ROWS, min_size=2, max_size=4), st.integers(0, 3))
def test_restored_losses_continue_bit_for_bit(batches, stop):
    def run(losses, batches):
        return [gradient_of(losses, batch, 2)[1].tolist() for batch in batches]

    expected = run(make(), batches)
    first, second = make(), make()
    found = run(first, batches[:stop])
    second.restore(json.loads(json.dumps(first.state())))
    assert found + run(second, batches[stop:]) == expected


def test_processes_share_one_reference_point():
    rows, sides = [thumb_row(), thumb_row(False)], [(-1.0, 0.5), (-1.0, 0.9)]
    alone = make()
    judge(alone, rows, laid_out(*sides))
    end_batch(alone)
    ranks = [make(), make()]
    for losses, row, side in zip(ranks, rows, sides, strict=True):
        judge(losses, [row], laid_out(side))
    seen = [sum(numbers) for numbers in zip(*(losses.seen() for losses in ranks), strict=True)]
    for losses in ranks:
        losses.end_batch(seen)
    assert ranks[0].state() == ranks[1].state() == alone.state()


def test_a_batch_of_pairs_does_not_move_the_reference_point():
    losses = make()
    judge(losses, [pair_row()], laid_out((-1.0, -2.0)))
    end_batch(losses)
    assert losses.state() == make().state()


def test_margins_carry_no_gradient():
    sides = laid_out((-1.0, 0.0), (-1.0, 0.0)).requires_grad_()
    for row in (pair_row(), thumb_row()):
        found = judge(make(), [row] * 2, sides)
        assert found.loss.requires_grad
        assert not found.margin.requires_grad


def test_log_probs_in_float32_give_losses_in_float32():
    logps = laid_out((-1.0, 0.0), (-1.0, 0.0)).float()
    found = judge(make(), [pair_row(), thumb_row()], logps)
    assert found.loss.dtype == found.margin.dtype == torch.float32


def test_a_group_of_four_is_judged_against_its_own_references():
    group = make_group(0, {"a": 1.0, "b": 0.6, "c": 0.3, "d": 0.0}, noise=0.0)
    reference = (-3.0, -1.0, -2.0, -4.0)
    ratios = (0.5, -0.25, 1.0, -1.5)
    row = row_of(group, reference, (4, 3, 2, 1))
    logps = laid_out(tuple(r + own for r, own in zip(reference, ratios, strict=True)))
    found = judge(make(), [row], logps)
    margins = [ratios[i] - ratios[j] for i in range(4) for j in range(i + 1, 4)]
    costs = [math.log1p(math.exp(-0.5 * h)) for h in margins]
    assert found.loss.item() == pytest.approx(sum(costs) / 6)
    assert found.margin.item() == pytest.approx(sum(margins) / 6)


@pytest.mark.parametrize("frozen", [pair_row((-3.0, -1 / 3)), thumb_row(False, (-2e-300, -7.0))])
def test_a_thawed_row_has_the_loss_of_the_frozen_one(frozen):
    frozen = frozen._replace(live=(-0.1, -math.pi))
    example = replace(frozen.encoded.example, weight=0.3, noise=0.07)
    frozen = frozen._replace(encoded=replace(frozen.encoded, example=example))
    thawed = TrainingRow.thaw(json.loads(json.dumps(frozen.freeze())))
    assert thawed[1:] == frozen[1:], "log-probs come back to the last bit"
    settings = LossSettings(beta=0.5, nll=0.2, wpo=True)
    ours, theirs = (
        judge(make(settings, live="rev-1"), [row], laid_out((-2.5, -1.0)))
        for row in (frozen, thawed)
    )
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.margin, theirs.margin)


def test_kl_penalty_by_hand():
    assert kl_penalty(torch.tensor(0.2), weight=3.0, target=0.05).item() == pytest.approx(0.45)


def test_the_kl_penalty_has_no_gradient_below_its_target():
    kl = torch.tensor(0.01, requires_grad=True)
    kl_penalty(kl, weight=3.0, target=0.05).backward()
    assert kl.grad.item() == 0.0
