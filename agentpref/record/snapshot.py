"""What ``Log.record`` takes of a run on the caller's thread: one JSON dump, and no more.

A snapshot is cheap to make and cannot be changed by the host afterwards. Whether it is a run at
all is looked at by whoever writes it (``intake.py``); only what JSON cannot hold is looked at here,
while the host's own values are still at hand to be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from agentpref.errors import InvalidMessage
from agentpref.record.judgement import as_output
from agentpref.record.messages import check_messages, check_output, check_tools, plain

PARTS = (
    "messages",
    "output",
    "tools",
    "model",
    "revision",
    "thread_id",
    "trace_id",
    "user_id",
    "params",
    "token_ids",
    "logprobs",
    "tags",
    "metadata",
)
"""What the body of a snapshot holds, in this order."""


class Snapshot(NamedTuple):
    """A run as it was when it was recorded; ``body`` is a JSON list of :data:`PARTS`."""

    run_id: str
    created_at: float
    body: bytes


def freeze(*parts: Any) -> bytes:
    """Dump the :data:`PARTS` of a run as JSON.

    Parameters and metadata that JSON cannot hold are kept by their ``repr``: they describe a run,
    and are no reason to lose it.

    Raises:
        InvalidMessage: what JSON cannot hold, by its index or name, and the cure.
    """
    try:
        return orjson.dumps(parts, default=plain)
    except TypeError:
        return _freeze_with_reprs(*parts)


def _freeze_with_reprs(messages: Any, output: Any, tools: Any, *details: Any) -> bytes:
    check_messages(messages)
    check_output(as_output(output))
    check_tools(tools)
    try:
        return orjson.dumps((messages, output, tools, *details), default=_described)
    except TypeError as error:
        raise InvalidMessage(
            f"the run's ids, tags, params or metadata are not JSON in UTF-8: {error}; keep "
            "to strings, numbers, lists and mappings, and clean text with "
            ".encode('utf-8', 'replace').decode()"
        ) from error


def _described(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else repr(value)
