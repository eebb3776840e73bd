"""What a host may say about runs, checked and made into values before anything is written.

Whether the runs exist, and were answers to one prompt, only the store can tell.
"""

from __future__ import annotations

import math
import time
from numbers import Real
from typing import Any, get_args

import orjson

from agentpref.errors import InvalidFeedback
from agentpref.record.ids import new_id
from agentpref.record.messages import check_output, plain
from agentpref.types import Comparison, Feedback, Message, Source, Winner


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
        InvalidFeedback: naming the argument that is not what it must be.
    """
    _check_text(run_id=run_id, key=key)
    _check_choice("source", source, get_args(Source))
    if score is None and value is None:
        raise InvalidFeedback(f"feedback {key!r} says nothing; pass score=, value= or both")
    return Feedback(
        new_id(),
        run_id,
        time.time(),
        key,
        None if score is None else _number(score),
        _json("value", value),
        _words("comment", comment),
        source,
        None if user_id is None else _words("user_id", str(user_id)),
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
        InvalidFeedback: naming the argument that is not what it must be.
        InvalidMessage: the corrected output cannot be stored.
    """
    _check_text(run_id=run_id)
    _check_choice("source", source, get_args(Source))
    message = as_output(output)
    check_output(message)
    return Feedback(
        new_id(),
        run_id,
        time.time(),
        "correction",
        comment=_words("comment", comment),
        source=source,
        user_id=None if user_id is None else _words("user_id", str(user_id)),
        correction=_json("output", message),
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
        InvalidFeedback: naming the argument that is not what it must be.
    """
    _check_text(run_a=run_a, run_b=run_b)
    _check_choice("winner", winner, get_args(Winner))
    _check_choice("source", source, get_args(Source))
    if run_a == run_b:
        raise InvalidFeedback(f"run {run_a} is compared with itself; pass the ids of two runs")
    return Comparison(
        new_id(),
        time.time(),
        run_a,
        run_b,
        winner,
        source,
        None if user_id is None else _words("user_id", str(user_id)),
        _words("comment", comment),
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


def _words(name: str, text: str | None) -> str | None:
    if not isinstance(text, (str, type(None))):
        raise InvalidFeedback(f"{name} is {text!r}; pass a string")
    _json(name, text)
    return text


def _json(name: str, value: Any) -> Any:
    """Copy a value through JSON, so that the host may change it, and UTF-8 can hold it."""
    if value is None:
        return None
    try:
        return orjson.loads(orjson.dumps(value, default=plain))
    except TypeError as error:
        raise InvalidFeedback(
            f"{name} is not JSON in UTF-8: {error}; keep to strings, numbers, lists and mappings"
        ) from error
