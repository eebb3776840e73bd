"""Instructions: what a revision is told before each conversation, behind what the app says there.

They are a part of a revision as its weights are. An engine that serves it gives them to the model
with every request, and whoever scores it asks it so; what the app sends and the log keeps is
without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agentpref.types import Example, Message

_HEAD = ("system", "developer")


def instructed(messages: Sequence[Message], instructions: str) -> tuple[Message, ...]:
    """Messages whose system prompt ends with some instructions; the same messages without any.

    >>> instructed([{"role": "user", "content": "Hi"}], "Be brief.")
    ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'})
    >>> instructed([{"role": "system", "content": "You sell tea."}], "Be brief.")
    ({'role': 'system', 'content': 'You sell tea.\\n\\nBe brief.'},)
    """
    if not instructions:
        return tuple(messages)
    if not messages or messages[0].get("role") not in _HEAD:
        return ({"role": "system", "content": instructions}, *messages)
    first, *rest = messages
    said = first.get("content")
    if isinstance(said, (list, tuple)):
        told = [*said, {"type": "text", "text": instructions}]
        return ({**first, "content": told}, *rest)
    return ({**first, "content": f"{said}\n\n{instructions}" if said else instructions}, *rest)


def instructed_example(example: Example, instructions: str) -> Example:
    """An example whose prompt is asked with some instructions; its id stays."""
    messages = instructed(example.prompt.messages, instructions)
    return replace(example, prompt=replace(example.prompt, messages=messages))
