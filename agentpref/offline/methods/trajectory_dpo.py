"""Trajectory preferences: of two conversations that begin alike, the one that earned more.

DPO on whole conversations (the second phase of ETO, 2403.02502, equation 5): the log-ratio of a
conversation is the sum over its answers; what users and tools said counts nothing. Conversations
are compared where they begin with the same prompt. It needs no critic, and cannot put the beginning
of one and the end of another together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.methods import Lesson, Method

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers


class TrajectoryDPO(Method):
    """Pairs the best conversation of a prompt with the worst, the second best with the next."""

    def __call__(self, critic: Critic) -> Lesson:
        """Pair conversations; each is in one pair at most."""
        import numpy as np

        data = critic.data
        begins, totals = np.flatnonzero(data.begins), data.totals()
        pairs: list[tuple[int, int]] = []
        for state in np.unique(data.state[begins]):
            alike = begins[data.state[begins] == state]
            order = alike[np.argsort(totals[alike], kind="stable")]
            pairs += [
                (int(data.trace[best]), int(data.trace[worst]))
                for worst, best in zip(order, order[::-1], strict=True)
                if totals[worst] < totals[best]
            ][: len(order) // 2]
        typical = float(np.average(totals[begins], weights=data.weight[begins]))

        def advantage(other: Decisions) -> Numbers:
            return np.where(other.totals() > typical, 1.0, -1.0)

        better = np.isin(data.trace, [best for best, _ in pairs]).astype(float)
        return Lesson(better, None, advantage, tuple(pairs))
