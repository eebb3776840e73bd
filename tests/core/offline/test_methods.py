"""The methods on a desk whose values are known: who stitches, and who cannot."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from chain import GAMMA, STATES, logged, policy_of, value

from agentpref.config import OfflineSettings
from agentpref.errors import ConfigError
from agentpref.offline import critics
from agentpref.offline.critics import (
    Basis,
    Critic,
    Decisions,
    answers_of,
    expectile,
    largest_by_state,
    planned,
)
from agentpref.offline.methods import MOST_WEIGHT, load_method
from agentpref.offline.proof import expected

SEEDS = (0, 1, 2)
METHODS = ("filtered-bc", "awr", "iql", "cql", "bcq", "mopo", "combo", "airl", "trajectory-dpo")


def learned(name: str, data: Decisions, **settings: float):
    return load_method(name)(OfflineSettings(**settings))(Critic.on(data))


def earned(name: str, data: Decisions, **settings: float) -> float:
    lesson = learned(name, data, **settings)
    return value(policy_of(data, lesson.weights, lesson.choice))


@pytest.mark.parametrize("seed", SEEDS)
def test_methods_that_look_ahead_put_beginnings_and_ends_together(seed: int) -> None:
    data = logged(seed)
    assert earned("iql", data) >= 0.97
    assert earned("iql", data, expectile=0.9) >= 0.99
    assert earned("cql", data) >= 0.99
    assert earned("bcq", data) >= 0.99
    assert earned("mopo", data) >= 0.99
    assert earned("combo", data) >= 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_imitating_whole_conversations_cannot(seed: int) -> None:
    data = logged(seed)
    assert earned("filtered-bc", data, share=1.0) <= 0.4
    assert earned("filtered-bc", data) <= 0.6  # a few got through by chance
    assert earned("awr", data) <= 0.4
    assert earned("awr", data) >= earned("filtered-bc", data, share=1.0) - 0.06


def test_conversations_that_begin_alike_are_paired_by_what_they_earned() -> None:
    data = logged(0)
    lesson = learned("trajectory-dpo", data)
    assert lesson.pairs
    begins = {int(data.trace[n]): n for n in np.flatnonzero(data.begins)}
    totals = data.totals()
    for better, worse in lesson.pairs:
        assert data.state[begins[better]] == data.state[begins[worse]]
        assert totals[begins[better]] > totals[begins[worse]]
    named = list(itertools.chain(*lesson.pairs))
    assert len(named) == len({*named})
    best, worst = lesson.pairs[0]
    alike = [n for n in begins.values() if data.state[n] == data.state[begins[best]]]
    assert totals[begins[best]] == max(totals[n] for n in alike)
    assert totals[begins[worst]] == min(totals[n] for n in alike)


@pytest.mark.parametrize("name", METHODS)
def test_the_scale_of_the_rewards_does_not_matter_to_what_is_imitated(name: str) -> None:
    one, ten = (learned(name, logged(0, paid=paid)) for paid in (1.0, 10.0))
    assert one.weights == pytest.approx(ten.weights, rel=1e-4)
    assert one.choice is None or (one.choice == ten.choice).all()


@pytest.mark.parametrize(
    ("name", "setting", "other"),
    [
        ("filtered-bc", "share", 0.5),
        ("awr", "temperature", 1.0),
        ("iql", "temperature", 1.0),
        ("iql", "expectile", 0.6),
        ("bcq", "support", 1.0),
        ("cql", "conservatism", 30.0),
        ("combo", "conservatism", 30.0),
        ("mopo", "penalty", 30.0),
        ("airl", "temperature", 1.0),
        ("airl", "expectile", 0.6),
    ],
)
def test_each_setting_changes_what_is_imitated(name: str, setting: str, other: float) -> None:
    data = logged(0, noise=0.0 if setting == "penalty" else 0.05)
    usual, changed = learned(name, data), learned(name, data, **{setting: other})
    assert setting in load_method(name).reads
    if usual.choice is None:
        assert not np.allclose(usual.weights, changed.weights)
    else:
        assert (usual.choice != changed.choice).any()


@pytest.mark.parametrize("name", METHODS)
def test_what_led_to_more_has_the_larger_advantage(name: str) -> None:
    data = logged(1)
    advantage = learned(name, data).advantage(logged(2))
    going_on, dropping = (
        advantage[(logged(2).state == 6) & (logged(2).taken % 3 == action)] for action in (0, 2)
    )
    assert going_on.mean() > dropping.mean()
    assert len(advantage) == len(logged(2))


def test_no_decision_weighs_more_than_is_allowed() -> None:
    for name in ("awr", "iql"):
        weights = learned(name, logged(0), temperature=1e-3).weights
        assert weights.max() == pytest.approx(MOST_WEIGHT)
        assert np.isfinite(weights).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ridge", "error"), [(1e-9, 0.01), (1e-5, 0.01)])
def test_fitted_q_evaluation_says_what_a_policy_earns(
    seed: int, ridge: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a penalty to a hundredth; with the usual one a little less, as values shrink."""
    monkeypatch.setattr(critics, "RIDGES", (ridge,))
    data = logged(seed)
    critic, begins = Critic.on(data), data.state[data.begins]
    (right,) = planned(critic, [critic.phi[3 * np.arange(STATES)]])
    going = np.eye(3)[np.zeros(STATES, int)]
    truth = np.mean([value(going, int(state), gamma=GAMMA) for state in begins])
    assert right == pytest.approx(truth, abs=error)
    (cloned,) = planned(critic, [answers_of(critic, np.ones(len(data)))])
    of_log = policy_of(data, np.ones(len(data)), None)
    truth = np.mean([value(of_log, int(state), gamma=GAMMA) for state in begins])
    assert cloned == pytest.approx(truth, abs=error)


