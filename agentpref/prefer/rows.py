"""What one row of preference data says, in whichever format it was written.

agentpref keeps one answer for each prompt. Turns that both sides of a comparison share are part of
its prompt, and the last message of each side is the answer. The parts here are what the readers of
``formats/`` have in common.

Pure functions; knows nothing of any one format, nor of files, lines, runs or stores.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import orjson

from agentpref.errors import ExchangeError
from agentpref.record.ingest.redaction import Redact, redacted
from agentpref.record.messages import check_output, prompt_of
from agentpref.types import Message, Prompt, Tool

Fields: TypeAlias = Mapping[str, Any]
"""A row as it stands in a file: JSON values under their keys."""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to a prompt, the better one named."""

    prompt: Prompt
    chosen: Message
    rejected: Message
    tag: str | None = None


@dataclass(frozen=True, slots=True)
class UnpairedRow:
    """One answer to a prompt, liked or not."""

    prompt: Prompt
    completion: Message
    desirable: bool
    tag: str | None = None


Row: TypeAlias = "PreferenceRow | UnpairedRow"


def redacted_row(row: Row, redact: Redact) -> Row:
    """Put every text of a row through ``redact``, and address its prompt anew.

    Raises:
        RedactionFailed: ``redact`` raised, or gave no text.
    """
    prompt = prompt_of(redacted(row.prompt.messages, redact), redacted(row.prompt.tools, redact))
    if isinstance(row, UnpairedRow):
        return replace(row, prompt=prompt, completion=redacted(row.completion, redact))
    chosen, rejected = redacted(row.chosen, redact), redacted(row.rejected, redact)
    return replace(row, prompt=prompt, chosen=chosen, rejected=rejected)


def turns(value: object, key: str, *, role: str) -> list[dict[str, Any]]:
    """Read text as one message of ``role``, or a list of messages as it is.

    Raises:
        ExchangeError: it is neither; ``key`` names it.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return value
    raise ExchangeError(
        f"{key!r} is {reprlib.repr(value)}; write text, or a list of messages such as "
        f"[{{'role': {role!r}, 'content': …}}]"
    )


def common_start(
    chosen: Sequence[Message], rejected: Sequence[Message], *, names: tuple[str, str]
) -> list[Message]:
    """Take all turns but the last, which both sides must share.

    Raises:
        ExchangeError: they do not; ``names`` are the keys of the two sides.
    """
    if chosen[:-1] != rejected[:-1]:
        raise ExchangeError(
            f"{names[0]!r} and {names[1]!r} differ before their last message; agentpref compares "
            "single answers, so cut both after the first message in which they differ"
        )
    return list(chosen[:-1])


def answer_of(turns: Sequence[Message]) -> Message:
    """Take the last turn as the answer.

    Raises:
        InvalidMessage: it is no message of an assistant, or cannot be stored.
    """
    check_output(turns[-1])
    return turns[-1]


def tools_of(row: Fields) -> list[Tool]:
    """Read the tools that were offered: a list, or a list written as JSON text.

    Raises:
        ExchangeError: it is neither.
    """
    cure = "write a list of tools, or leave it out"
    tools = row.get("tools") or None
    if isinstance(tools, str):
        tools = parse(tools, "'tools'", cure)
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ExchangeError(f"'tools' is {reprlib.repr(tools)}; {cure}")
    return tools


def parse(text: str, name: str, cure: str) -> Any:
    """Read JSON text that stands within a row.

    Raises:
        ExchangeError: it is no JSON; ``name`` says what was read, ``cure`` what to do.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ExchangeError(f"{name} is no JSON ({error}); {cure}") from error


def tag_of(row: Fields) -> str | None:
    """Read the domain tag; what is no text is none."""
    tag = row.get("tag")
    return tag if isinstance(tag, str) else None
