"""Checks of what the app says before it is stored, and of the rows that a home has.

Whether the runs exist that a judgement names is checked by the store; where a row's references lead
is checked by ``integrity``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import Enum
from numbers import Integral, Real
from typing import Any, SupportsFloat, TypeVar
from uuid import UUID

import orjson

from agentpref.errors import ConfigError, InvalidFeedback, InvalidMessage, described, shown_id
from agentpref.record.messages import (
    COMPARISON_COLUMNS,
    FEEDBACK_COLUMNS,
    MAX_MESSAGE_BYTES,
    TOOLS,
    check_shapes,
    check_tool_shapes,
    plain,
    reread,
)
from agentpref.record.scales import UNIT, require_thumb
from agentpref.types import SOURCES, THUMBS, WINNERS, Comparison, Feedback, Message

Judgement = TypeVar("Judgement", Feedback, Comparison)


def checked(given: Judgement) -> Judgement:
    """Check a judgement, and copy it, because the app may change its values later.

    Raises ``InvalidFeedback`` for a field that is wrong, with its name and the cure.
    """
    columns = FEEDBACK_COLUMNS if isinstance(given, Feedback) else COMPARISON_COLUMNS
    record = {name: getattr(given, name) for name in columns}
    for name in record.keys() & {"run_a", "run_b", "key"}:  # a run_id was checked before
        record[name] = checked_id(name, record[name])
    for name, allowed in (("source", SOURCES), ("winner", WINNERS)):
        if name in record and record[name] not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise InvalidFeedback(f"{name} is {described(record[name])}; use one of {choices}")
    if isinstance(given, Feedback):
        words = (
            given.comment if not isinstance(given.comment, str) else given.comment.strip() or None
        )
        content = (given.score, given.value, given.correction, words)
        if all(part is None for part in content):
            raise InvalidFeedback(
                "the feedback has no content; pass score=, value= or comment=, or take back what "
                "was said with retract()"
            )
        if given.score is not None:
            record["score"] = _number(given.score)
            record["scale"] = UNIT if _is_bool(given.score) else None
            if given.key == THUMBS:
                require_thumb(record["score"])
    elif record["run_a"] == record["run_b"]:
        raise InvalidFeedback(
            f"run {shown_id(record['run_a'])} is compared with itself; pass the ids of two runs"
        )
    if not isinstance(given.comment, (str, type(None))):
        raise InvalidFeedback(f"comment is {described(given.comment)}; pass a string")
    if given.user_id is not None:
        record["user_id"] = as_id(given.user_id)
        if record["user_id"] is None:
            raise InvalidFeedback(
                f"user_id is {described(given.user_id)}; pass a string, a number or a UUID"
            )
    for name in ("user_id", "comment", "value", "correction"):
        if record.get(name) is not None:
            try:
                record[name] = orjson.loads(orjson.dumps(record[name], default=plain))
            except TypeError as error:
                raise InvalidFeedback(
                    f"{name} is not JSON in UTF-8: {error}; keep to strings, numbers, lists and "
                    "mappings"
                ) from error
    return type(given)(**record)


def as_id(value: Any) -> str | None:
    """Write an id as text, alike for runs, judgements and forgetting; None for any other object.

    Its ``repr`` is no name: it may hold an address, and never come again. Raises nothing.
    """
    if type(value) is str:
        return str(value)
    kind = type(value)
    try:
        if issubclass(kind, Enum):
            return as_id(value.value)
        if issubclass(kind, str):
            return _joined(str.__str__(value))
        if issubclass(kind, Decimal) and value.is_finite():
            return format(value, "f")
        if issubclass(kind, (bool, UUID)):
            return str(value)
        if issubclass(kind, Integral):
            return int.__repr__(int(value))
        if issubclass(kind, Real) and math.isfinite(value):
            return float.__repr__(float(value))
    except Exception:  # the app's own class: whatever it raises
        pass
    return None


def known_id(value: Any) -> str:
    """Write the id of a user to forget as text, as :func:`as_id` does.

    Raises:
        ConfigError: no row can have it for its user; the message names the cure.
    """
    text = as_id(value)
    if text is None:
        raise ConfigError(
            f"user_id is {described(value)}; pass a string, a number or a UUID, as the app gives "
            "it to the log"
        )
    if any(map(_is_half, text)):
        raise ConfigError(
            "user_id has half of a character, which UTF-8 cannot hold; record wrote U+FFFD in its "
            "place, so pass the id with that"
        )
    return text


def _joined(text: str) -> str:
    """Join the halves of characters that stand beside each other, as UTF-16 has them."""
    if any(map(_is_half, text)):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return text


def _is_half(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def checked_id(name: str, value: Any) -> str:
    """Take printable text, or a UUID; ``InvalidFeedback`` names any other argument."""
    text = as_id(value)
    if not isinstance(text, str) or not text or not text.isprintable():
        raise InvalidFeedback(
            f"{name} is {described(value)}; pass a non-empty string of printable text"
        )
    return text


def as_output(output: str | Message) -> Message:
    """Make an assistant's message of a plain string; a message stays as it is."""
    return {"role": "assistant", "content": output} if isinstance(output, str) else output


