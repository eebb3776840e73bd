"""OpenAI's format of preference fine-tuning.

A row holds ``input`` (``messages`` and optional ``tools``), ``preferred_output`` and
``non_preferred_output``, each a list of messages. ``parallel_tool_calls`` is a setting of the
request and is ignored. Messages are written as they were recorded. OpenAI refuses keys that it does
not define, so an export has no domain tag.
"""

from __future__ import annotations

from typing import Any

from agentpref.prefer.formats import (
    Fields,
    Format,
    PreferenceRecord,
    chosen_and_rejected,
    record_of_row,
    require,
    require_no_arguments,
    shared_start,
)


def read(row: Fields) -> PreferenceRecord:
    """Read two answers to one input."""
    given = row["input"]
    fits = isinstance(given, dict) and isinstance(given.get("messages"), list)
    require(fits, "'input'", given, "write {'messages': […]}, and beside it any 'tools'")
    shared, answers = shared_start(row, "preferred_output", "non_preferred_output")
    asked = [*given["messages"], *shared]
    return record_of_row(row, asked, answers, tools=given.get("tools"))


def write(record: PreferenceRecord) -> dict[str, Any]:
    """Write a pair; the format holds every message."""
    require_no_arguments(record)
    chosen, rejected = chosen_and_rejected(record)
    tools = {"tools": record.prompt.tools} if record.prompt.tools else {}
    asked = {"messages": record.prompt.messages, **tools}
    return {"input": asked, "preferred_output": [chosen], "non_preferred_output": [rejected]}


OPENAI = Format(
    shapes=(("input", "preferred_output", "non_preferred_output"),),
    read=read,
    write=write,
    columns={
        "input": {"messages": ["json"], "tools": ["json"]},
        "preferred_output": ["json"],
        "non_preferred_output": ["json"],
    },
    optional=("tools", "tag"),
)
