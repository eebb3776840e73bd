"""What ``Log.record`` takes of a run on the caller's thread: one JSON dump, and no more.

A snapshot is cheap to make, cannot be changed by the host afterwards, and says all of a run; it is
turned into a :class:`Run` by whoever writes it. Shapes are checked at every call, text only where
the dump fails or is large: then each message is looked at, so that the error can name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from agentpref.errors import InvalidMessage
from agentpref.record.messages import (
    MAX_MESSAGE_BYTES,
    check_messages,
    check_output,
    check_output_shape,
    check_shapes,
    check_tool_shapes,
    check_tools,
    plain,
    prompt_of,
)
from agentpref.types import Message, Run, Tool

_NAMES = ("model", "revision", "thread_id", "trace_id", "user_id")


class Snapshot(NamedTuple):
    """A run as it was when it was recorded; ``body`` is JSON."""

    run_id: str
    namespace: str
    created_at: float
    body: bytes

    def thaw(self) -> Run:
        """Make the run of it. Ids that the host gave as UUIDs or numbers become strings."""
        messages, output, tools, details = orjson.loads(self.body)
        fields: dict[str, Any] = {
            name: None if details[name] is None else str(details[name]) for name in _NAMES
        }
        fields |= {name: _tuple(details[name]) for name in ("token_ids", "logprobs")}
        return Run(
            self.run_id,
            self.namespace,
            self.created_at,
            prompt_of(messages, tools),
            output,
            **fields,
            tags=tuple(details["tags"]),
            params=details["params"] or {},
            metadata=details["metadata"] or {},
        )


def freeze(
    messages: Sequence[Message],
    output: Message,
    tools: Sequence[Tool],
    details: Mapping[str, Any],
) -> bytes:
    """Dump a run as JSON.

    Parameters and metadata that JSON cannot hold are kept by their ``repr``: they describe a run,
    and are no reason to lose it.

    Raises:
        InvalidMessage: what cannot be stored, by its index or name, and the cure.
    """
    check_shapes(messages)
    check_output_shape(output)
    check_tool_shapes(tools)
    _check_details(details)
    try:
        body = orjson.dumps((messages, output, tools, details), default=plain)
    except TypeError:
        _check_texts(messages, output, tools)
        return _with_reprs(messages, output, tools, details)
    if len(body) > MAX_MESSAGE_BYTES:
        _check_texts(messages, output, tools)
    return body


def _check_texts(messages: Sequence[Message], output: Message, tools: Sequence[Tool]) -> None:
    check_messages(messages)
    check_output(output)
    check_tools(tools)


def _with_reprs(*parts: Any) -> bytes:
    try:
        return orjson.dumps(parts, default=_described)
    except TypeError as error:
        raise InvalidMessage(
            f"the run's ids, tags, params or metadata are not JSON in UTF-8: {error}; keep to "
            "strings, numbers, lists and mappings with string keys"
        ) from error


def _described(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else repr(value)


def _check_details(details: Mapping[str, Any]) -> None:
    for name in ("params", "metadata"):
        if details[name] is not None and not isinstance(details[name], Mapping):
            raise _wrong(name, details[name], "a mapping")
    tags, token_ids, logprobs = details["tags"], details["token_ids"], details["logprobs"]
    if not all(issubclass(kind, str) for kind in _kinds(tags)):
        raise _wrong("tags", tags, "a list of strings")
    if token_ids is not None and not _kinds(token_ids) <= {int}:
        raise _wrong("token_ids", token_ids, "a list of int (arrays have .tolist())")
    if logprobs is not None and not _kinds(logprobs) <= {float, int}:
        raise _wrong("logprobs", logprobs, "a list of float (arrays have .tolist())")


def _kinds(values: object) -> set[type]:
    """The types in a list; for what is no list, one that nothing allows."""
    return {*map(type, values)} if isinstance(values, (list, tuple)) else {object}


def _wrong(name: str, value: object, wanted: str) -> InvalidMessage:
    shown = repr(value)
    return InvalidMessage(f"{name} is {shown[:80]}; pass {wanted}")


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
