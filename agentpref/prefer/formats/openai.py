"""OpenAI's preference format, as its fine-tuning takes it.

A row holds ``input`` (``messages`` and, where there are any, ``tools``), ``preferred_output`` and
``non_preferred_output``, each a list of messages. ``parallel_tool_calls`` is a setting of the
request and is passed over. Messages are written as they were recorded. The format has no place for
a domain tag: OpenAI refuses keys that it does not know, so that none is written.

Pure functions from rows to values and back.
"""

from __future__ import annotations

import reprlib
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.rows import (
    Fields,
    PreferenceRow,
    answer_of,
    common_start,
    tag_of,
    tools_of,
    turns,
)
from agentpref.record.messages import prompt_of
from agentpref.types import Pair

COLUMNS = {
    "input": {"messages": ["json"], "tools": ["json"]},
    "preferred_output": ["json"],
    "non_preferred_output": ["json"],
}

_SIDES = ("preferred_output", "non_preferred_output")


def read(row: Fields) -> PreferenceRow:
    """Read two answers to one input.

    Raises:
        ExchangeError, InvalidMessage: something in the row is not what it should be.
    """
    given = row["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise ExchangeError(
            f"'input' is {reprlib.repr(given)}; write {{'messages': […]}}, with 'tools' beside "
            "them where there were any"
        )
    chosen, rejected = (turns(row[side], side, role="assistant") for side in _SIDES)
    shared = common_start(chosen, rejected, names=_SIDES)
    prompt = prompt_of([*given["messages"], *shared], tools_of(given))
    return PreferenceRow(prompt, answer_of(chosen), answer_of(rejected), tag_of(row))


def write(pair: Pair) -> dict[str, Any]:
    """Write a pair; every message can be held."""
    tools = {"tools": pair.prompt.tools} if pair.prompt.tools else {}
    asked = {"messages": pair.prompt.messages, **tools}
    return {"input": asked, _SIDES[0]: [pair.chosen], _SIDES[1]: [pair.rejected]}
