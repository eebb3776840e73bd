"""The support desk of ``benchmarks.traces`` as vectors: a state is a one-hot, and so is an answer.

States 0 to 8, three actions. Going right leads on, and 1 is paid on reaching 9; settling pays .3 in
state 2. A quarter of the conversations goes right from 0 and is dropped at 5, nine in twenty settle
at 2, and the rest begin at 4 and finish; 5 % of the actions are random.
"""

from __future__ import annotations

import random

import numpy as np

from agentpref.offline.critics import Decisions

GAMMA, STATES = 0.97, 9
RIGHT, SETTLE, DROP = 0, 1, 2


def step(state: int, action: int) -> tuple[float, int, bool]:
    if action == RIGHT:
        return (1.0, state, True) if state == STATES - 1 else (0.0, state + 1, False)
    return (0.3 if action == SETTLE and state == 2 else 0.0), state, True


def logged(seed: int, count: int = 600, *, paid: float = 1.0, noise: float = 0.05) -> Decisions:
    source = random.Random(seed)
    rows: list[tuple[int, int, float, int, int]] = []
    for number in range(count):
        kind = source.random()
        begin, last, then = (
            (0, 5, DROP) if kind < 0.25 else (0, 2, SETTLE) if kind < 0.7 else (4, 99, DROP)
        )
        state, done = begin, False
        while not done:
            action = then if state >= last else RIGHT
            if source.random() < noise:
                action = source.randrange(3)
            reward, after, done = step(state, action)
            rows.append((state, action, paid * reward, -1 if done else len(rows) + 1, number))
            state = after
    state, action, reward, after, trace = (np.array(column) for column in zip(*rows, strict=True))
    answers = np.arange(3 * STATES)
    seen = np.bincount(3 * state + action, minlength=3 * STATES)
    often = seen / np.maximum(np.bincount(state, minlength=STATES), 1)[answers // 3]
    return Decisions(
        turn=np.eye(STATES),
        answer=np.eye(3 * STATES),
        of=answers // 3,
        likely=np.log(np.maximum(often, 1e-9)),
        state=state,
        taken=3 * state + action,
        reward=reward.astype(float),
        after=after,
        weight=np.ones(len(rows)),
        trace=trace,
        thread=trace,
        gamma=GAMMA,
    )


def policy_of(data: Decisions, weights, choice) -> np.ndarray:
    """P(action | state) of who imitates so; where nothing is imitated, what was logged."""
    found = np.full((STATES, 3), 1e-12)
    np.add.at(found, (data.state, data.taken % 3), 1e-9)
    if choice is None:
        np.add.at(found, (data.state, data.taken % 3), weights)
    else:
        found[np.arange(STATES), choice % 3] += 1
    return found / found.sum(1, keepdims=True)


def value(policy: np.ndarray, state: int = 0, *, gamma: float = 1.0) -> float:
    """What a policy earns from a state."""
    found = 0.0
    for action in range(3):
        reward, after, done = step(state, action)
        rest = 0.0 if done else gamma * value(policy, after, gamma=gamma)
        found += policy[state, action] * (reward + rest)
    return found
