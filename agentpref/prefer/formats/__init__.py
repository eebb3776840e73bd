"""Formats of preference data: what a row of a file means, and which formats there are.

A :class:`Format` reads a row, as JSON values under their keys, into a :class:`PreferenceRecord`,
and writes a record as a row. Formats register by name in the entry-point group
``agentpref.formats``, ours in the same way as those of other packages:

    [project.entry-points."agentpref.formats"]
    openai = "agentpref.prefer.formats.openai:OPENAI"

``--format`` takes the registered names. Without it, ``rowreader.py`` detects the format of each row
by the row's keys. Formats of what other products logged are a
:class:`~agentpref.prefer.logged.LogFormat`, and register in the same group. The functions at the
end are steps that several formats share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, TypeAlias

import orjson

from agentpref.errors import ExchangeError, described
from agentpref.record.ingest.redaction import Redact, redacted
from agentpref.record.messages import ROLES, check_output, prompt_of
from agentpref.types import Message, Prompt

Fields: TypeAlias = Mapping[str, Any]
"""A row of a file: JSON values under their keys."""


class TextRow(dict[str, Any]):
    """A row whose values are all text, as CSV holds them; an empty text is a missing value."""


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what the prompt shows beside its text. A row that has any is refused."""


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
        labels = [*map(_number, self.labels)]
        if not labels or len(labels) != len(self.completions) or None in labels:
            raise ExchangeError(
                f"its format gave {len(self.completions)} completions and the labels "
                f"{described(self.labels)}; each completion needs a number"
            )
        object.__setattr__(self, "labels", (*labels,))

    def redacted(self, redact: Redact) -> PreferenceRecord:
        """Put every text through ``redact``, and compute the prompt's id anew.

        Raises:
            RedactionFailed: ``redact`` raised, or returned something other than text.
        """
        asked, tools = redacted((self.prompt.messages, self.prompt.tools), redact)
        completions = redacted(self.completions, redact)
        prompt = prompt_of(asked, tools)
        prompt = replace(prompt, chat_template_kwargs=self.prompt.chat_template_kwargs)
        return replace(self, prompt=prompt, completions=completions)


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


def _number(label: Any) -> float | None:
    """A label as a finite number; also a decimal, and a number or bool of numpy."""
    try:
        number = None if isinstance(label, str | bytes) else float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and isfinite(number) else None


def require(fits: object, name: str, value: object, cure: str) -> None:
    """Refuse a value of a row that does not fit.

    >>> require(label in (0, 1), "'label'", label, "write true or false")
    Traceback (most recent call last):
    agentpref.errors.ExchangeError: 'label' is a str of 4 characters; write true or false
    """
    if not fits:
        raise ExchangeError(f"{name} is {described(value)}; {cure}")


def parse(text: Any, name: str, cure: str) -> Any:
    """Read JSON text inside a row."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ExchangeError(f"{name} is not JSON ({error}); {cure}") from error


def turns(value: Any, key: str, *, role: str) -> list[Message]:
    """Read text as one message of ``role``, and a list of messages, see :func:`normalized`.

    A list of messages may be written as JSON text, as tables of text hold it.
    """
    if isinstance(value, str):
        value = _written_messages(value) or [{"role": role, "content": value}]
    fits = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    cure = f"write text, or a list of messages such as [{{'role': {role!r}, 'content': …}}]"
    require(fits, repr(key), value, cure)
    return [*map(normalized, value)]


def _written_messages(text: str) -> list[Any]:
    """The messages of which a text is the JSON; none for any other text."""
    if not text.lstrip().startswith("[{"):
        return []
    try:
        found = orjson.loads(text)
    except ValueError:
        return []
    is_messages = all(isinstance(m, dict) and m.get("role") in ROLES for m in found)
    return found if is_messages else []


def normalized(message: Any) -> Any:
    """Leave out of a message what says nothing: nulls, and an empty list of tool calls.

    Tables and API clients fill messages up with them, and they would make another prompt of it. A
    null ``content`` stays, and so does what is inside a call's arguments.
    """
    if not isinstance(message, Mapping):
        return message
    said = {k: v for k, v in message.items() if v is not None or k == "content"}
    calls = said.get("tool_calls")
    if isinstance(calls, list | tuple):
        said["tool_calls"] = [*map(_normalized_call, calls)]
        if not calls:
            del said["tool_calls"]
    return said


def _normalized_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    made = {key: value for key, value in call.items() if value is not None}
    if isinstance(made.get("function"), Mapping):
        made["function"] = {k: v for k, v in made["function"].items() if v is not None}
    return made


def alike(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether messages say the same, whatever blanks are around their texts."""
    return [*map(_gist, one)] == [*map(_gist, other)]


def _gist(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.keys() == {"type", "text"} for part in content
    ):
        content = "".join(str(part["text"]) for part in content)
    text = content.strip() if isinstance(content, str) else content
    return {**normalized(message), "content": text or None}


def shared_start(row: Fields, chosen: str, rejected: str) -> tuple[list[Message], list[Message]]:
    """Split the answers under two keys into the turns that they share and their last messages.

    agentpref compares single messages: the shared turns belong to the prompt.
    """
    better, worse = (turns(row[key], key, role="assistant") for key in (chosen, rejected))
    if not alike(better[:-1], worse[:-1]):
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

    The messages are :func:`normalized`.

    Raises:
        InvalidMessage: a message cannot be stored, or a completion is not an assistant's.
    """
    cure = "write a list of tools, or leave it out"
    offered = tools or row.get("tools") or []
    if isinstance(offered, str):
        offered = parse(offered, "'tools'", cure) or []
    require(isinstance(offered, list), "'tools'", offered, cure)
    prompt = prompt_of([*map(normalized, asked)], offered)
    arguments = row.get("chat_template_kwargs") or {}
    if isinstance(arguments, str):
        arguments = parse(arguments, "'chat_template_kwargs'", "write a JSON object") or {}
    require(
        isinstance(arguments, dict), "'chat_template_kwargs'", arguments, "write names and values"
    )
    said = {name: value for name, value in arguments.items() if value is not None}
    prompt = replace(prompt, chat_template_kwargs=said)
    answers = (*map(normalized, completions),)
    for message in answers:
        check_output(message)
    tag = row.get("tag")
    return PreferenceRecord(prompt, answers, labels, tag if isinstance(tag, str) else None)


def chosen_and_rejected(record: PreferenceRecord) -> tuple[Message, ...]:
    """The two completions of a pair; any other record is refused."""
    cure = "choose another format: this one holds a better and a worse completion"
    require([*record.labels] == [1, 0], "its list of labels", record.labels, cure)
    return record.completions


def require_no_arguments(record: PreferenceRecord) -> None:
    """Refuse a record whose prompt was asked with arguments of the chat template."""
    arguments = record.prompt.chat_template_kwargs
    cure = "choose another format, such as 'preference': this one has no place for them"
    require(not arguments, "chat_template_kwargs", dict(arguments), cure)


def quoted(keys: Iterable[str]) -> str:
    """Name keys in a message."""
    return ", ".join(map(repr, keys)) or "none"
