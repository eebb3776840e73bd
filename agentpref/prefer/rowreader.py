"""Reads rows: which format a row has, and what is in it.

:class:`RowReader` detects the format of each row by its keys. It counts the columns that a format
leaves unread, and refuses pictures and sounds beside preference data. A row of a log may hold
others: the spans of an export, a page of an API.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from math import isnan
from typing import Any, TypeAlias

import orjson

from agentpref import plugins
from agentpref.errors import ExchangeError, InvalidMessage, described
from agentpref.prefer.formats import MEDIA, Fields, Format, PreferenceRecord, TextRow, quoted
from agentpref.prefer.logged import LogFormat, Logged

LoggedRow: TypeAlias = "tuple[str, tuple[Logged, ...]]"
"""What a row of a log holds, after the name of its format."""

_PAGES = ("data", "items", "traces", "spans", "runs", "feedback", "observations", "scores")
"""The keys under which APIs put the rows of a page."""
_DEEPEST = 4


class RowReader:
    """Reads rows of one format, or detects the format of each row by its keys.

    The format that lacks the fewest keys is taken, if it has any. Of several, one that reads the
    row's ``prompt`` goes first, then the one that requires the most keys, then the first by name.

    Raises:
        ConfigError: no format is registered under the name, or one cannot be loaded.
    """

    def __init__(self, format: str | None = None) -> None:
        names = plugins.names(plugins.FORMATS) if format is None else (format,)
        self._formats: dict[str, Format | LogFormat] = {
            name: plugins.load(plugins.FORMATS, name) for name in names
        }
        self._nearest = lru_cache(maxsize=64)(self._nearest_shape)
        self.keys = frozenset((*MEDIA, *_PAGES)).union(*(f.keys for f in self._formats.values()))
        """Every key that the formats know. Other keys of a row are ignored."""
        self.ignored = Counter[str]()
        """The keys that were ignored so far, and how many rows had them, with something in them."""

    def records(
        self, row: Fields, depth: int = 0
    ) -> Iterator[tuple[str, PreferenceRecord | LoggedRow | ExchangeError]]:
        """Yield what is in a row, or why it cannot be read, each with its place in the row.

        A preference is a row by itself, in no place. A row of a log, and a page, may hold many.
        """
        try:
            given, name, missing = self._given(row)
            page = _page(given) if missing and depth < _DEEPEST else None
            if page is not None:
                yield from self._paged(given[page], page, depth)
                if not given[page]:
                    yield "", ("page", ())
                return
            self._require(given, name, missing)
            format = self._formats[name]
            if isinstance(format, LogFormat):
                rows = [("", given)] if format.parts is None else [*format.parts(given)]
                yield from ((place, self._part(inner, name, format)) for place, inner in rows)
                if not rows:
                    yield "", (name, ())
            else:
                yield "", self._preference(given, name, format)
        except (ExchangeError, InvalidMessage) as error:
            yield "", ExchangeError(str(error))
        except RecursionError:
            yield "", ExchangeError("the row is nested too deeply; flatten it")

    def read(self, row: Fields) -> PreferenceRecord:
        """Read one row of preference data.

        A null and NaN, which pandas writes for it, are as if the key was not there.

        Raises:
            ExchangeError: it is not what its format requires, or is a row of a log.
        """
        given, name, missing = self._given(row)
        self._require(given, name, missing)
        format = self._formats[name]
        if isinstance(format, LogFormat):
            raise ExchangeError(
                f"the row is of the format {name}, which holds runs and scores; import the file "
                "into a home with `agentpref import`, and name a tag of it"
            )
        return self._preference(given, name, format)

    def _given(self, row: Fields) -> tuple[dict[str, Any], str, list[str]]:
        """The row without what is missing, the name of its format, and the keys that it lacks."""
        given = {key: value for key, value in row.items() if not _is_missing(value)}
        if isinstance(row, TextRow):
            given = {key: value for key, value in given.items() if value}
            columns = self._formats[self._nearest(frozenset(given))[0]].columns
            given = {key: _typed(value, columns.get(key)) for key, value in given.items()}
        name, shape = self._nearest(frozenset(given))
        return given, name, [key for key in shape if key not in given]

    def _require(self, given: Fields, name: str, missing: list[str]) -> None:
        if missing:
            _, shape = self._nearest(frozenset(given))
            raise ExchangeError(
                f"the row has the keys {quoted(islice(given, 12))} and lacks {quoted(missing)}; "
                f"write {quoted(shape)} in every row of the {name} format"
            )

    def _paged(
        self, rows: Iterable[Any], page: str, depth: int
    ) -> Iterator[tuple[str, PreferenceRecord | LoggedRow | ExchangeError]]:
        for number, inner in enumerate(rows, start=1):
            if not isinstance(inner, Mapping):
                yield f"{page} {number}", ExchangeError(f"it is {described(inner)}, not an object")
                continue
            for place, record in self.records(inner, depth + 1):
                yield ", ".join(filter(None, (f"{page} {number}", place))), record

    def _preference(self, given: dict[str, Any], name: str, format: Format) -> PreferenceRecord:
        for key in MEDIA:
            shown = given.get(key)
            is_empty = isinstance(shown, list) and all(item is None for item in shown)
            if shown and not is_empty and key not in format.keys:
                raise ExchangeError(
                    f"the row has {key!r}, and agentpref would train its text without them; leave "
                    f"the row out with --skip-bad, or remove the column if the text needs no {key}"
                )
        try:
            record = format.read(given)
        except InvalidMessage as error:
            raise ExchangeError(str(error)) from error
        except RecursionError as error:
            raise ExchangeError("the row is nested too deeply; flatten it") from error
        self.ignored.update(_ignored(given, format))
        return record

    def _part(self, fields: Fields, name: str, format: LogFormat) -> LoggedRow | ExchangeError:
        part = {key: value for key, value in fields.items() if not _is_missing(value)}
        try:
            found = tuple(format.read(part))
        except (ExchangeError, InvalidMessage) as error:
            return ExchangeError(str(error))
        except KeyError as error:
            return ExchangeError(f"it lacks {error}; export it whole from {name}")
        except RecursionError:
            return ExchangeError("the row is nested too deeply; flatten it")
        unread = {key for one in found for key in getattr(one, "unread", ())}
        unread |= {key for key in part if key not in format.keys and part[key] not in _EMPTY}
        self.ignored.update(unread)
        return name, found

    def _nearest_shape(self, keys: frozenset[str]) -> tuple[str, tuple[str, ...]]:
        def distance(candidate: tuple[str, tuple[str, ...]]) -> tuple[bool, int, bool, int, str]:
            name, shape = candidate
            of_log = isinstance(self._formats[name], LogFormat)
            unlike = of_log and not keys & {*shape}
            ignores_prompt = "prompt" in keys - self._formats[name].keys
            return unlike, len({*shape} - keys), ignores_prompt, -len(shape), name

        return min(((n, s) for n, one in self._formats.items() for s in one.shapes), key=distance)


def _page(given: Fields) -> str | None:
    """The key under which a row has the rows of a page."""
    return next((key for key in _PAGES if isinstance(given.get(key), list)), None)


_EMPTY: tuple[Any, ...] = (None, "", [], {})


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))


def _typed(text: str, column: Any) -> Any:
    """What a cell of text says, where a format wants a flag, or names and values under keys.

    Text and messages stay text: those who read a format read messages that are written as JSON.
    """
    if column == "flag":
        return _FLAGS.get(text.strip().lower(), text)
    inner = column[0] if isinstance(column, list) else column
    if not isinstance(inner, Mapping):
        return text
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    item = value[0] if isinstance(column, list) and isinstance(value, list) and value else value
    return value if isinstance(item, dict) and item.keys() & inner.keys() else text


_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _ignored(given: Fields, format: Format) -> set[str]:
    """Name the keys of a row that a format does not read; ``input.user`` is one inside a value."""
    ignored = given.keys() - format.keys - {*MEDIA}  # of those, only empty ones come so far
    if not isinstance(given.get("tag", ""), str):
        ignored |= {"tag"}

    def look(value: Any, column: Any, path: str) -> None:
        if isinstance(column, list) and isinstance(value, list):
            for item in value:
                look(item, column[0], path)
        elif isinstance(column, Mapping) and isinstance(value, dict):
            for key, inner in value.items():
                if key in column:
                    look(inner, column[key], f"{path}.{key}")
                elif inner is not None:
                    ignored.add(f"{path}.{key}")

    for key, column in format.columns.items():
        look(given.get(key), column, key)
    return {*ignored}
