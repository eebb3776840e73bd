"""Conversations of several decisions: against enumeration, and a chain whose values are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agentpref.prove.ope import estimators as ope
from agentpref.prove.ope import traces

GAMMA = 0.97
STATES, RIGHT, SETTLE, DROP = 10, 0, 1, 2


def test_one_decision_is_the_bandit() -> None:
    source = np.random.default_rng(0)
    rewards, behaviour, target = (source.random((30, 1)) for _ in range(3))
    mask = np.ones((30, 1), bool)
    weights = traces.trace_weights(np.log(behaviour), np.log(target), mask)
    flat = ope.importance_weights(np.log(behaviour[:, 0]), np.log(target[:, 0]))
    assert traces.by_trace(rewards, weights, mask) == pytest.approx(ope.ips(rewards[:, 0], flat))
    for normalised in (traces.by_trace, traces.per_decision):
        found = normalised(rewards, weights, mask, normalised=True)
        assert found == pytest.approx(ope.snips(rewards[:, 0], flat))
    q, values = source.random((30, 1)), source.random((30, 1))
    found = traces.doubly_robust(
        rewards, np.log(behaviour), np.log(target), mask, q=q, values=values
    )
    assert found == pytest.approx(ope.doubly_robust(rewards[:, 0], flat, q[:, 0], values[:, 0]))


def test_all_conversations_together_have_the_true_value() -> None:
    """Two decisions of two actions each: the log is every conversation, as often as it comes."""
    behaviour, target = np.array([0.75, 0.25]), np.array([0.4, 0.6])
    paid = {(0, 0): (0.0, 1.0), (0, 1): (0.5, 0.0), (1, 0): (1.0, 0.25), (1, 1): (0.0, 2.0)}
    rows, truth = [], 0.0
    for actions in itertools.product((0, 1), repeat=2):
        rewards = paid[actions]
        chance = target[list(actions)].prod()
        truth += chance * (rewards[0] + GAMMA * rewards[1])
        rows += [(actions, rewards)] * int(16 * behaviour[list(actions)].prod())
    rewards = np.array([r for _, r in rows])
    acted = np.array([a for a, _ in rows])
    mask = np.ones_like(rewards, bool)
    logs = np.log(behaviour[acted]), np.log(target[acted])
    weights = traces.trace_weights(*logs, mask)
    assert traces.by_trace(rewards, weights, mask, gamma=GAMMA) == pytest.approx(truth)
    # Here the first reward depends on what was done later, which per decision it must not.
    late = rewards * [0.0, 1.0]
    by_trace = traces.by_trace(late, weights, mask, gamma=GAMMA)
    assert traces.per_decision(late, weights, mask, gamma=GAMMA) == pytest.approx(by_trace)
    q = np.full(rewards.shape, 0.3)
    found = traces.doubly_robust(rewards, *logs, mask, q=q, values=q, gamma=GAMMA)
    assert found == pytest.approx(traces.per_decision(rewards, weights, mask, gamma=GAMMA), abs=0.2)


def test_padding_counts_nothing() -> None:
    rewards = np.array([[1.0, 9.0], [0.5, 1.0]])
    mask = np.array([[True, False], [True, True]])
    behaviour, target = np.log([[0.5, 1.0], [0.5, 0.5]]), np.log([[0.25, 0.1], [0.5, 0.25]])
    weights = traces.trace_weights(behaviour, target, mask)
    assert weights == pytest.approx(np.array([[0.5, 0.5], [1.0, 0.5]]))
    assert traces.returns(rewards, mask) == pytest.approx([1.0, 1.5])
    assert traces.by_trace(rewards, weights, mask) == pytest.approx((0.5 + 0.75) / 2)
    assert traces.per_decision(rewards, weights, mask) == pytest.approx((0.5 + 0.5 + 0.5) / 2)
    found = traces.doubly_robust(
        rewards, behaviour, target, mask, q=0 * rewards, values=0 * rewards
    )
    assert found == pytest.approx(traces.per_decision(rewards, weights, mask))


def chain(seed: int):
    """600 traces of the support desk: (state, action, reward, next state, done)."""
    source, steps = np.random.default_rng(seed), []
    for _ in range(600):
        kind = source.random()
        plan = (0, 5, DROP) if kind < 0.25 else (0, 2, SETTLE) if kind < 0.7 else (4, 99, DROP)
        state, done = plan[0], False
        while not done:
            action = plan[2] if state >= plan[1] else RIGHT
            if source.random() < 0.05:
                action = int(source.integers(3))
            reward, after, done = step(state, action)
            steps.append((state, action, reward, after, done))
            state = after
    return steps


def step(state: int, action: int) -> tuple[float, int, bool]:
    if action == RIGHT:
        after = state + 1
        return (1.0, after, True) if after == STATES - 1 else (0.0, after, False)
    return (0.3 if action == SETTLE and state == 2 else 0.0), state, True


def true_value(policy, state: int = 0) -> float:
    total = 0.0
    for action in range(3):
        reward, after, done = step(state, action)
        if policy[state, action]:
            rest = 0.0 if done else GAMMA * true_value(policy, after)
            total += policy[state, action] * (reward + rest)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_fitted_q_finds_the_value_of_the_best_policy_though_no_trace_has_it(seed: int) -> None:
    steps = chain(seed)
    best = np.zeros((STATES, 3))
    best[:, RIGHT] = 1.0
    cloned = np.full((STATES, 3), 1e-9)
    for state, action, *_ in steps:
        cloned[state, action] += 1
    cloned /= cloned.sum(axis=1, keepdims=True)
    for policy in (best, cloned):
        found = evaluate(steps, policy)
        assert found == pytest.approx(true_value(policy), abs=0.01)
    assert true_value(best) == pytest.approx(GAMMA**8)


def evaluate(steps, policy) -> float:
    def one_hot(states, weights):
        rows = np.zeros((len(states), STATES, 3))
        rows[np.arange(len(states)), states] = weights
        return rows.reshape(len(states), -1)

    states, actions, rewards, after, done = (
        np.array(column) for column in zip(*steps, strict=True)
    )
    features = one_hot(states, np.eye(3)[actions])
    following = one_hot(np.minimum(after, STATES - 1), policy[np.minimum(after, STATES - 1)])
    theta = traces.fitted_q(features, rewards, following, done.astype(bool), gamma=GAMMA)
    return float(theta.reshape(STATES, 3)[0] @ policy[0])
