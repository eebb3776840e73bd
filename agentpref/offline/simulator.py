"""A simulated user: what an answer earns and where it leads, as far as the log tells.

The model of the world is the critic's kernel regression, of the reward and of what follows: an
answer leads where those led that are like it. A linear model and fitted Q-iteration come to the
same values (Parr et al. 2008), so rolling it out until nothing changes costs one matrix. What it
adds is how unsure it is: the standard deviation of a Gaussian process with the same kernel
(Rasmussen & Williams 2006, equation 2.26), which is the disagreement of an ensemble without end.
No text of a user is made up: a conversation goes on as some that were logged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.offline.critics import Critic, Decisions

    Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Simulator:
    """Where each of C answers leads.

    Attributes:
        data: the logged decisions.
        ahead: what is expected after each answer, ``[C]``, of anything that followed the logged
            decisions, ``[n]``.
        reward: what each answer earns at once, ``[C]``.
        unsure: how little the log says of each answer, ``[C]``: 0 is all, and 1 is nothing.
    """

    data: Decisions
    ahead: Callable[[Numbers], Numbers]
    reward: Numbers
    unsure: Numbers

    @classmethod
    def of(cls, critic: Critic) -> Simulator:
        """The simulator that a critic's kernel makes of its decisions."""
        regress = critic.regression(critic.data.weight)

        def ahead(target: Numbers) -> Numbers:
            found: Numbers = critic.phi @ regress(target)
            return found

        return cls(critic.data, ahead, ahead(critic.data.reward), _unsure(critic))

    def outcomes(self, values: Numbers) -> Numbers:
        """What each answer comes to, ``[C]``: r + γ·V(s'), given the values of states, ``[S]``.

        No more is promised than any conversation came to, and no less.
        """
        returns = self.data.returns()
        found = self.reward + self.ahead(self.data.next_values(values))
        bounded: Numbers = found.clip(returns.min(), returns.max())
        return bounded


def _unsure(critic: Critic) -> Numbers:
    """The posterior standard deviation of a process of variance 1 at each answer, ``[C]``."""
    import numpy as np

    columns, weight = critic.phi[:, :-1], critic.data.weight  # the last one is the constant
    rows = columns[critic.data.taken]
    noise = critic.ridge * weight.sum()
    seen = (rows * weight[:, None]).T @ rows + noise * np.identity(columns.shape[1])
    known = (columns**2).sum(1)  # what landmarks tell of an answer's own variance of 1
    left = noise * (columns * np.linalg.solve(seen, columns.T).T).sum(1)
    found: Numbers = np.sqrt((1 - known + left).clip(0, 1))
    return found
