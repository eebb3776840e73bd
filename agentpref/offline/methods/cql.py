"""Conservative Q-learning (2006.04779): what the log does not show is worth less.

Q is fitted as ever, and beside it pushed down on all answers of a state together, those that live
would give too, and up on the one that was given:

    min_Q  ½·E[(Q(s, a) − r − γ·max_a' Q(s', a'))²] + α·E[log Σ_a' exp Q(s, a') − Q(s, a)]

So an answer must earn its value in the log. The best by Q at each state is imitated. Values are in
standard deviations of the logged returns, so that α means the same whatever the scale of these is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from agentpref.offline.critics import largest_by_state
from agentpref.offline.methods import Lesson, Method, by_value

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers

_SWEEPS, _CLOSE, _STEPS = 60, 1e-3, 50


class CQL(Method):
    """Imitate the answer with the largest conservative Q at each state."""

    reads = frozenset({"draws", "conservatism"})
    draws = True

    def __call__(self, critic: Critic) -> Lesson:
        """Sweep the conservative fit to what was logged."""
        import numpy as np

        data = critic.data
        weight = data.weight / data.weight.sum()
        count = np.bincount(data.taken, weight, len(critic.phi))

        def target(values: Numbers) -> tuple[Numbers, Numbers]:
            outcome = data.reward + data.next_values(values)
            return count, np.bincount(data.taken, weight * outcome, len(critic.phi))

        return sweep(critic, target, self.settings.conservatism)


def sweep(
    critic: Critic, target: Callable[[Numbers], tuple[Numbers, Numbers]], alpha: float
) -> Lesson:
    """Fit Q conservatively until the values of states stay, and imitate the best by it.

    Args:
        critic: reads the logged decisions.
        target: how much each answer counts in the fit, and as much times what it comes to, both
            ``[C]``, given the values of the states, ``[S]``.
        alpha: how strongly values are pushed down.
    """
    import numpy as np

    data, theta = critic.data, np.zeros(critic.phi.shape[1])
    unit = float(data.returns().std()) or 1.0  # in which α is the same for any rewards
    best = np.zeros(len(data.turn))
    for _ in range(_SWEEPS):
        count, total = target(best * unit)
        theta = _conservative(critic, count, total / unit, alpha, theta)
        answers = critic.phi @ theta
        before, best = best, answers[largest_by_state(data, answers)]
        if np.abs(best - before).max() < _CLOSE:
            break
    answers = critic.phi @ theta
    usual = critic.fit(critic.psi[data.state], answers[data.taken], data.weight)

    def advantage(other: Decisions) -> Numbers:
        found = critic.answers(other.answer) @ theta
        return by_value(other, found, critic.states(other.turn) @ usual)

    choice = largest_by_state(data, answers)
    return Lesson(np.ones(len(data)), choice, advantage, q=theta)


def _conservative(
    critic: Critic, count: Numbers, total: Numbers, alpha: float, start: Numbers
) -> Numbers:
    """The coefficients of the conservative fit to one target; the problem is convex."""
    import numpy as np

    from agentpref.prove.bootstrap import scipy

    data, phi = critic.data, critic.phi
    # Equal decisions count together: what matters of them are sums by answer, and by state.
    weight = data.weight / data.weight.sum()
    logged = np.bincount(data.taken, weight, len(phi))
    by_state = np.bincount(data.state, weight, len(data.turn))

    def objective(theta: Numbers) -> tuple[float, Numbers]:
        q = phi @ theta
        top = np.full(len(data.turn), -np.inf)
        np.maximum.at(top, data.of, q)
        mass = np.exp(q - top[data.of])
        sums = np.bincount(data.of, mass, len(data.turn))
        soft = mass / sums[data.of]
        loss = 0.5 * (count * q * q).sum() - (total * q).sum()
        loss += alpha * ((by_state * (np.log(sums) + top)).sum() - (logged * q).sum())
        slope = count * q - total + alpha * (by_state[data.of] * soft - logged)
        penalty = 0.5 * critic.ridge * theta @ theta
        return float(loss + penalty), phi.T @ slope + critic.ridge * theta

    found = scipy("optimize").minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}
    )
    solved: Numbers = found.x
    return solved
