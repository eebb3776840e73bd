"""What a loop did, round by round, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentpref.prefer.judges.hearing import Spending
from agentpref.types import BASE, Message

Reward = Callable[[Sequence[Message], Sequence[str]], Sequence[float]]
"""Scores several answers to one prompt: ``reward(messages, answers)``; larger is better."""

Train = Callable[[Path, "Path | None", Sequence[Sequence[Message]], Reward], Path]
"""Trains by reinforcement: ``train(folder, start, prompts, reward)`` returns a new adapter's."""

Why = Literal[
    "rounds", "time", "no_rise", "nothing_promoted", "kl_budget", "judges_disagree",
    "people_disagree", "judge_spent",
]  # fmt: skip
"""Why a loop ended."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what was drawn, judged and learned, and what it brought.

    ``win_rate`` is live's over the base on held-out prompts by the judge, and ``check_rate`` the
    same by the independent one; ``agreement`` is the share of answers about which both say the
    same, of those that both decided. ``words`` are those that the judge rewards and the other one
    does not. ``verdict`` is that of the update, or ``not_learned`` where the judges parted on the
    round's pairs.
    """

    number: int
    prompts: int
    sampled: int
    decided: int
    ties: int
    position: int
    verdict: str
    revision: str | None = None
    kl: float | None = None
    win_rate: float | None = None
    win_rate_interval: tuple[float, float] | None = None
    check_rate: float | None = None
    agreement: float | None = None
    words: tuple[str, ...] = ()
    seconds: float = 0.0
    update_id: str | None = None


@dataclass(slots=True)
class OnlineReport:
    """What a loop did. ``start`` is what served before it, ``live`` what serves after it.

    ``check_spending`` is what the second judge was asked, beside the ``spending`` of the first.
    """

    judge: str
    namespace: str
    start: str
    live: str = BASE
    ended: Why = "rounds"
    because: str = ""
    rounds: list[Round] = field(default_factory=list)
    offline: str | None = None
    rolled_back: str | None = None
    spending: Spending = field(default_factory=Spending)
    check_spending: Spending = field(default_factory=Spending)
    notes: list[str] = field(default_factory=list)

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain values: what ``--json`` prints."""
        found = {name: getattr(self, name) for name in self.__slots__}
        rounds = {"rounds": [asdict(one) for one in self.rounds]}
        checked = self.check_spending.to_mapping()
        return found | rounds | {"spending": self.spending.to_mapping(), "check_spending": checked}
