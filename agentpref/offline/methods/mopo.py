"""Model-based policy optimisation (MOPO, 2005.13239): plan in a simulator, less what it doubts.

The simulator (:mod:`agentpref.offline.simulator`) says what an answer earns and where it leads.
Each answer's reward is lowered by λ times how unsure that is (equation 6 of the paper), so a plan
cannot live on what the simulator makes up. The best answer of each state is imitated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.critics import largest_by_state
from agentpref.offline.methods import Lesson, Method, by_value
from agentpref.offline.simulator import Simulator

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers

_SWEEPS, _CLOSE = 200, 1e-4


class MOPO(Method):
    """Imitate the answer at each state that a plan in the simulator finds best."""

    reads = frozenset({"draws", "penalty"})
    draws = True

    def __call__(self, critic: Critic) -> Lesson:
        """Roll the simulator out until the values of states stay."""
        import numpy as np

        data = critic.data
        worth, values = plan(Simulator.of(critic), self.settings.penalty)
        theta = critic.regression(data.weight)(data.reward + data.next_values(values))
        usual = critic.fit(critic.psi[data.state], (critic.phi @ theta)[data.taken], data.weight)

        def advantage(other: Decisions) -> Numbers:
            answers = critic.answers(other.answer) @ theta
            return by_value(other, answers, critic.states(other.turn) @ usual)

        return Lesson(np.ones(len(data)), largest_by_state(data, worth), advantage)


def plan(simulator: Simulator, penalty: float) -> tuple[Numbers, Numbers]:
    """What answers ``[C]`` and states ``[S]`` are worth to who gives the best one at each state.

    ``penalty`` is λ, in standard deviations of the logged returns.
    """
    import numpy as np

    data = simulator.data
    returns = data.returns()
    doubt = penalty * float(returns.std()) * simulator.unsure
    values, close = np.zeros(len(data.turn)), _CLOSE * np.ptp(returns)
    for _ in range(_SWEEPS):
        worth = simulator.outcomes(values) - doubt
        before, values = values, worth[largest_by_state(data, worth)]
        if np.abs(values - before).max() <= close:
            break
    return worth, values
