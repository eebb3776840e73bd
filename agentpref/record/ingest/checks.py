"""What may be stored: checks of what a host says, and of rows that come from another home.

Only the store can tell whether the runs exist that a judgement names, and where a row's references
lead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import orjson

from agentpref.errors import InvalidFeedback, InvalidMessage
from agentpref.record.messages import (
    MAX_MESSAGE_BYTES,
    TOOLS,
    check_output,
    check_shapes,
    check_tool_shapes,
    new_id,
    plain,
    reread,
)
from agentpref.types import SOURCES, WINNERS, Comparison, Feedback, Message, Source, Winner

# What a host says


def feedback_of(
    run_id: str,
    *,
    key: str,
    score: float | None = None,
    value: Any = None,
    comment: str | None = None,
    source: Source = "human",
    user_id: str | None = None,
) -> Feedback:
    """Make feedback of a score, a value or both.

    Raises:
        InvalidFeedback: an argument is wrong; it is named.
    """
    _check_text(run_id=run_id, key=key)
    _check_choice("source", source, SOURCES)
    if score is None and value is None:
        raise InvalidFeedback(f"feedback {key!r} says nothing; pass score=, value= or both")
    return Feedback(
        new_id(),
        run_id,
        time.time(),
        key,
        score=None if score is None else _number(score),
        value=_copy("value", value),
        comment=_text("comment", comment),
        source=source,
        user_id=_user(user_id),
    )


def correction_of(
    run_id: str,
    output: str | Message,
    *,
    comment: str | None = None,
    source: Source = "human",
    user_id: str | None = None,
) -> Feedback:
    """Make a correction: what the run should have answered.

    Raises:
        InvalidFeedback: an argument is wrong; it is named.
        InvalidMessage: the corrected output cannot be stored.
    """
    _check_text(run_id=run_id)
    _check_choice("source", source, SOURCES)
    message = as_output(output)
    check_output(message)
    return Feedback(
        new_id(),
        run_id,
        time.time(),
        "correction",
        comment=_text("comment", comment),
        source=source,
        user_id=_user(user_id),
        correction=_copy("output", message),
    )


def comparison_of(
    run_a: str,
    run_b: str,
    *,
    winner: Winner,
    source: Source = "human",
    user_id: str | None = None,
    comment: str | None = None,
) -> Comparison:
    """Make a comparison of two runs.

    Raises:
        InvalidFeedback: an argument is wrong; it is named.
    """
    _check_text(run_a=run_a, run_b=run_b)
    _check_choice("winner", winner, WINNERS)
    _check_choice("source", source, SOURCES)
    if run_a == run_b:
        raise InvalidFeedback(f"run {run_a} is compared with itself; pass the ids of two runs")
    return Comparison(
        new_id(),
        time.time(),
        run_a,
        run_b,
        winner,
        source=source,
        user_id=_user(user_id),
        comment=_text("comment", comment),
    )


def as_output(output: str | Message) -> Message:
    """Make an assistant's message of a plain string; a message stays as it is."""
    return {"role": "assistant", "content": output} if isinstance(output, str) else output


