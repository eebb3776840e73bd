"""Rows of JSON: objects on a line each, or spread over lines, or the items of one list.

They are read in bounded memory.

Python and pandas write NaN, which is not JSON. In a column it is a missing value; inside a value
that is wanted it is an error of its row. A column that is not wanted never spoils a row.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from math import isfinite
from typing import IO, Any, TypeAlias

import ijson
import orjson

from agentpref.errors import ExchangeError, described
from agentpref.record.messages import MAX_MESSAGE_BYTES

MAX_ROW_BYTES = 4 * MAX_MESSAGE_BYTES
"""The longest row that is read: a prompt and two answers of the largest size fit."""
MAX_DEPTH = 300
"""The depth to which items of a JSON list are built: deeper than orjson writes."""
CHUNK_BYTES = 1 << 16

_DEEPER = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_JSON_CURE = "write one JSON object on each line, or one list of objects"
_UTF8_CURE = "convert the file, for example with `iconv -f LATIN1 -t UTF-8`"

_NOT_FINITE = Decimal("1e999999")
"""What stands for NaN and the infinities in a JSON list, where ijson would stop."""
_SPREAD = re.compile(rb"\{[ \t]*\r?\n|\{[^\n]*[\[{,][ \t]*\r?\n")
"""How an object begins that is written over several lines, which a row on one line never does."""
_BARE_WORD = re.compile(rb'\\.|"|NaN|-?Infinity', re.DOTALL)
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_CUT_WORD = re.compile(rb"(?:\\+|-|-?I[nfity]{0,6}|(?<!Na)Na?)\Z")

Parsed: TypeAlias = "dict[str, Any] | ExchangeError"
Found: TypeAlias = tuple[str, Parsed]
"""The place of a row (``"line 3"`` or ``"row 3"``), and the row or why it cannot be read."""


@dataclass
class Meter:
    """How many bytes of a file have been read, and how many it has (0: not known).

    ``unread`` counts, for the columns of a table that nobody wanted, the rows that had them.
    """

    read: int = 0
    total: int = 0
    unread: Counter[str] = field(default_factory=Counter)


def lines(file: IO[bytes], wanted: Collection[str], meter: Meter) -> Iterator[Found]:
    """Yield the lines that are not blank. A line that is too long comes in pieces."""
    number, inside = 1, False
    for piece in iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""):
        meter.read += len(piece)
        if piece.strip() and not inside:
            yield f"line {number}", _parsed_line(piece, wanted)
        inside = not piece.endswith(b"\n")
        number += not inside


def _parsed_line(line: bytes, wanted: Collection[str]) -> Parsed:
    if len(line) > MAX_ROW_BYTES:
        return too_long("it")
    try:
        return _object(orjson.loads(line.decode()))
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except orjson.JSONDecodeError as error:
        return _almost_json(line, wanted) or ExchangeError(
            f"it is not JSON ({error}); {_JSON_CURE}"
        )


def _almost_json(line: bytes, wanted: Collection[str]) -> Parsed | None:
    """Read what Python writes and orjson refuses: NaN, infinities, halves of surrogate pairs."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    held = [row[key] for key in wanted if not isinstance(row.get(key), float | None)]
    try:
        json.dumps(held, allow_nan=False)
    except ValueError:
        return ExchangeError(f"it holds NaN or an infinity inside a value; {_JSON_CURE}")
    return row


def is_spread(start: bytes) -> bool:
    """Whether a file begins with an object that is written over several lines."""
    return _SPREAD.match(start) is not None


def items(
    file: IO[bytes], wanted: Collection[str], meter: Meter, *, listed: bool = True
) -> Iterator[Found]:
    """Yield the items of one JSON list, or objects that follow one another, if not ``listed``.

    ijson cannot go on if it breaks off, or if other text follows.
    """
    number, row_start, depth, item = 1, meter.read, -1 if listed else 0, ijson.ObjectBuilder()

    def chunks() -> Iterator[bytes]:
        while chunk := file.read(CHUNK_BYTES):
            if meter.read - row_start > MAX_ROW_BYTES:
                raise too_long(f"row {number}")
            meter.read += len(chunk)
            yield chunk

    try:
        text = ijson.from_iter(_finite_chunks(chunks()))
        for event, scalar in ijson.basic_parse(text, multiple_values=not listed):
            above, depth = depth, depth + _DEEPER.get(event, 0)
            if min(above, depth) >= 0 and max(above, depth) <= MAX_DEPTH:
                item.event(event, scalar)
            if depth == 0 <= above:  # the item is complete
                yield f"row {number}", _plain_json(item.value, wanted)
                number, row_start, item = number + 1, meter.read, ijson.ObjectBuilder()
    except (ijson.JSONError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = str(error).removeprefix("b'").split("\n")[0].split("\\n")[0]
    else:
        return
    raise ExchangeError(  # not chained: ijson quotes the text around
        f"from row {number} on it cannot be read as JSON ({what}); correct it there, or fetch "
        f"the file again if it was cut off; if it is not UTF-8, {_UTF8_CURE}"
    )


def _finite_chunks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Replace NaN and infinities outside of strings by a number that JSON can write."""
    inside, rest = False, b""

    def replaced(found: re.Match[bytes]) -> bytes:
        nonlocal inside
        inside ^= found[0] == b'"'
        is_word = not inside and found[0][:1] in b"N-I"
        return str(_NOT_FINITE).encode() if is_word else found[0]

    for chunk in chunks:
        text = rest + chunk
        cut = _CUT_WORD.search(text)
        text, rest = (text[: cut.start()], text[cut.start() :]) if cut else (text, b"")
        if b"NaN" in text or b"Infinity" in text:
            text = _BARE_WORD.sub(replaced, text)
        else:
            inside ^= _ESCAPED.sub(b"", text).count(b'"') % 2 == 1
        if text:  # an empty chunk would end the file
            yield text
    yield rest


def _plain_json(value: Any, wanted: Collection[str]) -> Parsed:
    """Make of what ijson built what orjson would read: floats for decimals, bounded depth.

    What a column holds that is not wanted need not be storable.
    """
    try:
        return _object(orjson.loads(orjson.dumps(value, default=_finite)))
    except TypeError:
        pass
    if isinstance(value, dict):
        value = {
            key: None if held == _NOT_FINITE else held if key in wanted else held is not None
            for key, held in value.items()
        }
    try:
        return _object(orjson.loads(orjson.dumps(value, default=_finite)))
    except TypeError as error:
        return ExchangeError(f"it holds a value that cannot be stored ({error}); {_JSON_CURE}")


def _finite(number: Decimal) -> float:
    if not isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


def _object(value: Any) -> Parsed:
    if isinstance(value, dict):
        return value
    return ExchangeError(f"it is {described(value)}, not a JSON object; {_JSON_CURE}")


def not_utf8(error: UnicodeDecodeError) -> ExchangeError:
    """The error of a row that has other bytes than UTF-8."""
    where = f"byte {error.start} is not UTF-8 ({error.object[error.start]:#04x})"
    return ExchangeError(f"{where}; {_UTF8_CURE}")


def too_long(what: str) -> ExchangeError:
    """The error of a row that is longer than :data:`MAX_ROW_BYTES`."""
    return ExchangeError(
        f"{what} is longer than {MAX_ROW_BYTES:,} bytes; check that the file has one row on each "
        "line, or is one list, or cut the row's texts"
    )