def tidy(message: Any) -> Any:
    """Write a message of JSON as chat templates read it, from what OpenAI's clients and vLLM send.

    Keys that are null say nothing and are left out, except ``content``, and so is an empty list of
    ``tool_calls``: some templates would render a call of it. An assistant's ``reasoning`` is named
    ``reasoning_content``. What is no mapping stays as it is.
    """
    if not isinstance(message, Mapping):
        return message
    if message.get("role") == "assistant" and not message.get("reasoning_content"):
        reasoning = message.get("reasoning")
        if isinstance(reasoning, str):
            message = {**message, "reasoning": None, "reasoning_content": reasoning}
    silent = {key for key, value in message.items() if value is None and key != "content"}
    if not message.get("tool_calls", True):
        silent.add("tool_calls")
    return {k: v for k, v in message.items() if k not in silent} if silent else message


def require_answer(output: Message) -> None:
    """Refuse a correction that says nothing, with ``InvalidFeedback``."""
    content = output.get("content")
    parts = [content] if isinstance(content, str) else content or ()
    texts = [part.get("text", "") if isinstance(part, Mapping) else part for part in parts]
    is_said = any(text.strip() if isinstance(text, str) else True for text in texts)
    is_media = any(isinstance(part, Mapping) and "text" not in part for part in parts)
    if not (is_said or is_media or output.get("tool_calls") or output.get("function_call")):
        raise InvalidFeedback(
            "the correction is empty; pass the answer as it should have been, with text or "
            "tool_calls (to say only that an answer was bad, use thumbs(run, up=False))"
        )


def as_bool(name: str, value: object) -> bool:
    """Take a bool, numpy's and torch's too; ``InvalidFeedback`` names any other argument."""
    if not _is_bool(value):
        raise InvalidFeedback(f"{name} is {described(value)}; pass True or False")
    return bool(value)


def _is_bool(value: object) -> bool:
    kind = str(getattr(value, "dtype", ""))
    is_of_array = kind in ("bool", "torch.bool") and not getattr(value, "ndim", 0)
    return is_of_array or isinstance(value, bool)


def _number(score: object) -> float:
    """Take what converts to a number, such as numpy's bools and Decimal, but no text."""
    number: float | None = None
    if isinstance(score, SupportsFloat) and not isinstance(score, (str, bytes)):
        try:
            number = float(score)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError, RuntimeError):  # an array, a signaling NaN, a tensor
            pass  # and not chained below: its message may quote text in an array
    if number is None:
        raise InvalidFeedback(
            f"score is {described(score)}; pass a number or a bool, and words as value= or comment="
        )
    if not math.isfinite(number):
        raise InvalidFeedback(f"score is {number}; pass a finite number")
    return number


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


def check_detail(name: str, value: Any) -> None:
    """Refuse a detail of a run that has the wrong type, with ``InvalidMessage``."""
    is_right, wanted = _JSON[name]
    if not is_right(value):
        raise InvalidMessage(f"{name} is {described(value)}; pass {wanted}")


# Rows of a home, which anybody may have edited


def message_fault(key: Any, parent: Any, text: Any) -> str | None:
    """Say why no log would have written this id, id of the parent and body, or return None."""
    if not _is_text_or_null(parent) or not isinstance(text, bytes):
        return "its columns are not text"
    if len(text) > MAX_MESSAGE_BYTES:
        return f"it takes more than the {MAX_MESSAGE_BYTES:,} bytes that are kept"
    try:
        body = reread(key, parent, text)
        if parent is None and isinstance(body, dict) and body.keys() == {TOOLS}:
            check_tool_shapes(body[TOOLS])
        else:
            check_shapes([body])
    except ValueError as error:
        return str(error)
    return None


def row_fault(row: Mapping[str, Any]) -> str | None:
    """Say which column of a run or judgement no log would have written, or return None."""
    for name, value in row.items():
        holds, wanted = _COLUMNS.get(name, _TEXT_OR_NULL)
        if not holds(value):
            return f"its {name} is {repr(value)[:80]}, not {wanted}"
    return None


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _is_scale(value: Any) -> bool:
    ends = (int, float, type(None))
    return isinstance(value, list) and len(value) == 2 and all(isinstance(e, ends) for e in value)


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
    "scale": _or_null((_is_json(_is_scale), "a list of two numbers in JSON")),
    "source": _one_of(SOURCES),
    "winner": _one_of(WINNERS),
}
"""The columns of the three tables that must be more than text or null, by their names."""
