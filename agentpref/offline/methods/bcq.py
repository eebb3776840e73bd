"""Batch-constrained Q-learning (1812.02900, 1910.01708): the best of what live would say anyway.

At each state some answers are drawn from live, beside those that were logged there. The best by Q
among those that live supports is imitated: an answer counts as supported if live gives its tokens
at least ``offline.support`` of the probability, each in the geometric mean, that it gives those of
its likeliest answer there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.critics import largest_by_state
from agentpref.offline.methods import Lesson, Method, by_value

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers


class BCQ(Method):
    """Imitate the supported answer with the largest Q at each state."""

    reads = frozenset({"draws", "support"})
    draws = True

    def __call__(self, critic: Critic) -> Lesson:
        """Sweep Q with the best supported answer's value as the state's."""
        import numpy as np

        data = critic.data
        allowed = supported(data, self.settings.support)

        def value(answers: Numbers) -> Numbers:
            found: Numbers = answers[largest_by_state(data, answers, allowed)]
            return found

        fit = critic.q(lambda states: data.reward + data.next_values(states), value)
        usual = critic.fit(critic.psi[data.state], fit.answers[data.taken], data.weight)

        def advantage(other: Decisions) -> Numbers:
            answers = critic.answers(other.answer) @ fit.theta
            return by_value(other, answers, critic.states(other.turn) @ usual)

        choice = largest_by_state(data, fit.answers, allowed)
        return Lesson(np.ones(len(data)), choice, advantage, q=fit.theta)


def supported(data: Decisions, share: float) -> Numbers:
    """Which answers live supports, ``[C]``; all of a state where nothing is known of them."""
    import numpy as np

    known = np.where(np.isnan(data.likely), -np.inf, data.likely)
    most = np.full(len(data.turn), -np.inf)
    np.maximum.at(most, data.of, known)
    bound = most[data.of] + np.log(share)
    found: Numbers = (known >= bound) | ~np.isfinite(most[data.of])
    return found
