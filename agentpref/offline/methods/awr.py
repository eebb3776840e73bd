"""Advantage-weighted regression (1910.00177): imitate each answer by how much better it ended.

The advantage is the return that followed, less what usually follows from such a state. It looks at
whole conversations as they were, so it stitches nothing together either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.methods import Lesson, Method, exponential

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers


class AWR(Method):
    """exp((G − V(s))/T) for the return G from each decision on."""

    reads = frozenset({"temperature"})

    def __call__(self, critic: Critic) -> Lesson:
        """Fit V on the returns, and weigh each decision by its advantage."""
        data = critic.data
        returns = data.returns()
        theta = critic.fit(critic.psi[data.state], returns, data.weight)

        def advantage(other: Decisions) -> Numbers:
            usual = critic.states(other.turn) @ theta
            found: Numbers = other.returns() - usual[other.state]
            return found

        weights = exponential(advantage(data), returns, self.settings.temperature)
        return Lesson(weights, None, advantage)