@pytest.mark.parametrize("seed", SEEDS)
def test_more_is_expected_of_methods_that_stitch(seed: int) -> None:
    critic, settings = Critic.on(logged(seed)), OfflineSettings()
    found = {name: expected(critic, load_method(name)(settings)(critic)) for name in METHODS}
    for name in ("iql", "cql", "bcq", "mopo", "combo"):
        assert found[name] > found["awr"] + 0.2


def test_an_expectile_rises_with_tau_from_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(critics, "RIDGES", (1e-9,))
    data = logged(0)
    critic, returns = Critic.on(data), data.returns()
    found = [
        critic.psi @ expectile(critic, returns, data.weight, tau) for tau in (0.5, 0.7, 0.9, 0.99)
    ]
    mean = critic.psi @ critic.fit(critic.psi[data.state], returns, data.weight)
    assert found[0] == pytest.approx(mean)
    seen = np.unique(data.state)
    for low, high in itertools.pairwise(found):
        assert (high[seen] >= low[seen] - 1e-6).all()


def test_returns_are_discounted_sums_of_what_followed() -> None:
    data = logged(3, 50)
    for number in range(len(data)):
        total, at, factor = 0.0, number, 1.0
        while at >= 0:
            total += factor * data.reward[at]
            factor, at = factor * data.gamma, data.after[at]
        assert data.returns()[number] == pytest.approx(total)
    begins = np.flatnonzero(data.begins)
    assert len(begins) == 50
    assert data.totals()[begins] == pytest.approx(data.returns()[begins])


