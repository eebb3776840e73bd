"""A simulator with a hole in it, and who falls into it; a reward that is learned by example."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chain import STATES, logged, policy_of, value
from scipy.special import logsumexp
from scipy.stats import spearmanr

from agentpref.config import OfflineSettings
from agentpref.errors import ConfigError
from agentpref.offline.critics import Critic, Decisions, largest_by_state
from agentpref.offline.methods import load_method
from agentpref.offline.methods.airl import demonstrated, usual
from agentpref.offline.methods.combo import learned
from agentpref.offline.methods.mopo import plan
from agentpref.offline.simulator import Simulator

SETTINGS = OfflineSettings()


def holed(critic: Critic) -> Simulator:
    """A simulator that promises 5 more for each answer that the log does not show."""
    found = Simulator.of(critic)
    unseen = np.bincount(critic.data.taken, minlength=len(critic.phi)) == 0
    return replace(found, reward=found.reward + 5.0 * unseen)


@pytest.mark.parametrize("seed", range(10))
def test_a_hole_in_the_simulator_takes_in_who_does_not_doubt_it(seed: int) -> None:
    critic = Critic.on(data := logged(seed, 600, noise=0.0))
    simulator = holed(critic)
    behaviour = value(policy_of(data, np.ones(len(data)), None))

    def earned(penalty: float) -> float:
        worth, _ = plan(simulator, penalty)
        return value(policy_of(data, None, largest_by_state(data, worth)))

    assert earned(0.0) < behaviour
    assert earned(SETTINGS.penalty) >= behaviour
    lesson = learned(critic, simulator, SETTINGS.conservatism)
    assert value(policy_of(data, None, lesson.choice)) >= behaviour
    bold = learned(critic, simulator, 0.0)
    assert value(policy_of(data, None, bold.choice)) < behaviour


def test_a_simulator_knows_where_answers_lead_that_were_given_often() -> None:
    data = logged(0)
    simulator = Simulator.of(Critic.on(data))
    often = np.bincount(data.taken, minlength=3 * STATES) >= 20
    number = np.arange(3 * STATES)
    ends = (number % 3 != 0) | (number == 3 * (STATES - 1))
    ended = simulator.ahead(data.done.astype(float))
    assert ended[often] == pytest.approx(ends[often].astype(float), abs=0.05)
    pays = np.where(number == 3 * (STATES - 1), 1.0, np.where(number == 3 * 2 + 1, 0.3, 0.0))
    assert simulator.reward[often] == pytest.approx(pays[often], abs=0.05)
    assert simulator.unsure[often].max() < 0.25


def test_what_the_log_does_not_show_is_unsure() -> None:
    critic = Critic.on(data := logged(0, noise=0.0))
    unsure = Simulator.of(critic).unsure
    seen = np.bincount(data.taken, minlength=3 * STATES)
    assert unsure[seen == 0].min() > 2 * unsure[seen > 0].max()
    assert ((unsure >= 0) & (unsure <= 1)).all()


def test_no_more_is_promised_than_any_conversation_came_to() -> None:
    critic = Critic.on(logged(0))
    found = holed(critic).outcomes(np.full(STATES, 100.0))
    returns = critic.data.returns()
    assert found.max() <= returns.max()
    assert found.min() >= returns.min()


GAMMA, CELLS, ACTIONS = 0.9, 12, 3


def demonstrations(seed: int) -> tuple[Decisions, np.ndarray]:
    """What somebody does who follows a planted reward of states softly, and that reward."""
    source = np.random.default_rng(seed)
    # A ring with steps of three lengths: two states are linked that lead to the same one, as is
    # asked of a world whose reward can be told from shaping (AIRL, definition C.1).
    leads = (np.arange(CELLS)[:, None] + [1, 2, 5]) % CELLS
    planted = source.normal(size=CELLS)
    values = np.zeros(CELLS)
    for _ in range(300):
        worth = planted[leads] + GAMMA * values[leads]
        values = logsumexp(worth, axis=1)
    expert = np.exp(worth - values[:, None])
    live = source.dirichlet(np.full(ACTIONS, 3.0), size=CELLS)
    state, taken, after, trace = list[int](), list[int](), list[int](), list[int]()
    for number in range(1500):
        at = int(source.integers(CELLS))
        for turn in range(8):
            action = int(source.choice(ACTIONS, p=expert[at]))
            state.append(at)
            taken.append(ACTIONS * at + action)
            after.append(len(state) if turn < 7 else -1)
            trace.append(number)
            at = int(leads[at, action])
    count = len(state)
    return Decisions(
        turn=np.eye(CELLS),
        answer=np.eye(CELLS * ACTIONS),
        of=np.arange(CELLS * ACTIONS) // ACTIONS,
        likely=np.log(live.ravel()),
        state=np.array(state),
        taken=np.array(taken),
        reward=planted[leads].ravel()[taken],
        after=np.array(after),
        weight=np.ones(count),
        trace=np.array(trace),
        thread=np.array(trace),
        gamma=GAMMA,
    ), planted[leads].ravel()


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_reward_is_recovered_from_who_follows_it(seed: int) -> None:
    data, planted = demonstrations(seed)
    found = demonstrated(Critic.on(data), np.ones(len(data), bool))
    going_on = ~data.done
    assert spearmanr(found[going_on], planted[data.taken][going_on]).statistic >= 0.9


def test_live_is_a_policy_over_the_answers_of_a_state() -> None:
    data = logged(0)
    by_state = np.bincount(data.of, np.exp(usual(data)), len(data.turn))
    assert by_state == pytest.approx(np.ones(STATES))
    unknown = replace(data, likely=np.full(len(data.of), np.nan))
    assert np.exp(usual(unknown)) == pytest.approx(np.full(3 * STATES, 1 / 3))


def test_without_a_demonstration_nothing_is_learned_from_one() -> None:
    data = logged(0)
    with pytest.raises(ConfigError, match=r"all demonstrations.*are held out"):
        load_method("airl")(SETTINGS)(Critic.on(replace(data, reward=0 * data.reward)))
