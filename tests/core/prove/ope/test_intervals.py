"""Intervals: how often they cover a value that is known, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from agentpref.prove.ope import estimators as ope
from agentpref.prove.ope import intervals
from agentpref.prove.ope.support import Support, refusals

ANSWERS = 8
DRAWS = 200


def bandit(seed: int, temperature: float, n: int = 300):
    """A log of a bandit over eight answers in four contexts, and the target's true value."""
    source = np.random.default_rng(seed)
    world = np.random.default_rng(7)
    scores = world.normal(size=(4, ANSWERS))
    chances = world.uniform(0.05, 0.95, size=(4, ANSWERS))
    behaviour, target = (_softmax(scores * by) for by in (0.3, temperature))
    contexts = source.integers(0, 4, n)
    answers = np.array([source.choice(ANSWERS, p=behaviour[c]) for c in contexts])
    rewards = (source.random(n) < chances[contexts, answers]).astype(float)
    weights = ope.importance_weights(
        np.log(behaviour[contexts, answers]), np.log(target[contexts, answers])
    )
    return rewards, weights, float((target * chances).sum(axis=1).mean())


def _softmax(scores):
    exp = np.exp(scores)
    return exp / exp.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_intervals_cover_the_truth_or_no_number_is_said(temperature: float) -> None:
    covered, refused = 0, 0
    for seed in range(DRAWS):
        rewards, weights, truth = bandit(seed, temperature)
        if [*refusals(Support.of(weights))]:
            refused += 1
            continue
        covered += truth in intervals.of_ratio(rewards, weights, np.arange(len(rewards)))
    said = DRAWS - refused
    assert covered >= 0.93 * said, f"{covered} of {said}, {refused} refused"


def test_a_policy_that_is_the_log_is_never_refused() -> None:
    rewards, weights, _ = bandit(0, 0.3)
    assert weights == pytest.approx(np.ones(len(weights)))
    assert [*refusals(Support.of(weights))] == []
    assert ope.snips(rewards, weights) == pytest.approx(rewards.mean())


def test_conversations_are_resampled_whole() -> None:
    rewards = np.repeat([0.0, 1.0] * 10, 30)
    groups = np.repeat(np.arange(20), 30)
    weights = np.ones(600)
    alone = intervals.of_ratio(rewards, weights, np.arange(600))
    together = intervals.of_ratio(rewards, weights, groups)
    drawn = intervals.bootstrap(lambda at: float(rewards[at].mean()), groups, resamples=500)
    assert together.high - together.low > 4 * (alone.high - alone.low)
    assert drawn.high - drawn.low == pytest.approx(together.high - together.low, rel=0.25)


def test_the_bootstrap_is_the_same_for_a_seed() -> None:
    rewards, weights, _ = bandit(1, 1.0)

    def estimate(at):
        return ope.snips(rewards[at], weights[at])

    some = [intervals.bootstrap(estimate, np.arange(300), resamples=50, seed=s) for s in (1, 1, 2)]
    assert some[0] == some[1] != some[2]


def test_bernstein_holds_at_any_size_and_is_no_wider_than_the_range() -> None:
    source = np.random.default_rng(0)
    covered = 0
    for _ in range(DRAWS):
        values = (source.random(15) < 0.2).astype(float)
        found = intervals.empirical_bernstein(values, low=0.0, high=1.0)
        covered += 0.2 in found
        assert 0.0 <= found.low <= found.high <= 1.0
    assert covered >= 0.95 * DRAWS


DEGENERATE = {
    "no answers": np.array([]),
    "one": np.array([1.0]),
    "nineteen": np.ones(19),
    "all weight on one": np.array([1000.0, *[1e-9] * 99]),
    "two of a hundred": np.array([50.0, 50.0, *[0.0] * 98]),
    "none that the target gives": np.zeros(50),
    "hardly any": np.array([1e-12] * 50),
    "half unsupported": np.full(100, 0.4),
    "a fifth unsupported": np.full(1000, 0.8),
    "exploded": np.exp(np.linspace(-200, 200, 60)),
    "infinite": np.array([np.inf, *[1.0] * 60]),
    "one in twenty has all": np.array([20.0] * 5 + [0.0] * 95),
    "heavy tail": 1 / np.arange(1, 200) ** 3,
    "a tenth above the largest": np.array([12.0, *[1.0] * 100]),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_degenerate_log_is_refused_in_words(name: str) -> None:
    said = [*refusals(Support.of(DEGENERATE[name]))]
    assert said
    assert all(len(one) > 30 for one in said)


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        (3, {"greedy": 100}, "temperature 0"),
        (0, {"greedy": 5}, "temperature 0"),
        (0, {"missing": 5}, "have no tokens"),
        (10, {"missing": 900}, "record token_ids"),
        (0, {}, "collect more rewards"),
    ],
)
def test_what_is_missing_is_named(rows: int, more: dict[str, int], words: str) -> None:
    assert words in " ".join(refusals(Support.of(np.ones(rows)), **more))


def test_greedy_answers_beside_enough_others_are_no_reason() -> None:
    assert [*refusals(Support.of(np.ones(60)), greedy=400, missing=400)] == []


def test_weights_that_differ_little_are_enough_from_fifty_answers_on() -> None:
    assert [*refusals(Support.of(np.linspace(0.5, 1.5, 50)))] == []


def test_few_conversations_and_equal_rewards_tell_nothing() -> None:
    support = Support.of(np.ones(60))
    assert "of 1 conversations" in next(refusals(support, groups=1))
    assert "all answers earned the same" in next(refusals(support, distinct=1))
    assert [*refusals(support, groups=10, distinct=2)] == []


@pytest.mark.parametrize("weights", [[-1.0] * 60, [np.nan] * 60])
def test_what_is_no_weight_is_refused_at_once(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="negative or no number"):
        Support.of(np.array(weights))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ope.importance_weights(np.zeros(1), np.zeros(5)),
        lambda: ope.importance_weights(np.zeros(2), np.zeros(2), clip=-1),
        lambda: ope.ips(np.ones(1), np.ones(5)),
        lambda: ope.snips(np.ones((2, 2)), np.ones((2, 2))),
        lambda: ope.dr_with_shrinkage(*[np.ones(2)] * 4, shrinkage=-1),
        lambda: intervals.empirical_bernstein(np.ones(9) * 5, low=0, high=1),
        lambda: intervals.empirical_bernstein(np.ones(1), low=0, high=1),
        lambda: intervals.empirical_bernstein(np.ones(9), low=0, high=1, confidence=1),
        lambda: intervals.gaussian(np.ones(9), confidence=2),
        lambda: intervals.bootstrap(lambda at: 0.0, []),
    ],
)
def test_what_fits_no_formula_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r".{15}"):
        wrong()


def test_shrinkage_without_end_is_dr() -> None:
    log = [np.array([1.0, 0.0]), np.array([2.0, 0.5]), np.full(2, 0.3), np.full(2, 0.3)]
    assert ope.dr_with_shrinkage(*log, shrinkage=np.inf) == ope.doubly_robust(*log)


def test_the_effective_size_is_kishs() -> None:
    found = Support.of(np.array([1.0, 2.0, 3.0]))
    assert found.effective == pytest.approx(36 / 14)
    assert found.largest == pytest.approx(0.5)
