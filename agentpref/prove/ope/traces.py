"""Estimators of whole conversations: T decisions each, whose rewards are discounted.

``rewards``, ``behaviour`` and ``target`` are ``[n, T]``: what each decision earned, and its
log-probability under what served and under the policy that is asked about. Shorter conversations
are padded with ``mask`` false, where nothing counts. γ is ``gamma``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from agentpref.prove.ope.estimators import Numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]


def trace_weights(behaviour: Numbers, target: Numbers, mask: Mask) -> Numbers:
    """ρ_{1:t}, the product of the ratios up to each decision, ``[n, T]``."""
    ratios = np.where(mask, np.asarray(target, float) - np.asarray(behaviour, float), 0.0)
    weights: Numbers = np.exp(np.cumsum(ratios, axis=1))
    return weights


def returns(rewards: Numbers, mask: Mask, *, gamma: float = 1.0) -> Numbers:
    """Σ_t γ^t·r_t of each conversation, ``[n]``."""
    discounts = gamma ** np.arange(rewards.shape[1])
    total: Numbers = (np.where(mask, rewards, 0.0) * discounts).sum(axis=1)
    return total


def by_trace(
    rewards: Numbers, weights: Numbers, mask: Mask, *, gamma: float = 1.0, normalised: bool = False
) -> float:
    """Importance sampling per conversation: the mean of ρ_{1:T}·return.

    ``normalised`` divides by the weights' sum (WIS) instead of the number of conversations.
    """
    last = weights[:, -1]  # padding keeps the product
    total = float(np.sum(last * returns(rewards, mask, gamma=gamma)))
    return total / float(np.sum(last)) if normalised else total / len(last)


def per_decision(
    rewards: Numbers, weights: Numbers, mask: Mask, *, gamma: float = 1.0, normalised: bool = False
) -> float:
    """Importance sampling per decision (Precup et al. 2000): each reward by the ratios before it.

    ``normalised`` divides each decision's sum by that of its weights (CWPDIS, Thomas 2015).
    """
    discounts = gamma ** np.arange(rewards.shape[1])
    earned = np.where(mask, weights * rewards, 0.0).sum(axis=0)
    if not normalised:
        return float((discounts * earned).sum() / len(rewards))
    totals = weights.sum(axis=0)
    return float((discounts * np.divide(earned, totals, where=totals > 0, out=0 * earned)).sum())


def doubly_robust(
    rewards: Numbers,
    behaviour: Numbers,
    target: Numbers,
    mask: Mask,
    *,
    q: Numbers,
    values: Numbers,
    gamma: float = 1.0,
) -> float:
    """DR of conversations (1511.03722): v_t + ρ_t·(r_t + γ·V_{t+1} − q_t), from the last backwards.

    ``q`` are a model's values of the logged decisions, and ``values`` its values of the states
    before them under the policy, ``[n, T]`` both.
    """
    ratios = np.exp(np.asarray(target, float) - np.asarray(behaviour, float))
    value: Numbers = np.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        step = values[:, t] + ratios[:, t] * (rewards[:, t] + gamma * value - q[:, t])
        value = np.where(mask[:, t], step, value)
    return float(value.mean())


def fitted_q(
    features: Numbers,
    rewards: Numbers,
    following: Numbers,
    done: NDArray[np.bool_],
    *,
    gamma: float,
    ridge: float = 1e-6,
) -> Numbers:
    """Fitted Q-evaluation with linear features: θ with Q(s, a) = φ(s, a)·θ, ``[d]``.

    It is where iterated regression on r + γ·Q(s', π) ends, in one step (LSTD-Q: Lagoudakis & Parr
    2003): (Φᵀ(Φ − γΦ') + ridge·n·I)·θ = Φᵀr.

    Args:
        features: φ(s, a) of each logged decision, ``[n, d]``.
        rewards: what each earned, ``[n]``.
        following: the mean of φ(s', a') over what the policy would do next, ``[n, d]``.
        done: whether the conversation ends after it, ``[n]``.
        gamma: the discount, below 1 or with conversations that end.
        ridge: of the regression.
    """
    left = np.where(done[:, None], 0.0, following)
    penalty = ridge * len(features) * np.identity(features.shape[1])
    matrix: Numbers = np.add(features.T @ (features - gamma * left), penalty)
    return np.asarray(np.linalg.solve(matrix, features.T @ rewards), dtype=np.float64)
