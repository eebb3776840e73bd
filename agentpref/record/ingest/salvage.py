"""Makes JSON of what JSON cannot hold, so that one odd value does not lose a whole run.

Halves of a character that a stream split are joined, which changes nothing. All else that changes a
value is counted by its kind. The standard library and orjson raise for such values instead.
"""

from __future__ import annotations

import base64
import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

MAX_DEPTH = 64
"""How deep lists and mappings may be nested; what is deeper is kept as text."""

_shorten = reprlib.Repr()
_shorten.maxother = _shorten.maxstring = 1_000


class Salvage:
    """Copies values as plain JSON, and counts in ``changes`` what it had to change, by kind.

    ``surrogate`` is half of a character, which becomes ``U+FFFD``; ``key`` a key that was no
    string; ``integer`` a number beyond 64 bits, which becomes its digits; ``circular`` and ``deep``
    what contains itself or is nested too deep; ``object`` any other object: bytes become base64,
    the rest its ``repr``.
    """

    def __init__(self) -> None:
        self.changes: Counter[str] = Counter()
        self._outer: set[int] = set()  # the ids of the values that contain the present one

    def plain(self, value: Any) -> Any:
        """Copy a value as JSON that orjson can write."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            fits = -(2**63) <= value < 2**64
            return value if fits else self._changed("integer", _digits(value))
        if isinstance(value, (bytes, bytearray)):
            return self._changed("object", base64.b64encode(value).decode())
        if isinstance(value, (Mapping, list, tuple)):
            return self._container(value)
        try:
            orjson.dumps(value)  # null, floats, times, UUIDs, enums and dataclasses
        except TypeError:
            return self._changed("object", self._described(value))
        return value

    def _container(self, value: Any) -> Any:
        if id(value) in self._outer:
            return self._changed("circular", "[circular]")
        if len(self._outer) >= MAX_DEPTH:
            return self._changed("deep", self._described(value))
        try:
            items = dict(value) if isinstance(value, Mapping) else list(value)
        except Exception:  # the app's own class of mapping: whatever it raises, the run is kept
            return self._changed("object", self._described(value))
        self._outer.add(id(value))
        try:
            if isinstance(items, list):
                return [self.plain(item) for item in items]
            copy: dict[str, Any] = {}
            for key, item in items.items():
                name = self._key(key)
                while name in copy:  # 1 and "1" are two keys
                    name += "_"
                copy[name] = self.plain(item)
            return copy
        finally:
            self._outer.discard(id(value))

    def _key(self, key: Any) -> str:
        if isinstance(key, str):
            return self._text(key)
        self.changes["key"] += 1
        if key is None or isinstance(key, (bool, float)):
            return json.dumps(key)
        return _digits(key) if isinstance(key, int) else self._described(key)

    def _described(self, value: Any) -> str:
        try:
            text = _shorten.repr(value)
        except Exception:  # the app's code, as above
            text = object.__repr__(value)
        return self._text(text)

    def _text(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            if lost := joined.count("\ufffd") - text.count("\ufffd"):
                self.changes["surrogate"] += lost
            return joined
        return text

    def _changed(self, kind: str, value: Any) -> Any:
        self.changes[kind] += 1
        return value


def _digits(number: int) -> str:
    """In hexadecimal where Python writes no decimal ones, from about 4,300 digits on."""
    try:
        return str(int(number))
    except ValueError:
        return hex(number)
