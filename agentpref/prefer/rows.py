"""One row of TRL's preference formats, as plain JSON values, read and written.

Read are the preference format (``chosen`` and ``rejected``, the prompt explicit or the beginning
that both share) and the unpaired one (``prompt``, ``completion``, ``label``), each in text or in
messages. Written are messages with an explicit prompt. ``tools`` and ``tag`` are kept, any other
column is passed over. agentpref keeps one answer for each prompt: turns that both sides share are
part of the prompt, and the last message is the answer.

Pure functions; knows nothing of files, lines, runs or stores.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Literal, TypeAlias

import orjson

from agentpref.errors import ExchangeError, InvalidMessage
from agentpref.record.messages import check_output, prompt_of
from agentpref.types import Message, Pair, Prompt, Thumb, Tool

Format = Literal["preference", "unpaired"]

REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
}
"""The keys that a row of each format must have."""


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


def read_row(row: Mapping[str, Any], format: Format | None = None) -> Row:
    """Read one row; its keys say which format it is in, unless ``format`` does.

    Raises:
        ExchangeError: saying what is wrong with the row, and the cure.
    """
    given = {key: value for key, value in row.items() if value is not None}
    format = format or _nearest_format(given)
    _require_keys(given, format)
    try:
        return _read_preference(given) if format == "preference" else _read_unpaired(given)
    except InvalidMessage as error:
        raise ExchangeError(str(error)) from error


def preference_row(pair: Pair) -> dict[str, Any]:
    """Write a pair as a row of TRL's conversational preference format."""
    answers = {"chosen": [pair.chosen], "rejected": [pair.rejected]}
    return {"prompt": pair.prompt.messages, **answers, **_extras(pair)}


def unpaired_row(thumb: Thumb) -> dict[str, Any]:
    """Write a thumb as a row of TRL's conversational unpaired preference format."""
    judged = {"completion": [thumb.completion], "label": thumb.desirable}
    return {"prompt": thumb.prompt.messages, **judged, **_extras(thumb)}


def _extras(of: Pair | Thumb) -> dict[str, Any]:
    return {"tag": of.tag} | ({"tools": of.prompt.tools} if of.prompt.tools else {})


def _nearest_format(row: Mapping[str, Any]) -> Format:
    """Find the format whose keys the row lacks the fewest of."""
    return min(REQUIRED, key=lambda name: len(set(REQUIRED[name]) - row.keys()))


def _require_keys(row: Mapping[str, Any], format: Format) -> None:
    missing = [key for key in REQUIRED[format] if key not in row]
    if missing:
        raise ExchangeError(
            f"the row has the keys {_names(islice(row, 12))} and lacks {_names(missing)}; write "
            f"{_names(REQUIRED[format])} in every row of the {format} format"
        )


def _names(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys) or "none"


def _read_preference(row: Mapping[str, Any]) -> PreferenceRow:
    if "prompt" not in row and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        row = {**row, **_split_text(row["chosen"], row["rejected"])}
    chosen = _turns(row["chosen"], "chosen", role="assistant")
    rejected = _turns(row["rejected"], "rejected", role="assistant")
    if chosen[:-1] != rejected[:-1]:
        raise ExchangeError(
            "'chosen' and 'rejected' differ before their last message; agentpref compares single "
            "answers, so cut both after the first message in which they differ"
        )
    prompt = _prompt(row, shared=chosen[:-1])
    return PreferenceRow(prompt, _answer(chosen), _answer(rejected), _tag(row))


def _read_unpaired(row: Mapping[str, Any]) -> UnpairedRow:
    label = row["label"]
    if label not in (True, False):
        raise ExchangeError(
            f"'label' is {reprlib.repr(label)}; write true for a good answer, false for a bad one"
        )
    completion = _turns(row["completion"], "completion", role="assistant")
    prompt = _prompt(row, shared=completion[:-1])
    return UnpairedRow(prompt, _answer(completion), bool(label), _tag(row))


def _split_text(chosen: str, rejected: str) -> dict[str, str]:
    """Part two texts from the beginning they share, at its last space, as a prompt.

    TRL parts them at the first letter that differs, which may be within a word.
    """
    alike = takewhile(lambda letters: letters[0] == letters[1], zip(chosen, rejected, strict=False))
    shared = "".join(letter for letter, _ in alike)
    cut = max((i + 1 for i, letter in enumerate(shared) if letter.isspace()), default=len(shared))
    answers = {"chosen": chosen[cut:].lstrip(), "rejected": rejected[cut:].lstrip()}
    prompt = shared[:cut].strip()
    if not (prompt and all(answers.values())) or chosen == rejected:
        raise ExchangeError(
            "the row has no 'prompt', and 'chosen' and 'rejected' are not two answers after one "
            "beginning; write the prompt in a column 'prompt'"
        )
    return {"prompt": prompt, **answers}


def _turns(value: object, key: str, *, role: str) -> list[dict[str, Any]]:
    """Read text as one message of ``role``, or a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return [_without_nulls(turn) for turn in value]
    raise ExchangeError(
        f"{key!r} is {reprlib.repr(value)}; write text, or a list of messages such as "
        f"[{{'role': {role!r}, 'content': …}}]"
    )


def _without_nulls(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys that a table has filled up with nulls; an absent content stays ``None``.

    A null that was recorded cannot be told from one that a table put there. It is dropped too, so
    that a message which had one comes back from an export under another id.
    """
    return {key: value for key, value in turn.items() if value is not None or key == "content"}


def _prompt(row: Mapping[str, Any], *, shared: list[dict[str, Any]]) -> Prompt:
    """Join the prompt column and the turns that the answers share, which may repeat it."""
    given = row.get("prompt", [])
    turns = _turns(given, "prompt", role="user") if given else []
    repeated = shared and (isinstance(given, str) or shared[: len(turns)] == turns)
    messages = shared if repeated else turns + shared
    if not messages:
        raise ExchangeError("the row has no prompt; write it in a column 'prompt'")
    return prompt_of(messages, _tools(row))


def _answer(turns: Sequence[Message]) -> Message:
    check_output(turns[-1])
    return turns[-1]


def _tools(row: Mapping[str, Any]) -> Sequence[Tool]:
    tools = row.get("tools", [])
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError as error:
            raise ExchangeError(
                f"'tools' is no JSON ({error}); write a list of tools, or leave it out"
            ) from error
    return tools  # type: ignore[no-any-return]  # prompt_of refuses what is no list of mappings


def _tag(row: Mapping[str, Any]) -> str | None:
    tag = row.get("tag")
    return tag if isinstance(tag, str) else None
