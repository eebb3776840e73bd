"""A support agent with tools, and users of two kinds that only a question tells apart.

Something is broken. Who bought it here is sent another one, and everybody else gets a repair
booked; the right tool pays 1, the wrong one nothing, and each answer costs .1. Half of the users
bought it here. To ask first earns 1 − .2 = .8, to call a tool at once .5 − .1 = .4 in the mean, and
.9 with luck. Of the log, nine in twenty call a tool at once; as many ask, and then call either of
the tools whatever they hear, for .3 in the mean; the rest ask and call the right one. So the best
conversations are those of the lucky, and to ask looks worse than not to.
"""

from __future__ import annotations

import random

from agentpref.types import Message, Tool
from benchmarks.traces.desk import NAMES, THINGS
from benchmarks.traces.worlds import Case, Turn, World, lived

COST = 0.1
TOOL_NAMES = ("send", "book")  # a new one, or a repair
TOOLS: tuple[Tool, ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"thing": {"type": "string"}},
                "required": ["thing"],
            },
        },
    }
    for name, description in zip(TOOL_NAMES, ("Send a new one.", "Book a repair."), strict=True)
)
_QUESTION = "Did you buy it here?"
_REPLIES = ("Yes, I did.", "No, elsewhere.")


class Clarify(Case):
    """One conversation while it runs. ``kind`` is the number of the tool that is right."""

    tools, cost = TOOLS, COST

    def __init__(self, source: random.Random) -> None:
        super().__init__(source)
        self.thing, name = source.choice(THINGS), source.choice(NAMES)
        self.kind, self.asked = source.randrange(2), False
        self.hear(f"{name} here. My {self.thing} is broken.")

    def call(self, tool: int) -> str:
        """The text of a call."""
        name, thing = TOOL_NAMES[tool], self.thing
        return (
            f'<tool_call>\n{{"name": "{name}", "arguments": {{"thing": "{thing}"}}}}\n</tool_call>'
        )

    def after(self, message: Message) -> float:
        """The first question is replied to; the first call, or anything else, ends the case."""
        calls = message.get("tool_calls") or []
        called = [call["function"]["name"] for call in calls]
        if not called and not self.asked and "buy it here" in str(message["content"]):
            self.asked = True
            self.hear(_REPLIES[self.kind])
            return 0.0
        self.done = True
        return float(called == [TOOL_NAMES[self.kind]])


def conversation(source: random.Random) -> list[Turn]:
    """One logged conversation."""
    case, manner = Clarify(source), source.random()

    def choose() -> str:
        if manner >= 0.45 and not case.asked:
            return _QUESTION
        return case.call(case.kind if manner >= 0.9 else source.randrange(2))

    return lived(case, choose)


CLARIFY = World(Clarify, conversation, 1 - 2 * COST, COST, TOOLS, epochs=15)