def test_the_best_answer_of_a_state_is_an_allowed_one_where_any_is() -> None:
    data = logged(0, 20)
    values = np.arange(3.0 * STATES)
    assert (largest_by_state(data, values) % 3 == 2).all()
    allowed = np.arange(3 * STATES) % 3 == 1
    assert (largest_by_state(data, values, allowed) % 3 == 1).all()
    assert (largest_by_state(data, values, allowed & False) // 3 == np.arange(STATES)).all()


def test_what_is_no_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'iql'"):
        load_method("iqi")
    monkeypatch.setattr("agentpref.plugins.load", lambda group, name: len)
    with pytest.raises(ConfigError, match="must be a subclass of Method"):
        load_method("mine")


@pytest.mark.parametrize("name", [n for n in METHODS if n != "airl"])
def test_a_constant_is_nobodys_merit(name: str) -> None:
    """Each conversation is one decision here, so the same more for each changes no return.

    To AIRL the sign of a return says who demonstrates.
    """
    data = logged(0)
    alone = replace(data, after=np.full(len(data), -1), trace=np.arange(len(data)))
    usual, offset = (learned(name, replace(alone, reward=alone.reward + c)) for c in (0.0, 1000.0))
    assert usual.weights == pytest.approx(offset.weights, abs=0.05)
    assert usual.choice is None or (usual.choice == offset.choice).mean() > 0.9


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("airl", "trajectory-dpo")])
def test_where_all_earned_the_same_all_weigh_the_same(name: str) -> None:
    data = logged(0)
    for reward in (-1.0, 0.0, 1.0):
        flat = replace(data, after=np.full(len(data), -1), reward=np.full(len(data), reward))
        assert learned(name, flat).weights == pytest.approx(np.ones(len(data)))
    assert load_method(name).compares is (name != "filtered-bc")


@pytest.mark.parametrize("count", [1, 2, 3, 14])
@pytest.mark.parametrize("name", METHODS)
def test_something_is_expected_of_few_conversations_too(name: str, count: int) -> None:
    critic = Critic.on(logged(5, count))
    lesson = load_method(name)(OfflineSettings())(critic)
    assert np.isfinite(expected(critic, lesson))
    nothing = lesson._replace(weights=0 * lesson.weights, choice=None)
    assert np.isfinite(expected(critic, nothing))  # as was logged


def test_columns_are_few_and_their_products_are_the_kernels() -> None:
    source = np.random.default_rng(0)
    few = source.normal(size=(60, 900))
    basis = Basis.of(few, 0.3)
    found = basis(few)
    scaled = (few - few.mean(0)) / few.std(0)
    squares = ((scaled[:, None] - scaled[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / basis.width)
    assert found[:, :-1] @ found[:, :-1].T == pytest.approx(kernel, abs=1e-3)
    many = source.normal(size=(1500, 30))
    assert Basis.of(many, 1.0)(many).shape[1] <= 257
    far = Basis.of(many, 1.0)(many + 100.0)
    assert far[:, :-1] == pytest.approx(np.zeros_like(far[:, :-1]))
    same = np.ones((5, 3))
    assert np.isfinite(Basis.of(same, 1.0)(same)).all()


def test_the_halves_of_good_conversations_are_liked_however_many_there_are() -> None:
    data = logged(0)
    good = replace(data, reward=np.where(data.done, 1.0, 0.0), gamma=1.0)
    assert (learned("filtered-bc", good).advantage(good) > 0).all()


def test_the_penalty_is_the_one_that_tells_threads_best_that_were_left_out() -> None:
    """Many columns of noise ask for a large one, and few that tell all for a small one."""
    data = logged(0, 200)
    assert Critic.on(data).ridge <= 1e-4
    source = np.random.default_rng(0)
    noise = replace(data, answer=source.normal(size=(len(data.answer), 200)))
    alone = replace(noise, after=np.full(len(data), -1), reward=source.normal(size=len(data)))
    assert Critic.on(alone).ridge == max(critics.RIDGES)


def test_what_answers_tell_is_measured_on_threads_that_were_left_out() -> None:
    assert Critic.on(logged(0)).explained > 0.5
    data, source = logged(0), np.random.default_rng(0)
    blind = replace(data, answer=source.normal(size=(len(data.answer), 30)))
    alone = replace(blind, after=np.full(len(data), -1), reward=source.normal(size=len(data)))
    assert Critic.on(alone).explained < 0.05
    flat = replace(alone, reward=np.ones(len(data)))
    assert Critic.on(flat).explained == 1.0, "there is nothing to tell"
