"""Rows of CSV: columns by name, of text, separated by commas, tabs or semicolons.

The first line names the columns. A cell is text, an empty one is a missing value, and
``rowreader.py`` makes of it what a format wants to be something else than text.
The parser is Python's own, which also bounds a cell: 131,072 characters.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from typing import IO, Any

from agentpref.errors import ExchangeError
from agentpref.prefer import jsonrows
from agentpref.prefer.formats import TextRow
from agentpref.prefer.jsonrows import Found, Meter

DELIMITERS = ",\t;"
_COLUMNS = "such as prompt, chosen, rejected, or prompt, completion, label"
_QUOTES = (
    'put each text with a delimiter, a quote or a line break in "quotes", and double its quotes'
)


def delimiter_of(start: bytes, wanted: Collection[str]) -> str | None:
    """The delimiter with which the first line names most known columns.

    ``None`` if it names none, is JSON, or has no delimiter: it may be any text.
    """
    if start.startswith((b"{", b"[")):
        return None
    first = start.split(b"\n", 1)[0].decode(errors="replace")
    known = {
        delimiter: len({*names} & {*wanted})
        for delimiter in DELIMITERS
        if len(names := _names(first, delimiter)) > 1
    }
    best = max(known, key=lambda delimiter: known[delimiter], default=None)
    return best if best is not None and known[best] else None


def rows(file: IO[bytes], wanted: Collection[str], meter: Meter, delimiter: str) -> Iterator[Found]:
    """Yield the rows below the header, each with the line on which it begins."""
    number = size = 0

    def line() -> str:
        """Read the next line; empty at the end. An error does not end the reading."""
        nonlocal number, size
        found = file.readline(jsonrows.MAX_ROW_BYTES + 1)
        meter.read += len(found)
        number += bool(found)
        size += len(found)
        if size > jsonrows.MAX_ROW_BYTES:
            while found and not found.endswith(b"\n"):
                found = file.readline(jsonrows.MAX_ROW_BYTES + 1)
                meter.read += len(found)
            raise jsonrows.too_long("it")
        return found.decode()

    parser = csv.reader(iter(line, ""), delimiter=delimiter, strict=True)

    def cells() -> list[str] | ExchangeError | None:
        """The cells of the next row, or why it cannot be read; ``None`` at the end."""
        nonlocal size
        size = 0
        try:
            return next(parser, None)
        except ExchangeError as error:
            return error
        except UnicodeDecodeError as error:
            return jsonrows.not_utf8(error)
        except csv.Error as error:
            return _misread(error)

    header = cells()
    while header == []:  # a blank line
        header = cells()
    if header is None:
        return
    if isinstance(header, ExchangeError):
        raise ExchangeError(f"its header, line {number}, cannot be read: {header}")
    names, begins = _header(header, wanted), number + 1
    while (found := cells()) is not None:
        if found:
            row = found if isinstance(found, ExchangeError) else _row(names, found)
            yield f"line {begins}", row
        begins = number + 1


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _header(cells: list[str], wanted: Collection[str]) -> list[str]:
    names = [name.strip() or f"column {place}" for place, name in enumerate(cells, start=1)]
    if not {*names} & {*wanted}:
        raise ExchangeError(
            f"its first line names no column that a format knows; name them there, {_COLUMNS}"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise ExchangeError(f"it has the column {min(twice)!r} twice; rename or remove one of them")
    return names


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | ExchangeError:
    if len(cells) == len(header):
        return TextRow(zip(header, cells, strict=True))
    has = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    return ExchangeError(f"it has {has}, and the header names {len(header)} columns; {_QUOTES}")


def _misread(error: csv.Error) -> ExchangeError:
    cure = "write JSON lines, whose texts may be longer" if "limit" in str(error) else _QUOTES
    return ExchangeError(f"it is not CSV ({error}); {cure}")
