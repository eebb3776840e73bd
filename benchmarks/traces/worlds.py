"""What a world is: cases that a policy answers turn by turn, and a log of how others answered."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agentpref.models.tool_calls import assistant_message
from agentpref.types import Message, Tool


class Turn(NamedTuple):
    """One logged answer: the messages before it, its text, and what it earned."""

    messages: tuple[Message, ...]
    answer: str
    reward: float


class Case(ABC):
    """One conversation while it runs. ``earned`` is its rewards less what its answers cost."""

    tools: tuple[Tool, ...] = ()
    cost = 0.0

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.messages: list[Message] = []
        self.done, self.earned = False, 0.0

    def hear(self, text: str) -> None:
        """Take what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> float:
        """Take an answer, and return what it earns at once, without its cost."""
        message = assistant_message(text, turn=len(self.messages))
        self.messages.append(message)
        reward = self.after(message)
        self.earned += reward - self.cost
        return reward

    @abstractmethod
    def after(self, message: Message) -> float:
        """Go on after an answer; return what it earned."""


class World(NamedTuple):
    """A kind of cases, one logged conversation of it, and what its best policy earns."""

    case: Callable[[random.Random], Case]
    conversation: Callable[[random.Random], list[Turn]]
    optimum: float
    cost: float = 0.0
    tools: tuple[Tool, ...] = ()
    epochs: int = 6
    """In so many epochs the bundled model learns to talk as the log does."""

    def log(self, seed: int, count: int) -> list[list[Turn]]:
        """Some conversations."""
        source = random.Random(f"desk {seed}")
        return [self.conversation(source) for _ in range(count)]


def lived(case: Case, choose: Callable[[], str]) -> list[Turn]:
    """The turns of a case that somebody answers."""
    turns = []
    while not case.done:
        before, text = tuple(case.messages), choose()
        turns.append(Turn(before, text, case.answer(text)))
    return turns


def mean_return(cases: Sequence[Case]) -> float:
    """What some cases earned in the mean."""
    return sum(case.earned for case in cases) / len(cases)
