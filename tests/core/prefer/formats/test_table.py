"""Which format a row is in, where nobody says so."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from agentpref.errors import ExchangeError
from agentpref.prefer.formats.table import (
    COLUMNS,
    PAIR_WRITERS,
    READ_KEYS,
    SHAPES,
    Format,
    PairFormat,
    read_row,
)

ANSWERS = {"chosen": "The sea is blue.", "rejected": "The sea is red."}
TURNS = {
    "chosen": {"from": "gpt", "value": "Blue."},
    "rejected": {"from": "gpt", "value": "Red."},
}
ASKED = {
    "preference": {**ANSWERS, "prompt": "The sea?", "instruction": "not this", "input": "nor this"},
    "preference, prompt implied": ANSWERS,
    "llamafactory": {**TURNS, "conversations": [{"from": "human", "value": "The sea?"}]},
    "llamafactory, alpaca": {**ANSWERS, "instruction": "The sea?"},
    "openai": {
        "input": {"messages": [{"role": "user", "content": "The sea?"}]},
        "preferred_output": "Blue.",
        "non_preferred_output": "Red.",
    },
    "unpaired": {"prompt": "The sea?", "completion": "Blue.", "label": True},
}


@pytest.mark.parametrize(("name", "row"), ASKED.items(), ids=ASKED)
def test_the_keys_of_a_row_tell_its_format(name: str, row: dict[str, Any]) -> None:
    format: Any = name.split(",")[0]
    asked = "The sea is" if "implied" in name else "The sea?"
    assert read_row(row) == read_row(row, format)
    assert read_row(row).prompt.messages[-1]["content"] == asked


def test_columns_that_are_null_tell_nothing() -> None:
    row = {**ASKED["openai"], "chosen": None, "rejected": None, "conversations": None}
    assert read_row(row) == read_row(ASKED["openai"])


def test_a_format_that_is_named_is_the_one_that_is_read() -> None:
    with pytest.raises(ExchangeError, match="lacks 'conversations'; write"):
        read_row({**ANSWERS, "prompt": "The sea?"}, "llamafactory")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_row_without_end_is_refused() -> None:
    sides = {side: [{"a": nested(50_000)}, {}] for side in ("chosen", "rejected")}
    with pytest.raises(ExchangeError, match="nested too deeply"):
        read_row({"prompt": "The sea?", **sides})


def test_every_format_is_read_and_written() -> None:
    assert {shape.format for shape in SHAPES} == {*get_args(Format)} == {*COLUMNS}
    assert {*PAIR_WRITERS} == {*get_args(PairFormat)} == {*get_args(Format)} - {"unpaired"}
    assert {key for columns in COLUMNS.values() for key in columns} <= READ_KEYS
