"""Formats of preference data: what a row of a file means, and which formats there are.

A :class:`Format` reads a row, as JSON values under their keys, into a :class:`PreferenceRecord`,
and writes a record as a row. Formats register by name in the entry-point group
``agentpref.formats``, ours in the same way as those of other packages:

    [project.entry-points."agentpref.formats"]
    openai = "agentpref.prefer.formats.openai:OPENAI"

``--format`` takes the registered names. Without it, :class:`RowReader` detects the format of each
row by the row's keys. The functions at the end are steps that several formats share.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, TypeAlias

import orjson

from agentpref import plugins
from agentpref.errors import ExchangeError, InvalidMessage
from agentpref.record.ingest.redaction import Redact, redacted
from agentpref.record.messages import check_output, prompt_of
from agentpref.types import Message, Prompt

Fields: TypeAlias = Mapping[str, Any]
"""A row of a file: JSON values under their keys."""


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One record of preference data: a prompt and its judged completions.

    ``labels`` has a number for each completion; higher is better. A pair has the labels (1, 0), a
    single completion the label 1 (liked) or 0.
    """

    prompt: Prompt
    completions: tuple[Message, ...]
    labels: tuple[float, ...]
    tag: str | None = None

    def __post_init__(self) -> None:
        numbers = all(isinstance(label, int | float) for label in self.labels)
        if not self.completions or len(self.labels) != len(self.completions) or not numbers:
            raise ExchangeError(
                f"its format gave {len(self.completions)} completions and the labels "
                f"{self.labels!r}; each completion needs a number"
            )

    def redacted(self, redact: Redact) -> PreferenceRecord:
        """Put every text through ``redact``, and compute the prompt's id anew.

        Raises:
            RedactionFailed: ``redact`` raised, or returned something other than text.
        """
        asked, tools = redacted((self.prompt.messages, self.prompt.tools), redact)
        completions = redacted(self.completions, redact)
        return replace(self, prompt=prompt_of(asked, tools), completions=completions)


@dataclass(frozen=True, slots=True)
class Format:
    """One format of rows.

    Attributes:
        shapes: the shapes of a row, each as the keys that it must have. They serve to detect the
            format of a row, and to say which keys it lacks.
        read: turns a row that has all keys of a shape, and no null, into a record. It raises
            ``ExchangeError`` or ``InvalidMessage``, with the cure, if a value is wrong.
        write: turns a record into a row. It raises ``ExchangeError`` if the format cannot hold it.
        columns: what ``write`` puts under each key, for Parquet: ``"text"``, ``"flag"``, ``"json"``
            (any JSON value), a list of one of these, or a mapping of names to these.
        optional: further keys that ``read`` looks at.
        completions: how many completions a row holds.
    """

    shapes: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], PreferenceRecord]
    write: Callable[[PreferenceRecord], dict[str, Any]]
    columns: Mapping[str, Any]
    optional: tuple[str, ...] = ()
    completions: int = 2

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the format reads or writes."""
        return frozenset([*self.columns, *self.optional, *(key for s in self.shapes for key in s)])


class RowReader:
    """Reads rows of one format, or detects the format of each row by its keys.

    The format that lacks the fewest keys is taken. Of several, one that reads the row's ``prompt``
    goes first, then the one that requires the most keys, then the first by name.

    Raises:
        ConfigError: no format is registered under the name, or one cannot be loaded.
    """

    def __init__(self, format: str | None = None) -> None:
        names = plugins.names(plugins.FORMATS) if format is None else (format,)
        self._formats: dict[str, Format] = {n: plugins.load(plugins.FORMATS, n) for n in names}
        self._nearest = lru_cache(maxsize=64)(self._nearest_shape)
        self.keys = frozenset(key for one in self._formats.values() for key in one.keys)
        """Every key that the formats know. Other keys of a row are ignored."""

    def read(self, row: Fields) -> PreferenceRecord:
        """Read one row; raise ``ExchangeError`` if it is not what its format requires."""
        given = {key: value for key, value in row.items() if value is not None}
        name, shape = self._nearest(frozenset(given))
        missing = [key for key in shape if key not in given]
        if missing:
            raise ExchangeError(
                f"the row has the keys {_quoted(islice(given, 12))} and lacks {_quoted(missing)}; "
                f"write {_quoted(shape)} in every row of the {name} format"
            )
        try:
            return self._formats[name].read(given)
        except InvalidMessage as error:
            raise ExchangeError(str(error)) from error
        except RecursionError as error:
            raise ExchangeError("the row is nested too deeply; flatten it") from error

    def _nearest_shape(self, keys: frozenset[str]) -> tuple[str, tuple[str, ...]]:
        def distance(candidate: tuple[str, tuple[str, ...]]) -> tuple[int, bool, int, str]:
            name, shape = candidate
            ignores_prompt = "prompt" in keys - self._formats[name].keys
            return len({*shape} - keys), ignores_prompt, -len(shape), name

        return min(((n, s) for n, one in self._formats.items() for s in one.shapes), key=distance)


def require(fits: object, name: str, value: object, cure: str) -> None:
    """Refuse a value of a row that does not fit.

    >>> require(label in (0, 1), "'label'", label, "write true or false")
    Traceback (most recent call last):
    agentpref.errors.ExchangeError: 'label' is 'good'; write true or false
    """
    if not fits:
        raise ExchangeError(f"{name} is {reprlib.repr(value)}; {cure}")


def parse(text: Any, name: str, cure: str) -> Any:
    """Read JSON text inside a row."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ExchangeError(f"{name} is not JSON ({error}); {cure}") from error


def turns(value: Any, key: str, *, role: str) -> list[Message]:
    """Read text as one message of ``role``, and a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    fits = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    cure = f"write text, or a list of messages such as [{{'role': {role!r}, 'content': …}}]"
    require(fits, repr(key), value, cure)
    return list(value)


def shared_start(row: Fields, chosen: str, rejected: str) -> tuple[list[Message], list[Message]]:
    """Split the answers under two keys into the turns that they share and their last messages.

    agentpref compares single messages: the shared turns belong to the prompt.
    """
    better, worse = (turns(row[key], key, role="assistant") for key in (chosen, rejected))
    if better[:-1] != worse[:-1]:
        raise ExchangeError(
            f"{chosen!r} and {rejected!r} differ before their last message; agentpref compares "
            "single answers, so cut both after the first message in which they differ"
        )
    return better[:-1], [better[-1], worse[-1]]


def record_of_row(
    row: Fields,
    asked: Sequence[Message],
    completions: Sequence[Message],
    labels: tuple[float, ...] = (1, 0),
    tools: Any = None,
) -> PreferenceRecord:
    """Make a record of messages, and of the ``tools`` (a list, or one as JSON text) and the tag.

    Raises:
        InvalidMessage: a message cannot be stored, or a completion is not an assistant's.
    """
    cure = "write a list of tools, or leave it out"
    offered = tools or row.get("tools") or []
    if isinstance(offered, str):
        offered = parse(offered, "'tools'", cure) or []
    require(isinstance(offered, list), "'tools'", offered, cure)
    prompt = prompt_of(asked, offered)
    for message in completions:
        check_output(message)
    tag = row.get("tag")
    return PreferenceRecord(prompt, (*completions,), labels, tag if isinstance(tag, str) else None)


def chosen_and_rejected(record: PreferenceRecord) -> tuple[Message, ...]:
    """The two completions of a pair; any other record is refused."""
    cure = "choose another format: this one holds a better and a worse completion"
    require([*record.labels] == [1, 0], "its list of labels", record.labels, cure)
    return record.completions


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys)) or "none"
