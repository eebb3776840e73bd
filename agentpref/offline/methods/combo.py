"""Conservative model-based policy optimisation (COMBO, 2102.08363).

Conservative Q-learning, with what a simulator says of all answers (those that live would give, too)
beside what was logged, half of each. The values of answers are pushed down at every state, and up
where they were logged, so no estimate of how unsure the simulator is takes part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.methods import Lesson, Method
from agentpref.offline.methods.cql import sweep
from agentpref.offline.simulator import Simulator

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic
    from agentpref.offline.methods import Numbers

_REAL = 0.5


class COMBO(Method):
    """Imitate the answer with the largest conservative Q at each state."""

    reads = frozenset({"draws", "conservatism"})
    draws = True

    def __call__(self, critic: Critic) -> Lesson:
        """Sweep the conservative fit to logged and simulated outcomes."""
        return learned(critic, Simulator.of(critic), self.settings.conservatism)


def learned(critic: Critic, simulator: Simulator, conservatism: float) -> Lesson:
    """What is learned of a simulator, whose answers are all tried alike at each state."""
    import numpy as np

    data = critic.data
    at = np.bincount(data.state, data.weight, len(data.turn)) / data.weight.sum()
    tried = (at / np.maximum(np.bincount(data.of, minlength=len(at)), 1))[data.of]

    def target(values: Numbers) -> tuple[Numbers, Numbers]:
        weight = _REAL * data.weight / data.weight.sum()
        outcome = data.reward + data.next_values(values)
        said = (1 - _REAL) * tried
        count = np.bincount(data.taken, weight, len(said)) + said
        total = np.bincount(data.taken, weight * outcome, len(said))
        return count, total + said * simulator.outcomes(values)

    return sweep(critic, target, conservatism)