def _number(score: object) -> float:
    if not isinstance(score, Real):
        raise InvalidFeedback(
            f"score is {score!r}; pass a number or a bool, and words as value= or comment="
        )
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidFeedback(f"score is {number}; pass a finite number")
    return number


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidFeedback(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")


def _check_text(**arguments: object) -> None:
    for name, text in arguments.items():
        if not isinstance(text, str) or not text or not text.isprintable():
            raise InvalidFeedback(f"{name} is {text!r}; pass a non-empty string of printable text")


def _user(user_id: object) -> str | None:
    return None if user_id is None else _text("user_id", str(user_id))


def _text(name: str, text: str | None) -> str | None:
    if not isinstance(text, (str, type(None))):
        raise InvalidFeedback(f"{name} is {text!r}; pass a string")
    _copy(name, text)
    return text


def _copy(name: str, value: Any) -> Any:
    """Copy a value through JSON: the host may change its own, and UTF-8 must hold it."""
    if value is None:
        return None
    try:
        return orjson.loads(orjson.dumps(value, default=plain))
    except TypeError as error:
        raise InvalidFeedback(
            f"{name} is not JSON in UTF-8: {error}; keep to strings, numbers, lists and mappings"
        ) from error


# The columns of a run that hold JSON

_Check = Callable[[Any], bool]


def _list_of(*kinds: type) -> _Check:
    return lambda value: isinstance(value, list) and {*map(type, value)} <= {*kinds}


_MAPPING = (lambda value: isinstance(value, dict), "a mapping")
_JSON: Mapping[str, tuple[_Check, str]] = {
    "params": _MAPPING,
    "metadata": _MAPPING,
    "tags": (_list_of(str), "a list of strings"),
    "token_ids": (_list_of(int), "a list of int (arrays have .tolist())"),
    "logprobs": (_list_of(float, int, type(None)), "a list of float (arrays have .tolist())"),
}


def check_details(details: dict[str, Any]) -> None:
    """Refuse details of a run that are of the wrong type; make None of other empty values.

    Raises:
        InvalidMessage: with the name of the detail and what to pass.
    """
    for name, (is_right, wanted) in _JSON.items():
        value = details[name]
        if value is not None and not is_right(value):
            if value:
                raise InvalidMessage(f"{name} is {repr(value)[:80]}; pass {wanted}")
            details[name] = None


# Rows from another home: such a file may hold anything, and everybody reads what is let in.


def role_of(key: str, parent: Any, text: Any) -> str:
    """Check a message of another home and return its role, or :data:`TOOLS` for a list of tools.

    Args:
        key: its id.
        parent: the id of the message before it, or None.
        text: its body, as bytes.

    Raises:
        ValueError: it is not what its id stands for, or no log would have stored it.
    """
    if not _is_text_or_null(parent) or not isinstance(text, bytes):
        raise ValueError("its columns are not text")
    if len(text) > MAX_MESSAGE_BYTES:
        raise ValueError(f"it takes more than the {MAX_MESSAGE_BYTES:,} bytes that are kept")
    body = reread(key, parent, text)
    if parent is None and isinstance(body, dict) and body.keys() == {TOOLS}:
        check_tool_shapes(body[TOOLS])
        return TOOLS
    check_shapes([body])
    return str(body["role"])


def row_fault(row: Mapping[str, Any]) -> str | None:
    """Say which column of a run, feedback or comparison no log would have written, and why."""
    for name, value in row.items():
        holds, wanted = _COLUMNS.get(name, _TEXT_OR_NULL)
        if not holds(value):
            return f"its {name} is {repr(value)[:80]}, not {wanted}"
    return None


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _is_json(holds: _Check) -> _Check:
    def check(value: Any) -> bool:
        try:
            return isinstance(value, str) and holds(orjson.loads(value))
        except orjson.JSONDecodeError:
            return False

    return check


def _or_null(check: tuple[_Check, str]) -> tuple[_Check, str]:
    holds, wanted = check
    return (lambda value: value is None or holds(value), f"{wanted}, or null")


def _one_of(allowed: tuple[str, ...]) -> tuple[_Check, str]:
    return (lambda value: value in allowed, f"one of {', '.join(allowed)}")


_TEXT_COLUMNS = (
    "run_id", "namespace", "prompt", "output", "feedback_id", "key",
    "comparison_id", "run_a", "run_b",
)  # fmt: skip
_TEXT_OR_NULL = (_is_text_or_null, "text or null")
_IN_JSON = {name: (_is_json(holds), f"{wanted} in JSON") for name, (holds, wanted) in _JSON.items()}
_COLUMNS: Mapping[str, tuple[_Check, str]] = {
    **dict.fromkeys(_TEXT_COLUMNS, (lambda value: isinstance(value, str), "text")),
    "created_at": (_is_finite, "a time"),
    **_IN_JSON,
    "token_ids": _or_null(_IN_JSON["token_ids"]),
    "logprobs": _or_null(_IN_JSON["logprobs"]),
    "score": _or_null((_is_finite, "a finite number")),
    "value": _or_null((_is_json(lambda value: True), "JSON")),
    "source": _one_of(SOURCES),
    "winner": _one_of(WINNERS),
}
"""The columns of the three tables that must be more than text or null, by their names."""
