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
from functools import partial

from agentpref.types import Message
from benchmarks.traces.worlds import Case, Turn, World, lived

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


class Desk(Case):
    """One conversation while it runs."""

    def __init__(self, source: random.Random, *, state: int = 0) -> None:
        super().__init__(source)
        self.state = 0
        self.thing, name = source.choice(THINGS), source.choice(NAMES)
        self.hear(f"{name} here. My {self.thing} is at step 0.")
        for _ in range(state):  # what another desk did before
            self.answer(self.say(NEXT))

    def say(self, action: int) -> str:
        """One of the ways to put an action."""
        return self.source.choice(SAID[words_for(action, self.state)])

    def after(self, message: Message) -> float:
        """One without any of the words drops the case."""
        text = str(message["content"]).lower()
        words = next((n for n, mark in enumerate(_MARKS) if mark in text), None)
        action = DROP if words is None else (words - self.state) % len(SAID)
        reward = SETTLED if action == SETTLE and self.state == 2 else 0.0
        if action == NEXT:
            self.state += 1
            reward = PAID if self.state == END else 0.0
        self.done = action != NEXT or self.state == END
        if not self.done:
            self.hear(f"Done. Step {self.state}.")
        return reward


def conversation(source: random.Random, *, stitched: bool = True) -> list[Turn]:
    """One logged conversation.

    With ``stitched`` false all begin at 0 and settle at 2 or go through: nothing is to be put
    together that was not seen whole.
    """
    kind = source.random()
    begin, last, then = (0, 5, DROP) if kind < 0.25 else (0, 2, SETTLE) if kind < 0.7 else (
        4 if stitched else 0, END, DROP)  # fmt: skip
    case = Desk(source, state=begin)

    def choose() -> str:
        action = NEXT if case.state < last else then
        return case.say(source.randrange(3) if source.random() < NOISE else action)

    return lived(case, choose)


DESK = World(Desk, conversation, PAID)
WHOLE = World(Desk, partial(conversation, stitched=False), PAID)
