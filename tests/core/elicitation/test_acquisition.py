"""Rules choose what a model knows least of, and chance takes over where people err."""

from __future__ import annotations

import numpy as np
import pytest

from agentpref.elicitation.acquisition import (
    RULES,
    Candidates,
    Rule,
    candidates,
    choose,
    noise_of_agreement,
    rule_for,
)
from agentpref.errors import ConfigError
from agentpref.reward.heads import fit
from tests.core.reward.test_heads import judged


def some(n: int = 60, seed: int = 0) -> Candidates:
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(n, 3))
    known = rng.normal(size=(8, 3))
    return Candidates(
        rng.normal(size=(n, 5)) * 3, places @ places.T, places @ known.T, known @ known.T
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [0, 1, 7, 60, 99])
def test_each_rule_chooses_so_many_and_none_twice(rule: Rule, count: int) -> None:
    chosen = choose(some(), count, rule)
    assert len(chosen) == len({*chosen}) == min(count, 60)
    assert {*chosen} <= {*range(60)}


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_makes_it_the_same(rule: Rule) -> None:
    assert choose(some(), 20, rule, seed=1) == choose(some(), 20, rule, seed=1)
    assert (choose(some(), 20, rule, seed=1) != choose(some(), 20, rule, seed=2)) is (
        rule == "random"
    )


def test_entropy_takes_the_uncertain_and_of_these_those_far_apart() -> None:
    margins = np.full((100, 2), 5.0)
    margins[:50] = 0.1 * np.arange(50)[:, None]
    places = np.zeros((100, 2))
    places[10:20] = np.eye(2)[0]  # of the first fifty, these lie elsewhere
    kernel = places @ places.T
    found = choose(Candidates(margins, kernel, kernel[:, :0], kernel[:0, :0]), 5, "entropy")
    assert found[0] == 0
    assert 10 <= found[1] < 20


def test_disagreement_takes_what_the_heads_differ_about() -> None:
    margins = np.zeros((40, 2))
    margins[7] = (4.0, -4.0)
    kernel = np.eye(40)
    found = choose(Candidates(margins, kernel, kernel[:, :0], kernel[:0, :0]), 5, "disagreement")
    assert found[0] == 7


def test_d_optimal_takes_what_is_unlike_what_was_judged_and_chosen() -> None:
    places = np.repeat(np.eye(4), 10, axis=0)
    known = np.eye(4)[:1]
    one = Candidates(np.zeros((40, 2)), places @ places.T, places @ known.T, known @ known.T)
    found = choose(one, 3, "d_optimal")
    assert {number // 10 for number in found} == {1, 2, 3}


def test_noise_is_read_off_agreement_and_turns_to_chance() -> None:
    assert noise_of_agreement(1.0) == 0
    assert noise_of_agreement(0.5) == noise_of_agreement(0.3) == 0.5
    assert [rule_for(n) for n in (None, 0.0, 0.1, 0.11, 0.5)] == [
        "entropy", "entropy", "entropy", "random", "random",
    ]  # fmt: skip
    assert rule_for(0.0, "d_optimal") == "d_optimal"


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="'best' is no rule; known: random, entropy"):
        choose(some(), 3, "best")  # type: ignore[arg-type]


def test_candidates_are_measured_as_the_heads_measure() -> None:
    heads, pool = fit(judged(40)), judged(10, seed=1)
    found = candidates(heads, pool.at, pool.said)
    assert found.margins == pytest.approx(heads.margins(pool.at, pool.said))
    assert (found.kernel.shape, found.known.shape, found.judged.shape) == (
        (10, 10), (10, 40), (40, 40),
    )  # fmt: skip
    mean = (found.known @ heads.alphas.T) / heads.temperature
    assert mean == pytest.approx(found.margins, abs=1e-3)
