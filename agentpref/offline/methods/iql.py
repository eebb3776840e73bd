"""Implicit Q-learning (2110.06169): the value of the best that was seen at a state.

V(s) is an expectile of the values of the answers that were given there, so it leans to the good
ones and never asks about an answer that nobody gave; Q(s, a) is what an answer earned and the value
of where it led. So the good beginning of one conversation is worth the good end of another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.critics import expectile
from agentpref.offline.methods import Lesson, Method, by_value, exponential

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers


class IQL(Method):
    """exp((Q(s, a) − V(s))/T), with V the expectile ``offline.expectile`` of Q."""

    reads = frozenset({"temperature", "expectile"})

    def __call__(self, critic: Critic) -> Lesson:
        """Sweep Q and V, and weigh each decision by its advantage."""
        data, tau = critic.data, self.settings.expectile
        theta_v: Numbers | None = None

        def value(answers: Numbers) -> Numbers:
            nonlocal theta_v
            theta_v = expectile(critic, answers[data.taken], data.weight, tau)
            found: Numbers = critic.psi @ theta_v
            return found

        fit = critic.q(lambda states: data.reward + data.next_values(states), value)

        def advantage(other: Decisions) -> Numbers:
            answers = critic.answers(other.answer) @ fit.theta
            return by_value(other, answers, critic.states(other.turn) @ theta_v)

        weights = exponential(advantage(data), data.returns(), self.settings.temperature)
        return Lesson(weights, None, advantage, q=fit.theta)
