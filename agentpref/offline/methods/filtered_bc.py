"""Filtered behaviour cloning: imitate the conversations that ended best, and nothing else.

It is what any other method must beat. It cannot put the good beginning of one conversation and the
good end of another together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentpref.offline.methods import Lesson, Method

if TYPE_CHECKING:
    from agentpref.offline.critics import Critic, Decisions
    from agentpref.offline.methods import Numbers


class FilteredBC(Method):
    """Weight 1 for each decision of the best ``offline.share`` of the conversations, else 0."""

    reads = frozenset({"share"})
    compares = False

    def __call__(self, critic: Critic) -> Lesson:
        """Keep the best conversations; where many are as good as the last one, all of these."""
        import numpy as np

        data = critic.data
        begins, totals = data.begins, data.totals()
        ordered = np.sort(totals[begins])[::-1]
        count = max(1, round(self.settings.share * len(ordered)))
        least = ordered[count - 1]
        kept = (totals >= least).astype(float)

        def advantage(other: Decisions) -> Numbers:
            return np.where(other.totals() >= least, 1.0, -1.0)

        return Lesson(kept, None, advantage)
