"""When a policy says what is like nothing in the log."""

from __future__ import annotations

import numpy as np
import pytest

from agentpref.offline.proof import unlike


def answers(seed: int, count: int, *, centre: float = 0.0, size: int = 40) -> np.ndarray:
    return centre + np.random.default_rng(seed).normal(size=(count, size))


@pytest.mark.parametrize("count", [22, 60, 120])
@pytest.mark.parametrize("odd", [0, 1])
def test_what_is_far_from_all_is_unlike_them_though_one_of_them_is_odd(
    count: int, odd: int
) -> None:
    logged = answers(0, count)
    logged[:odd] += 50.0
    assert unlike(logged, answers(1, 30, centre=10.0)) == 1.0
    assert unlike(logged, answers(2, 200)) <= 0.05


def test_what_never_varied_in_the_log_tells_too() -> None:
    logged = answers(0, 60)
    logged[:, 0] = 1.0
    said = answers(1, 60)
    said[:, 0] = 1.0
    assert unlike(logged, said) <= 0.05
    said[:, 0] = 3.0
    assert unlike(logged, said) == 1.0


def test_the_logged_answers_themselves_are_like_them() -> None:
    logged = answers(0, 40)
    assert unlike(logged, logged) == 0.0
    assert unlike(logged[:1], logged[:1]) == 0.0
