"""Makes JSON of what JSON cannot hold, so that one odd value does not lose a whole run.

Halves of a character that a stream split are joined, which changes nothing. All else that changes a
value is counted by its kind. The standard library and orjson raise for such values instead.
"""

from __future__ import annotations

import base64
import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from agentpref.record.ingest.checks import as_id

PASSING = (KeyboardInterrupt, MemoryError)
"""What is not the doing of the value that is looked at; all else that its methods raise is.

A class of the app may raise what no ``except Exception`` catches: ``CancelledError``,
``SystemExit``, the panic of an extension in Rust.
"""

MAX_DEPTH = 64
"""How deep lists and mappings may be nested; what is deeper is kept as text."""

_shorten = reprlib.Repr()
_shorten.maxother = _shorten.maxstring = 1_000


class Salvage:
    """Copies values as plain JSON, and counts in ``changes`` what it had to change, by kind.

    ``surrogate`` is half of a character, which becomes ``U+FFFD``; ``key`` a key that was no
    string; ``integer`` a number beyond 64 bits, which becomes its digits; ``number`` NaN and
    infinities, which become null; ``circular`` and ``deep`` what contains itself or is nested too
    deep; ``object`` any other object: bytes become base64, the rest its ``repr``.
    """

    def __init__(self) -> None:
        self.changes: Counter[str] = Counter()
        self._outer: set[int] = set()  # the ids of the values that contain the present one

    def plain(self, value: Any) -> Any:
        """Copy a value as JSON that orjson can write. Raises nothing, whatever its methods raise.

        Subclasses are read as what they extend: their own methods may say anything.
        """
        try:
            return self._plain(value)
        except PASSING:
            raise
        except BaseException:  # the app's own class: whatever it raises, the run is kept
            return self._changed("object", describe(value))

    def id(self, value: Any) -> str | None:
        """Write an id as text; None for an object, of which no text is a name. Raises nothing."""
        if value is None:
            return None
        text = as_id(value)
        return self._changed("object", None) if text is None else self._text(text)

    def _plain(self, value: Any) -> Any:
        if _is(value, str):
            return self._text(value)
        if _is(value, int) and not _is(value, bool):
            number = int.__int__(value)
            fits = -(2**63) <= number < 2**64
            return number if fits else self._changed("integer", _digits(number))
        if _is(value, float):
            real = float.__float__(value)
            return real if math.isfinite(real) else self._changed("number", None)
        if _is(value, (bytes, bytearray)):
            return self._changed("object", base64.b64encode(value).decode())
        if _is(value, (Mapping, list, tuple)):
            return self._container(value)
        try:  # null, times, UUIDs, enums and dataclasses
            return orjson.loads(orjson.dumps(value))
        except TypeError:
            return self._changed("object", describe(value))

    def _container(self, value: Any) -> Any:
        if id(value) in self._outer:
            return self._changed("circular", "[circular]")
        if len(self._outer) >= MAX_DEPTH:
            return self._changed("deep", describe(value))
        self._outer.add(id(value))
        try:
            if _is(value, list):
                return [self.plain(item) for item in list.__iter__(value)]
            if _is(value, tuple):
                return [self.plain(item) for item in tuple.__iter__(value)]
            copy: dict[str, Any] = {}
            for key, item in dict(value).items():
                name = self._key(key)
                while name in copy:  # 1 and "1" are two keys
                    name += "_"
                copy[name] = self.plain(item)
            return copy
        finally:
            self._outer.discard(id(value))

    def _key(self, key: Any) -> str:
        if _is(key, str):
            return self._text(key)
        self.changes["key"] += 1
        if key is None or _is(key, bool):
            return json.dumps(key)
        if _is(key, float):
            return json.dumps(float.__float__(key))
        return _digits(int.__int__(key)) if _is(key, int) else describe(key)

    def _text(self, text: str) -> str:
        fixed, lost = _joined(text)
        if lost:
            self.changes["surrogate"] += lost
        return fixed

    def _changed(self, kind: str, value: Any) -> Any:
        self.changes[kind] += 1
        return value


class Described:
    """A ``default`` of ``orjson.dumps`` that keeps objects by their ``repr``, and counts them."""

    def __init__(self) -> None:
        self.changes: Counter[str] = Counter()

    def __call__(self, value: Any) -> Any:
        """Return what stands for a value that orjson cannot write."""
        if isinstance(value, Mapping):
            return dict(value)
        if issubclass(type(value), float):
            return float.__float__(value)
        self.changes["object"] += 1
        return repr(value)


def is_finite(value: Any) -> bool:
    """Whether each number in plain lists and dicts is finite; orjson would write null for it."""
    if issubclass(type(value), float):
        return math.isfinite(float.__float__(value))
    if type(value) is dict:
        return all(map(is_finite, value.values()))
    return type(value) not in (list, tuple) or all(map(is_finite, value))


def describe(value: object) -> str:
    """Return the start of a value's ``repr``, or what can be said of it without its methods."""
    try:
        return _joined(_shorten.repr(value))[0]
    except PASSING:
        raise
    except BaseException:  # the app's code, as above
        return f"<{type.__repr__(type(value))} without a repr>"


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    try:
        return isinstance(value, kinds)
    except PASSING:
        raise
    except BaseException:  # its ``__class__`` is the app's code, too
        return issubclass(type(value), kinds)


def _joined(text: str) -> tuple[str, int]:
    """Return a plain text that UTF-8 can hold, and how many halves of characters it lost."""
    text = str.__str__(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return joined, joined.count("\ufffd") - text.count("\ufffd")
    return text, 0


def _digits(number: int) -> str:
    """In hexadecimal where Python writes no decimal ones, from about 4,300 digits on."""
    try:
        return str(int(number))
    except ValueError:
        return hex(number)
