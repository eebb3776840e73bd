"""Whether rows of another home may be let in.

A row of our own was checked before it was written; one that comes as a file from elsewhere may hold
anything, and what is let in is read by everybody. So every column is looked at here for what a log
could have written into it. Pure functions: each says in words what is wrong, or nothing. Whether a
row's references lead anywhere is its reader's question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from agentpref.record.integrity import reread
from agentpref.record.messages import MAX_MESSAGE_BYTES, check_shapes, check_tool_shapes

TOOLS = "tools"
"""What stands for a role in the list of tools, which is the root of a chain and no message."""

_Check = Callable[[Any], bool]


def role_of(key: str, parent: Any, text: Any) -> str:
    """Check a message and say whose it is: its role, or :data:`TOOLS`.

    Args:
        key: its id.
        parent: that of the message before it, or None.
        text: its body, as bytes.

    Raises:
        ValueError: it is not what its id stands for, or nothing that a log would have taken.
    """
    if not _is_text_or_null(parent) or not isinstance(text, bytes):
        raise ValueError("its columns are no text")
    if len(text) > MAX_MESSAGE_BYTES:
        raise ValueError(f"it takes more than the {MAX_MESSAGE_BYTES:,} bytes that are kept")
    body = reread(key, parent, text)
    if parent is None and isinstance(body, dict) and body.keys() == {TOOLS}:
        check_tool_shapes(body[TOOLS])
        return TOOLS
    check_shapes([body])
    return str(body["role"])


def run_fault(row: Mapping[str, Any]) -> str | None:
    """Say which column of a run no log would have written, and why."""
    return _fault(row, _RUN)


def feedback_fault(row: Mapping[str, Any]) -> str | None:
    """Say which column of feedback no log would have written, and why."""
    return _fault(row, _FEEDBACK)


def comparison_fault(row: Mapping[str, Any]) -> str | None:
    """Say which column of a comparison no log would have written, and why."""
    return _fault(row, _COMPARISON)


def _fault(row: Mapping[str, Any], checks: Mapping[str, tuple[_Check, str]]) -> str | None:
    for name, (holds, wanted) in checks.items():
        if not holds(row[name]):
            return f"its {name} is {repr(row[name])[:80]}, not {wanted}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _json(holds: _Check) -> _Check:
    def check(value: Any) -> bool:
        try:
            return holds(orjson.loads(value))
        except orjson.JSONDecodeError:  # also for what is neither text nor bytes
            return False

    return check


def _or_null(holds: _Check) -> _Check:
    return lambda value: value is None or holds(value)


def _list_of(*kinds: type) -> _Check:
    return lambda value: isinstance(value, list) and {*map(type, value)} <= {*kinds}


def _one_of(*words: str) -> tuple[_Check, str]:
    return (lambda value: value in words, f"one of {', '.join(words)}")


_TEXT = (_is_text, "text")
_TEXT_OR_NULL = (_is_text_or_null, "text or null")
_TIME = (_is_finite, "a time")
_OBJECT = (_json(lambda value: isinstance(value, dict)), "a JSON object")
_SOURCE = _one_of("human", "model", "code")

_RUN: Mapping[str, tuple[_Check, str]] = {
    "run_id": _TEXT,
    "namespace": _TEXT,
    "created_at": _TIME,
    "prompt": _TEXT,
    "output": _TEXT,
    "model": _TEXT_OR_NULL,
    "revision": _TEXT_OR_NULL,
    "thread_id": _TEXT_OR_NULL,
    "trace_id": _TEXT_OR_NULL,
    "user_id": _TEXT_OR_NULL,
    "params": _OBJECT,
    "token_ids": (_or_null(_json(_list_of(int))), "a JSON list of integers, or null"),
    "logprobs": (
        _or_null(_json(_list_of(float, int, type(None)))),
        "a JSON list of numbers, or null",
    ),
    "tags": (_json(_list_of(str)), "a JSON list of strings"),
    "metadata": _OBJECT,
}
_FEEDBACK: Mapping[str, tuple[_Check, str]] = {
    "feedback_id": _TEXT,
    "run_id": _TEXT,
    "created_at": _TIME,
    "key": _TEXT,
    "score": (_or_null(_is_finite), "a finite number, or null"),
    "value": (_or_null(_json(lambda value: True)), "JSON, or null"),
    "comment": _TEXT_OR_NULL,
    "source": _SOURCE,
    "user_id": _TEXT_OR_NULL,
    "correction": _TEXT_OR_NULL,
}
_COMPARISON: Mapping[str, tuple[_Check, str]] = {
    "comparison_id": _TEXT,
    "created_at": _TIME,
    "run_a": _TEXT,
    "run_b": _TEXT,
    "winner": _one_of("a", "b", "tie"),
    "source": _SOURCE,
    "user_id": _TEXT_OR_NULL,
    "comment": _TEXT_OR_NULL,
}
