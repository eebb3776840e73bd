"""Parquet: tables of our own come back to the letter, and those of others without their padding."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import ExchangeError, MissingDependency
from agentpref.prefer import parquet

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "prompt": ["json"],
    "input": {"messages": ["json"], "tools": ["json"]},
    "turns": [{"from": "text", "value": "text"}],
    "label": "flag",
    "tag": "text",
}
ROW = {
    "prompt": [{"role": "user", "content": None, "b": 1, "a": [None, {"x": None}]}],
    "input": {"messages": [1, "two", None, [3]]},
    "turns": [{"from": "human", "value": "hi"}],
    "label": False,
    "tag": "é",
}
WANTED = frozenset(COLUMNS)


def written(rows: list[dict[str, Any]]) -> io.BytesIO:
    file = io.BytesIO()
    assert parquet.write(rows, COLUMNS, file) == len(rows)
    file.seek(0)
    return file


def table_of(columns: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    file.seek(0)
    return file


def test_rows_come_back_to_the_letter() -> None:
    [row] = parquet.read(written([ROW]), WANTED).rows
    assert row == ROW
    assert isinstance(row, dict)
    assert list(row["prompt"][0]) == ["role", "content", "b", "a"]


def test_a_key_that_is_absent_is_null_and_left_out_again() -> None:
    rows = [{"tag": "x"}, {"prompt": [], "label": True}]
    assert [*parquet.read(written(rows), WANTED).rows] == rows


def test_a_table_is_read_and_written_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    rows = [{"tag": str(number)} for number in range(5)]
    file = written(rows)
    assert pa.parquet.ParquetFile(file).metadata.num_row_groups == 3
    table = parquet.read(file, WANTED)
    assert (table.count, [*table.rows]) == (5, rows)


def test_large_rows_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1000)
    file = written([{"tag": "x" * 400} for _ in range(7)])
    assert pa.parquet.ParquetFile(file).metadata.num_row_groups == 3


def test_padding_of_structs_is_left_out_but_not_an_absent_content() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
    ]
    tools = [{"properties": {"a": {"type": "x"}}}, {"properties": {"b": {"type": "y"}}}]
    [row] = parquet.read(table_of({"prompt": [messages], "tools": [tools]}), ["tools"]).rows
    assert row == {"tools": tools}
    [row] = parquet.read(table_of({"prompt": [messages]}), ["prompt"]).rows
    assert row == {"prompt": [messages[0], {**messages[1], "content": None}]}


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 1)])
def test_json_is_read_wherever_it_stands(kind: Any) -> None:
    text = pa.array([['{"a": null}'], None], kind(pa.string())).cast(kind(pa.json_()))
    rows = parquet.read(table_of({"prompt": text}), WANTED).rows
    assert [*rows] == [{"prompt": [{"a": None}]}, {}]


def test_other_columns_are_not_even_read() -> None:
    when = pa.array([1], pa.timestamp("ns"))  # Python has no such times
    assert [*parquet.read(table_of({"tag": ["x"], "when": when}), WANTED).rows] == [{"tag": "x"}]
    assert [*parquet.read(table_of({"what": ["x"]}), WANTED).rows] == [{"what": "x"}]


def test_a_value_that_cannot_be_read_is_the_error_of_its_row() -> None:
    texts = pa.array([b"fine", b"caf\xe9", b"good"], pa.binary()).view(pa.string())
    first, bad, last = parquet.read(table_of({"tag": texts}), WANTED).rows
    assert (first, last) == ({"tag": "fine"}, {"tag": "good"})
    assert isinstance(bad, ExchangeError)
    assert "a value cannot be read ('utf-8' codec" in str(bad)
    broken = pa.array(['{"a": 1}', "{"], pa.string()).cast(pa.json_())
    good, bad = parquet.read(table_of({"tag": broken}), WANTED).rows
    assert good == {"tag": {"a": 1}}
    assert isinstance(bad, ExchangeError)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_no_table_says_so(content: bytes) -> None:
    with pytest.raises(ExchangeError, match="cannot be read as Parquet"):
        parquet.read(io.BytesIO(content), WANTED)


def test_a_damaged_table_raises_nothing_else() -> None:
    whole = written([ROW] * 50).getvalue()
    chance = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            for row in parquet.read(io.BytesIO(damaged), WANTED).rows:
                assert isinstance(row, dict | ExchangeError)
        except ExchangeError:
            pass


def test_without_pyarrow_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (lambda: parquet.read(io.BytesIO(), WANTED), lambda: written([])):
        with pytest.raises(MissingDependency, match=r"pip install 'agentpref\[parquet\]'"):
            use()


def test_a_pyarrow_without_json_is_to_be_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pa, "json_")
    with pytest.raises(MissingDependency, match=r"too old.*--upgrade"):
        parquet.read(io.BytesIO(), WANTED)


def test_datasets_reads_what_was_written_as_it_was(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    path.write_bytes(written([ROW, {"tag": "x"}]).getvalue())
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table[0]["prompt"] == ROW["prompt"]
    assert table[0]["input"] == {**ROW["input"], "tools": None}
    assert table[1]["prompt"] is None
