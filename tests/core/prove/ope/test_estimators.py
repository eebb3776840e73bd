"""Estimators: the golden numbers, formulas written out, and another library."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.prove.ope import estimators as ope
from agentpref.prove.ope import intervals

REWARDS = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
BEHAVIOUR = np.log([0.5, 0.25, 0.25, 0.5, 0.25, 0.25])
TARGET = np.log([0.2, 0.3, 0.5, 0.2, 0.3, 0.5])
WEIGHTS = ope.importance_weights(BEHAVIOUR, TARGET)
Q = np.array([0.4, 0.5, 0.6, 0.4, 0.5, 0.6])
VALUES = np.full(6, 0.2 * 0.4 + 0.3 * 0.5 + 0.5 * 0.6)


@pytest.mark.parametrize(
    ("name", "found", "golden"),
    [
        ("IPS", ope.ips(REWARDS, WEIGHTS), 0.933333),
        (
            "clipped",
            ope.ips(REWARDS, ope.importance_weights(BEHAVIOUR, TARGET, clip=1.5)),
            0.766667,
        ),
        ("SNIPS", ope.snips(REWARDS, WEIGHTS), 0.777778),
        ("DM", ope.direct_method(VALUES), 0.53),
        ("DR", ope.doubly_robust(REWARDS, WEIGHTS, Q, VALUES), 0.81),
        ("SNDR", ope.self_normalised_dr(REWARDS, WEIGHTS, Q, VALUES), 0.763333),
        ("Switch", ope.switch(REWARDS, WEIGHTS, Q, VALUES, threshold=1.5), 0.543333),
        ("DRos", ope.dr_with_shrinkage(REWARDS, WEIGHTS, Q, VALUES, shrinkage=1), 0.594828),
    ],
)
def test_golden_numbers(name: str, found: float, golden: float) -> None:
    assert found == pytest.approx(golden, abs=1e-6), name


def log_of(seed: int) -> dict[str, list[float]]:
    source = random.Random(seed)
    n = source.randint(2, 60)
    return {
        "r": [source.choice([source.random(), 0.0, 1.0]) for _ in range(n)],
        "b": [source.uniform(0.05, 1.0) for _ in range(n)],
        "t": [source.uniform(0.01, 1.0) for _ in range(n)],
        "q": [source.random() for _ in range(n)],
        "v": [source.random() for _ in range(n)],
    }


@pytest.mark.parametrize("seed", range(70))
def test_they_are_their_formulas_written_out(seed: int) -> None:
    log = log_of(seed)
    rewards, behaviour, target, q, values = (np.array(log[k]) for k in "rbtqv")
    weights = ope.importance_weights(np.log(behaviour), np.log(target))
    rows = [(r, t / b, q, v) for r, b, t, q, v in zip(*(log[k] for k in "rbtqv"), strict=True)]
    n = len(rows)
    total = sum(w for _, w, _, _ in rows)
    model = sum(v for *_, v in rows) / n
    missed = [(w, r - m) for r, w, m, _ in rows]
    expected = {
        "ips": sum(w * r for r, w, _, _ in rows) / n,
        "clipped": sum(min(w, 2.0) * r for r, w, _, _ in rows) / n,
        "snips": sum(w * r for r, w, _, _ in rows) / total,
        "dm": model,
        "dr": model + sum(w * e for w, e in missed) / n,
        "sndr": model + sum(w * e for w, e in missed) / total,
        "switch": model + sum(w * e for w, e in missed if w <= 2.0) / n,
        "dros": model + sum(3 * w / (w * w + 3) * e for w, e in missed) / n,
    }
    found = {
        "ips": ope.ips(rewards, weights),
        "clipped": ope.ips(rewards, np.minimum(weights, 2.0)),
        "snips": ope.snips(rewards, weights),
        "dm": ope.direct_method(values),
        "dr": ope.doubly_robust(rewards, weights, q, values),
        "sndr": ope.self_normalised_dr(rewards, weights, q, values),
        "switch": ope.switch(rewards, weights, q, values, threshold=2.0),
        "dros": ope.dr_with_shrinkage(rewards, weights, q, values, shrinkage=3),
    }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_vw_estimators_gives_the_same(seed: int) -> None:
    from estimators.bandits import gaussian, ips, snips

    log = log_of(seed)
    others = [ips.Estimator(), snips.Estimator(), gaussian.Interval()]
    for r, b, t in zip(log["r"], log["b"], log["t"], strict=True):
        for other in others:
            other.add_example(b, r, t)
    rewards = np.array(log["r"])
    weights = ope.importance_weights(np.log(log["b"]), np.log(log["t"]))
    assert ope.ips(rewards, weights) == pytest.approx(others[0].get(), rel=1e-12)
    assert ope.snips(rewards, weights) == pytest.approx(others[1].get(), rel=1e-12)
    assert tuple(intervals.gaussian(weights * rewards)) == pytest.approx(
        others[2].get(), rel=1e-9, abs=1e-12
    )


numbers = st.floats(0.0, 1.0)


@given(st.lists(st.tuples(numbers, st.floats(-3, 3)), min_size=1, max_size=40), st.floats(-5, 5))
def test_snips_moves_with_the_rewards_and_stays_among_them(
    rows: list[tuple[float, float]], shift: float
) -> None:
    rewards = np.array([r for r, _ in rows])
    weights = np.exp([w for _, w in rows])
    found = ope.snips(rewards, weights)
    assert rewards.min() - 1e-9 <= found <= rewards.max() + 1e-9
    assert ope.snips(rewards + shift, weights) == pytest.approx(found + shift, abs=1e-9)


@given(st.lists(st.tuples(numbers, st.floats(-3, 3)), min_size=1, max_size=40))
def test_shrinkage_goes_from_the_model_to_dr(rows: list[tuple[float, float]]) -> None:
    rewards = np.array([r for r, _ in rows])
    weights, q = np.exp([w for _, w in rows]), np.full(len(rows), 0.3)
    model, dr = ope.direct_method(q), ope.doubly_robust(rewards, weights, q, q)
    assert ope.dr_with_shrinkage(rewards, weights, q, q, shrinkage=0) == pytest.approx(model)
    least = ope.dr_with_shrinkage(rewards, weights, q, q, shrinkage=1e12)
    assert least == pytest.approx(dr, rel=1e-6, abs=1e-6)


def test_a_weight_is_tempered_by_a_power() -> None:
    half = ope.importance_weights(BEHAVIOUR, TARGET, power=0.5)
    assert half == pytest.approx(np.sqrt(WEIGHTS))
    assert ope.importance_weights(BEHAVIOUR, TARGET, power=0.0) == pytest.approx(np.ones(6))


def test_tokens_are_clipped_each_by_itself() -> None:
    behaviour, target = np.log([0.1, 0.5, 0.5]), np.log([0.9, 0.25, 0.5])
    found = ope.clipped_by_token(behaviour, target, np.array([0, 0, 1]), clip=2.0)
    assert found == pytest.approx([2.0 * 0.5, 1.0])


def test_a_class_has_its_mean_weight_and_the_sum_stays() -> None:
    found = ope.by_class(np.array([1.0, 3.0, 5.0]), ["short", "short", "long"])
    assert found == pytest.approx([2.0, 2.0, 5.0])


def test_several_loggers_are_one_by_their_mixture() -> None:
    logps = np.log([[0.5, 0.1], [0.25, 0.4]])
    found = ope.mixture(logps, [3, 1])
    assert found == pytest.approx(np.log([0.75 * 0.5 + 0.25 * 0.25, 0.75 * 0.1 + 0.25 * 0.4]))
    assert ope.mixture(logps, [1, 0]) == pytest.approx(logps[0])
    assert np.isfinite(ope.mixture(np.array([[-4000.0], [-4001.0]]), [1, 1])).all()


def test_balanced_weights_never_exceed_those_of_one_logger_by_more_than_its_share() -> None:
    target = np.log([0.9, 0.05])
    loggers = np.log([[0.9, 0.05], [0.01, 0.9]])
    balanced = ope.importance_weights(ope.mixture(loggers, [5, 5]), target)
    assert balanced.max() <= 2.0, "half of the log is of the target itself"
    assert math.exp(target[0] - loggers[1][0]) == pytest.approx(90.0)
