"""A reward model as a judge: it compares answers, and its fit has measured how right it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentpref.errors import JudgeError, NoVerdict, RewardError
from agentpref.home import Home
from agentpref.prefer.judges.calibration import Calibration, GoldVerdict, calibrate
from agentpref.prefer.judges.verdicts import Verdict
from agentpref.reward.model import RewardModel, open_reward
from agentpref.types import Message, Source

NAME = "reward"
"""The name under which a namespace's reward model judges."""


@dataclass(frozen=True)
class RewardJudge:
    """Prefers the answer with the higher mean score; what it scores alike is a tie."""

    model: RewardModel
    name: str = NAME
    source: Source = "model"

    def judge(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[tuple[Message, Message]],
    ) -> list[Verdict]:
        """Say of each pair of completions which is better.

        Raises:
            NoVerdict: an answer cannot be read under the model's base.
        """
        return [self._verdict(p, pair) for p, pair in zip(prompts, completions, strict=True)]

    def _verdict(self, prompt: Sequence[Message], pair: tuple[Message, Message]) -> Verdict:
        try:
            a, b = self.model.score(prompt, list(pair))
        except RewardError as error:
            raise NoVerdict(str(error), why="cannot be scored") from error
        apart = a.mean - b.mean
        if apart == 0:
            return Verdict("tie", 0.5)
        sure = 1 / (1 + math.exp(-min(abs(apart), 700)))
        return Verdict("a" if apart > 0 else "b", sure, f"the reward model {self.model.name}")


def open_judge_of_rewards(home: Home, namespace: str) -> tuple[RewardJudge, Calibration]:
    """A namespace's reward model as a judge, and what its fit found on held-out pairs.

    What people said of prompts that trained it says nothing of how right it is.

    Raises:
        JudgeError: the namespace has no reward model.
    """
    try:
        model = open_reward(home, namespace=namespace)
    except RewardError as error:
        raise JudgeError(str(error)) from error
    return RewardJudge(model), calibrate([*held_out_verdicts(model.about)])


def held_out_verdicts(about: Mapping[str, Any]) -> Iterator[GoldVerdict]:
    """The verdicts of a model on held-out pairs, as the report of its fit counts them."""
    for tag, one in about["quality"]["strata"].items():
        right = round(one["pairs"] * one["accuracy"])
        for number in range(one["pairs"]):
            winner: Any = "a" if number < right else "b"
            yield GoldVerdict(tag, "a", winner, winner, None)
