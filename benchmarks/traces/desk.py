"""A support desk whose best policy is known, and which nobody has ever followed from start to end.

States 0 to 9, three actions. The next right step leads on, and 1.0 is paid on reaching the end;
settling pays .3 in state 2, nothing elsewhere, and ends; dropping ends with nothing. A quarter of
the logged conversations begin at 0, go right and are dropped at 5; nine in twenty go right to 2 and
settle; the rest are taken over from another desk at 4, with its transcript, and finish. 5 % of the
actions are random. So imitating whole conversations earns .3 at best from the start, and the best
policy, put together from the beginnings of some and the ends of others, 1.0.

The words that lead on in one state settle or drop the case in another, so that to know what is
right in the last states says nothing of the first ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from agentpref.types import Message

END, PAID, SETTLED = 9, 1.0, 0.3
NEXT, SETTLE, DROP = 0, 1, 2
NOISE = 0.05

THINGS = ("printer", "router", "phone", "camera", "lamp", "heater", "radio", "clock", "kettle",
          "screen")  # fmt: skip
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Henry", "Ida", "Jack", "Kate",
         "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor")  # fmt: skip

SAID = (
    ("Please open the box.", "Please open the box now."),
    ("Please turn the key.", "Please turn the key now."),
    ("Please move the table.", "Please move the table now."),
)
_MARKS = ("open the box", "turn the key", "move the table")


def words_for(action: int, state: int) -> int:
    """Which words mean an action in a state: what leads on here settles or drops elsewhere."""
    return (action + state) % len(SAID)


class Turn(NamedTuple):
    """One logged answer: the messages before it, its text, and what it earned."""

    messages: tuple[Message, ...]
    answer: str
    reward: float


class Case:
    """One conversation while it runs."""

    def __init__(self, source: random.Random, *, state: int = 0) -> None:
        self.source, self.state = source, 0
        self.thing, name = source.choice(THINGS), source.choice(NAMES)
        said = f"{name} here. My {self.thing} is at step 0."
        self.messages: list[Message] = [{"role": "user", "content": said}]
        self.done, self.earned = False, 0.0
        for _ in range(state):  # what another desk did before
            self.answer(self.say(NEXT))

    def say(self, action: int) -> str:
        """One of the ways to put an action."""
        return self.source.choice(SAID[words_for(action, self.state)])

    def answer(self, text: str) -> float:
        """Take an answer; one without any of the words drops the case."""
        words = next((n for n, mark in enumerate(_MARKS) if mark in text.lower()), None)
        action = DROP if words is None else (words - self.state) % len(SAID)
        self.messages.append({"role": "assistant", "content": text})
        reward = SETTLED if action == SETTLE and self.state == 2 else 0.0
        if action == NEXT:
            self.state += 1
            reward = PAID if self.state == END else 0.0
        self.done = action != NEXT or self.state == END
        if not self.done:
            said = f"Done. Step {self.state}."
            self.messages.append({"role": "user", "content": said})
        self.earned += reward
        return reward


def conversation(source: random.Random, *, stitched: bool = True) -> list[Turn]:
    """One logged conversation.

    With ``stitched`` false all begin at 0 and settle at 2 or go through: nothing is to be put
    together that was not seen whole.
    """
    kind = source.random()
    begin, last, then = (0, 5, DROP) if kind < 0.25 else (0, 2, SETTLE) if kind < 0.7 else (
        4 if stitched else 0, END, DROP)  # fmt: skip
    case, turns = Case(source, state=begin), []
    while not case.done:
        action = NEXT if case.state < last else then
        if source.random() < NOISE:
            action = source.randrange(3)
        before, text = tuple(case.messages), case.say(action)
        turns.append(Turn(before, text, case.answer(text)))
    return turns


def conversations(seed: int, count: int, *, stitched: bool = True) -> list[list[Turn]]:
    """The log."""
    source = random.Random(f"desk {seed}")
    return [conversation(source, stitched=stitched) for _ in range(count)]


def mean_return(cases: Sequence[Case]) -> float:
    """What some cases earned in the mean."""
    return sum(case.earned for case in cases) / len(cases)
