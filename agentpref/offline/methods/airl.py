"""Inverse reinforcement learning (AIRL, 1710.11248): a reward from demonstrations, then IQL.

Conversations whose rewards come to more than nothing are demonstrations. What a demonstrator gets
out of an answer is learned by telling its answers from live's at the same states:

    D = exp f/(exp f + π_live),   f(s, a, s') = g(s') + γ·h(s') − h(s)

where h is what shaping takes up, so that g is the reward of where an answer leads (of the answer
itself, where the conversation ends). Both are linear in the critic's columns, so the fit is convex;
where an answer that nobody gave would lead is what a simulator expects. Implicit Q-learning then
learns from g, and the gate judges by the rewards as they were given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agentpref.errors import ConfigError
from agentpref.offline.methods import Lesson, Method
from agentpref.offline.methods.iql import IQL
from agentpref.offline.simulator import Simulator

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers

_STEPS = 500


class AIRL(Method):
    """Learn a reward from demonstrations, and weigh decisions by it as IQL does."""

    reads = IQL.reads | {"draws"}
    draws = True
    follows = True
    compares = False

    def __call__(self, critic: Critic) -> Lesson:
        """Learn the reward, and hand it to IQL.

        Raises:
            ConfigError: no conversation is a demonstration.
        """
        data = critic.data
        shown = data.totals() > 0
        if not shown.any():
            raise ConfigError(
                "all demonstrations, conversations whose rewards come to more than 0, are held "
                "out, to prove what others train; collect more"
            )
        learned = replace(data, reward=demonstrated(critic, shown))
        return IQL(self.settings)(replace(critic, data=learned))


def demonstrated(critic: Critic, shown: Numbers) -> Numbers:
    """The reward of each decision, ``[n]``, that those who ``shown`` (``[n]``) seem to follow."""
    import numpy as np

    from agentpref.prove.bootstrap import scipy

    data, count = critic.data, len(critic.phi)
    earns, shapes = _columns(critic)
    columns = np.concatenate([earns, shapes], 1)
    mine = usual(data)
    weight = data.weight * shown / (data.weight * shown).sum()
    theirs = np.bincount(data.taken, weight, count)
    at = np.bincount(data.state, weight, len(data.turn))
    others = at[data.of] * np.exp(mine)  # live's answers where demonstrators were
    told = (theirs + others) > 0
    columns, theirs, others, own = columns[told], theirs[told], others[told], mine[told]

    def objective(theta: Numbers) -> tuple[float, Numbers]:
        logit = columns @ theta - own
        loss = theirs @ np.logaddexp(0, -logit) + others @ np.logaddexp(0, logit)
        likely = np.exp(-np.logaddexp(0, -logit))
        slope = columns.T @ (others * likely - theirs * (1 - likely))
        penalty = 0.5 * critic.ridge * theta @ theta
        return float(loss + penalty), slope + critic.ridge * theta

    found = scipy("optimize").minimize(
        objective,
        np.zeros(columns.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _STEPS},
    )
    reward: Numbers = (earns @ found.x[: earns.shape[1]])[data.taken]
    return reward


def usual(data: Decisions) -> Numbers:
    """How likely live gives each answer, ``[C]``, among those of its state: logarithms.

    As in :mod:`agentpref.offline.methods.bcq`, an answer counts by the geometric mean of its
    tokens' probabilities. Where nothing is known of a state, all of its answers are alike.
    """
    import numpy as np

    known = np.where(np.isnan(data.likely), -np.inf, data.likely)
    most = np.full(len(data.turn), -np.inf)
    np.maximum.at(most, data.of, known)
    is_known = np.isfinite(most)
    known = np.where(is_known[data.of], known - np.where(is_known, most, 0)[data.of], 0.0)
    total = np.bincount(data.of, np.exp(known), len(data.turn))
    found: Numbers = known - np.log(total)[data.of]
    return found.clip(min=-50.0)


def _columns(critic: Critic) -> tuple[Numbers, Numbers]:
    """What g and the shaping read of each answer, ``[C, ·]`` each: of where it leads."""
    import numpy as np

    data, ahead = critic.data, Simulator.of(critic).ahead
    following = critic.psi[data.state[np.maximum(data.after, 0)]]
    following = following * ~data.done[:, None]
    reached = np.stack([ahead(column) for column in following.T], 1)
    ended = ahead(data.done.astype(float)).clip(0, 1)
    shaping = data.gamma * reached - critic.psi[data.of]
    return np.concatenate([reached, ended[:, None] * critic.phi], 1), shaping
