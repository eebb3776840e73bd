"""Heads learn what was preferred where, and say how little they know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agentpref.reward import heads as fitted
from agentpref.reward.heads import Heads, Judged, fit

D, AT = 9, 4


def judged(n: int = 200, *, seed: int = 0, clusters: bool = False, flipped: float = 0.0) -> Judged:
    """Pairs of which the first feature decides; with clusters, the other way at other prompts."""
    rng = np.random.default_rng(seed)
    at = rng.normal(size=(n, AT)).astype(np.float32) * 0.1
    side = np.where(np.arange(n) % 2, 1.0, -1.0) if clusters else np.ones(n)
    at[:, 0] += side * 2
    said = rng.normal(size=(n, D)).astype(np.float32)
    turn = np.sign(said[:, 0] * side) * np.where(rng.random(n) < flipped, -1.0, 1.0)
    return _pairs(at, said * turn[:, None], noise=max(0.05, flipped))


def _pairs(at: Any, said: Any, noise: float = 0.05) -> Judged:
    n = len(at)
    ones = np.ones(n)
    return Judged(
        at.astype(np.float32), said.astype(np.float32), np.zeros(n, bool), ones, noise * ones, ones,
        tuple(f"p{i}" for i in range(n)),
    )  # fmt: skip


def right(heads: Heads, held_out: Judged) -> float:
    return float((heads.margins(held_out.at, held_out.said).mean(1) > 0).mean())


def test_what_was_preferred_is_learned() -> None:
    assert right(fit(judged()), judged(seed=1)) > 0.85


def test_opposite_tastes_at_different_prompts_are_both_learned() -> None:
    """No linear head could: over all prompts, nothing is preferred."""
    assert right(fit(judged(400, clusters=True)), judged(seed=1, clusters=True)) > 0.85


def test_flipped_labels_do_not_turn_it() -> None:
    assert right(fit(judged(400, flipped=0.25)), judged(seed=1)) > 0.8


def test_differences_of_rewards_are_margins() -> None:
    heads, other = fit(judged()), judged(5, seed=2)
    answers = np.stack([other.said[0], np.zeros(D, np.float32)])
    rewards = heads.rewards(other.at[0], answers)
    (margin,) = heads.margins(other.at[:1], other.said[:1])
    assert rewards[0] - rewards[1] == pytest.approx(margin, abs=1e-4)


def test_thumbs_alone_are_learned() -> None:
    pairs = judged()
    sign = np.where(np.arange(200) % 2, 1.0, -1.0)
    offset = np.full(D, 7.0, np.float32)  # what all answers have in common says nothing
    thumbs = replace(
        pairs, said=pairs.said * sign[:, None].astype(np.float32) + offset,
        lone=np.ones(200, bool), sign=sign,
    )  # fmt: skip
    assert right(fit(thumbs), judged(seed=1)) > 0.85


def test_heads_agree_where_much_is_known_and_disagree_where_nothing_is() -> None:
    heads = fit(judged(400))
    known = judged(50, seed=1)
    far = known.said * 1.0
    far[:, 0] = 0  # nothing decides
    sure = np.abs(heads.margins(known.at, known.said).mean(1)) / heads.margins(
        known.at, known.said
    ).std(1)
    unsure = np.abs(heads.margins(known.at, far).mean(1)) / heads.margins(known.at, far).std(1)
    assert np.median(sure) > 3 * np.median(unsure)


def test_more_heads_and_other_seeds_are_other_samples() -> None:
    few, many = fit(judged(), heads=2), fit(judged(), heads=7)
    assert (len(few.alphas), len(many.alphas)) == (2, 7)
    assert np.allclose(few.alphas, many.alphas[:2])
    assert not np.allclose(few.alphas, fit(judged(), heads=2, seed=1).alphas)
    assert not np.allclose(few.alphas[0], few.alphas[1])


def test_margins_are_log_odds() -> None:
    """Of labels of which 3 in 10 are flipped, nothing is surer than 7 in 10."""
    rng = np.random.default_rng(3)
    known = judged(600)
    turn = np.where(rng.random(600) < 0.3, -1.0, 1.0).astype(np.float32)
    heads = fit(replace(known, said=known.said * turn[:, None]))
    held_out = judged(300, seed=1)
    sure = 1 / (1 + np.exp(-np.abs(heads.margins(held_out.at, held_out.said).mean(1))))
    assert 0.55 < sure.mean() < 0.8


def test_length_can_be_left_out() -> None:
    known = judged(300)
    known.said[:, -1] = np.abs(known.said[:, -1])  # the longer answer was always preferred
    heads = fit(known)
    longer = np.zeros((2, D), np.float32)
    longer[0, -1] = 1.0
    plain = heads.rewards(known.at[0], longer).mean(1)
    controlled = heads.rewards(known.at[0], longer, length_controlled=True).mean(1)
    assert heads.length > 0
    assert plain[0] - plain[1] - (controlled[0] - controlled[1]) == pytest.approx(heads.length)


def test_the_loss_is_bradley_and_terrys_with_its_gradient() -> None:
    torch = pytest.importorskip("torch")
    known = judged(30)
    problem = fitted._Problem(known.said, replace(known, noise=np.zeros(30)))
    u = np.random.default_rng(4).normal(size=D)
    rewards = torch.tensor(known.said.astype(np.float64))
    weights = torch.tensor(u, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(rewards @ weights).mean()  # TRL's RewardTrainer
    assert problem.mean_loss(problem.margins(u, 0.0)) == pytest.approx(loss.item(), abs=1e-5)
    found, _ = problem.minimum(1e-2, np.ones(30))
    weights = torch.tensor(found, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(rewards @ weights).mean()
    (loss + 1e-2 / 2 * weights @ weights).backward()
    assert weights.grad.abs().max() < 1e-4


def test_arrays_hold_all_of_it() -> None:
    heads, held_out = fit(judged()), judged(20, seed=1)
    again = Heads.from_arrays(heads.to_arrays())
    assert again.margins(held_out.at, held_out.said) == pytest.approx(
        heads.margins(held_out.at, held_out.said), rel=1e-3
    )
    assert (again.strength, again.length) == pytest.approx((heads.strength, heads.length))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_few_rows_can_be_fitted(n: int) -> None:
    heads = fit(judged(n))
    assert np.isfinite(heads.margins(judged(5).at, judged(5).said)).all()


@pytest.mark.parametrize("same", [0.5, 0.9, 1.0])
def test_many_judgements_of_one_prompt_can_be_fitted(same: float) -> None:
    rng = np.random.default_rng(5)
    known = judged(300)
    known.at[: int(300 * same)] = rng.normal(size=AT)
    heads = fit(known)
    assert heads.space.width > 1e-4
    assert right(heads, known) > 0.85


def test_features_that_never_change_count_nothing() -> None:
    known = judged()
    known.said[:, 3] = 0
    heads = fit(known)
    assert (heads.space.said_scale[3], heads.temperature > 0) == (0, True)
