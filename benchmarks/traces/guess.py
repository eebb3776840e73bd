"""A guessing game after twenty questions (ILQL, 2206.11871): four things, and two questions.

The right guess pays 1, a wrong one nothing; each answer costs .1. Players of the log ask none, one
or both questions, and then guess what fits in six cases of ten, and anything else in four. To ask
both and guess what fits earns 1 − .3 = .7; to guess at once .25 − .1 = .15 in the mean, and .9 with
luck. Imitating the best games imitates luck.
"""

from __future__ import annotations

import random

from agentpref.types import Message
from benchmarks.traces.desk import NAMES
from benchmarks.traces.worlds import Case, Turn, World, lived

COST = 0.1
THINGS = {
    "freezer": (True, True),
    "milk": (True, False),
    "table": (False, True),
    "lamp": (False, False),
}
QUESTIONS = ("Is it cold?", "Is it big?")
_ASKS = (0.4, 0.75)  # so many ask nothing, and at most one question
_FITS = 0.6


class Guess(Case):
    """One game while it runs."""

    cost = COST

    def __init__(self, source: random.Random) -> None:
        super().__init__(source)
        self.thing = source.choice([*THINGS])
        self.known: dict[int, bool] = {}
        self.hear(f"{source.choice(NAMES)} here. Guess my thing.")

    def after(self, message: Message) -> float:
        """A question is replied to once; a guess, or anything else, ends the game."""
        text = str(message["content"])
        asked = next((n for n, question in enumerate(QUESTIONS) if question in text), None)
        if asked is not None and asked not in self.known:
            self.known[asked] = THINGS[self.thing][asked]
            self.hear("Yes." if self.known[asked] else "No.")
            return 0.0
        self.done = True
        guessed = [thing for thing in THINGS if thing in text.lower().strip(".").split()]
        return float(guessed == [self.thing])

    def fitting(self) -> list[str]:
        """The things that what is known leaves."""
        return [
            thing
            for thing, facts in THINGS.items()
            if all(facts[number] is known for number, known in self.known.items())
        ]


def conversation(source: random.Random) -> list[Turn]:
    """One logged game."""
    game, kind = Guess(source), source.random()
    asks = sum(kind >= bound for bound in _ASKS)
    order = source.sample(range(len(QUESTIONS)), len(QUESTIONS))[:asks]

    def choose() -> str:
        if len(game.known) < len(order):
            return QUESTIONS[order[len(game.known)]]
        fits = source.random() < _FITS
        return f"It is the {source.choice(game.fitting() if fits else [*THINGS])}."

    return lived(game, choose)


GUESS = World(Guess, conversation, 1 - 3 * COST, COST, epochs=15)
