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
from agentpref.record.ingest.judgement import as_output
from agentpref.record.messages import check_messages, check_output, check_tools, plain


class Parts(NamedTuple):
    """What the body of a snapshot holds, in this order."""

    messages: Any
    output: Any
    tools: Any
    model: Any
    revision: Any
    thread_id: Any
    trace_id: Any
    user_id: Any
    params: Any
    token_ids: Any
    logprobs: Any
    tags: Any
    metadata: Any


class Snapshot(NamedTuple):
    """A run as it was when it was recorded; ``body`` is a JSON list of :class:`Parts`."""

    run_id: str
    created_at: float
    body: bytes

    def thaw(self) -> Parts:
        """Read the parts again; a tuple comes back as a list."""
        return Parts(*orjson.loads(self.body))


def freeze(*parts: Any) -> bytes:
    """Dump the :class:`Parts` of a run as JSON.

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
