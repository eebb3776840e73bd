"""Which formats there are, and which one a row is in.

A row's keys tell its format: the one of which it lacks the fewest keys, and of several such the one
that stands first here. Adding a format is a module beside this one and its lines here. Knows
nothing of files, runs or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TypeAlias

from agentpref.errors import ExchangeError, InvalidMessage
from agentpref.prefer.formats import llamafactory, openai, trl
from agentpref.prefer.rows import Fields, Row
from agentpref.types import Pair, Thumb

PairFormat = Literal["preference", "openai", "llamafactory"]
Format = Literal["preference", "unpaired", "openai", "llamafactory"]

Columns: TypeAlias = Mapping[str, Any]
"""What stands under each key of a format: ``"text"``, ``"flag"``, ``"json"`` for any JSON value,
a list with one of these in it, or again a mapping."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of row that is read: the keys that it must have, and how."""

    format: Format
    keys: tuple[str, ...]
    read: Callable[[Fields], Row]


SHAPES = (
    Shape("llamafactory", ("conversations", "chosen", "rejected"), llamafactory.read_sharegpt),
    Shape("llamafactory", ("instruction", "chosen", "rejected"), llamafactory.read_alpaca),
    Shape("preference", ("chosen", "rejected"), trl.read_preference),
    Shape("unpaired", ("prompt", "completion", "label"), trl.read_unpaired),
    Shape("openai", ("input", "preferred_output", "non_preferred_output"), openai.read),
)

COLUMNS: Mapping[Format, Columns] = {
    "preference": trl.PREFERENCE_COLUMNS,
    "unpaired": trl.UNPAIRED_COLUMNS,
    "openai": openai.COLUMNS,
    "llamafactory": llamafactory.COLUMNS,
}
"""The columns that each format is written with."""

PAIR_WRITERS: Mapping[PairFormat, Callable[[Pair], dict[str, Any]]] = {
    "preference": trl.write_preference,
    "openai": openai.write,
    "llamafactory": llamafactory.write,
}

READ_KEYS = frozenset(
    {"prompt", "tools", "tag", "system", "history", "input", *(k for s in SHAPES for k in s.keys)}
)
"""Every key that some format reads; all others are passed over."""


def read_row(row: Fields, format: Format | None = None) -> Row:
    """Read one row; its keys say which format it is in, unless ``format`` does.

    Raises:
        ExchangeError: saying what is wrong with the row, and the cure.
    """
    given = {key: value for key, value in row.items() if value is not None}
    shape = _nearest(frozenset(given), format)
    _require_keys(given, shape)
    try:
        return shape.read(given)
    except InvalidMessage as error:
        raise ExchangeError(str(error)) from error
    except RecursionError as error:
        raise ExchangeError("the row is nested too deeply; flatten it") from error


def write_pair(pair: Pair, format: PairFormat) -> dict[str, Any]:
    """Write a pair as a row.

    Raises:
        ExchangeError: the format cannot hold the pair.
    """
    return PAIR_WRITERS[format](pair)


def write_thumb(thumb: Thumb) -> dict[str, Any]:
    """Write a thumb as a row of TRL's unpaired format."""
    return trl.write_unpaired(thumb)


@lru_cache(maxsize=64)
def _nearest(keys: frozenset[str], format: Format | None) -> Shape:
    """Find the shape for a set of keys; a ``prompt`` beside an ``instruction`` speaks for TRL."""

    def distance(shape: Shape) -> tuple[int, bool]:
        return len(set(shape.keys) - keys), shape.format == "llamafactory" and "prompt" in keys

    return min((s for s in SHAPES if format in (None, s.format)), key=distance)


def _require_keys(row: Fields, shape: Shape) -> None:
    missing = [key for key in shape.keys if key not in row]
    if missing:
        raise ExchangeError(
            f"the row has the keys {_names(islice(row, 12))} and lacks {_names(missing)}; write "
            f"{_names(shape.keys)} in every row of the {shape.format} format"
        )


def _names(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys) or "none"
