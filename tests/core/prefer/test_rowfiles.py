"""Files of rows: JSON lists give the items that a parser gives, and Parquet keeps every value."""

from __future__ import annotations

import io
import json
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError, MissingDependency
from agentpref.prefer import rowfiles
from agentpref.prefer.rowfiles import Meter, read_rows, write_rows

COLUMNS = {
    "prompt": ["json"],
    "input": {"messages": ["json"], "tools": ["json"]},
    "turns": [{"from": "text", "value": "text"}],
    "label": "flag",
    "tag": "text",
}
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(-1e300, 1e300)
    | st.text('ab"\\,[]{}é \n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"]'), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
items = st.dictionaries(st.text('a"]'), values, max_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows"


def rows_in(path: Path, content: bytes | None = None, wanted: Any = COLUMNS) -> list[Any]:
    """The rows of a file; a row that cannot be read is the message of its error."""
    if content is not None:
        path.write_bytes(content)
    found = read_rows(path, wanted, Meter())
    return [str(row) if isinstance(row, ExchangeError) else row for _, row in found]


class TestJsonLists:
    @given(st.sampled_from([1, 7, 1 << 16]), st.sampled_from([None, 2]), st.lists(items))
    def test_items_are_those_that_a_parser_gives(
        self, path: Path, chunk: int, indent: int | None, told: list[object]
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rowfiles, "CHUNK_BYTES", chunk)
            text = "[" + json.dumps(told, indent=indent, ensure_ascii=False)[1:] + " \n"
            assert rows_in(path, text.encode()) == told

    @given(text=st.binary())
    def test_any_bytes_end_in_rows_or_an_exchange_error(self, path: Path, text: bytes) -> None:
        try:
            assert all(isinstance(row, dict | str) for row in rows_in(path, b"[" + text))
        except ExchangeError as error:
            assert str(error).startswith(f"{path}: from row ")  # noqa: PT017

    def test_an_empty_list_has_no_rows(self, path: Path) -> None:
        assert rows_in(path, b"[]") == rows_in(path, b"[ \n ]") == []

    @pytest.mark.parametrize("item", [b"7", b'["a"]', b'"a"', b"null"])
    def test_an_item_that_is_not_an_object_is_an_error_of_its_row(
        self, path: Path, item: bytes
    ) -> None:
        bad, good = rows_in(path, b"[" + item + b', {"a": 1}]')
        assert "not a JSON object; write" in bad
        assert good == {"a": 1}

    @pytest.mark.parametrize("value", [b"9" * 30, b"1e400", b"[" * 50_000 + b"]" * 50_000])
    def test_a_value_that_cannot_be_stored_is_an_error_of_its_row(
        self, path: Path, value: bytes
    ) -> None:
        bad, good = rows_in(path, b'[{"a": ' + value + b'}, {"a": 1}]')
        assert "it holds a value that cannot be stored" in bad
        assert good == {"a": 1}

    def test_of_two_equal_keys_the_last_counts_as_in_json_lines(self, path: Path) -> None:
        item = b'{"a": 1, "a": 2}'
        assert rows_in(path, b"[" + item + b"]") == rows_in(path, item) == [{"a": 2}]

    def test_a_gigantic_item_ends_the_reading_before_it_fills_the_memory(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rowfiles, "CHUNK_BYTES", 10)
        monkeypatch.setattr(rowfiles, "MAX_ROW_BYTES", 50)
        with pytest.raises(ExchangeError, match="row 2 is longer than 50 bytes; check that"):
            rows_in(path, b'[{}, {"a": "' + b"x" * 900 + b'"}]')

    @pytest.mark.parametrize(
        "text", [b"[{}", b'[{}, "]', b"[{}, [2]", b"[{}] x", b"[{}][]", b"[{},]", b"[{},NaN]"]
    )
    def test_a_list_that_breaks_off_raises_after_the_rows_before(
        self, path: Path, text: bytes
    ) -> None:
        path.write_bytes(text)
        found = read_rows(path, COLUMNS, Meter())
        assert next(found) == ("row 1", {})
        with pytest.raises(ExchangeError, match=r"from row [23] on") as error:
            list(found)
        assert "correct it there, or fetch the file again" in str(error.value)

    def test_text_that_is_not_utf8_is_refused_with_the_cure(self, path: Path) -> None:
        with pytest.raises(ExchangeError, match=r"from row 1 on .*invalid bytes in UTF8.*iconv"):
            rows_in(path, b'[{"a": "caf\xe9"}]')


pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

ROW = {
    "prompt": [{"role": "user", "content": None, "b": 1, "a": [None, {"x": None}]}],
    "input": {"messages": [1, "two", None, [3]]},
    "turns": [{"from": "human", "value": "hi"}],
    "label": False,
    "tag": "é",
}


class TestParquet:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "rows.parquet"

    def written(self, path: Path, rows: list[dict[str, Any]]) -> Path:
        assert write_rows(rows, COLUMNS, path) == len(rows)
        return path

    def table_of(self, path: Path, columns: dict[str, Any]) -> Path:
        pa.parquet.write_table(pa.table(columns), path)
        return path

    def test_rows_read_back_exactly_as_written(self, path: Path) -> None:
        [row] = rows_in(self.written(path, [ROW]))
        assert row == ROW
        assert list(row["prompt"][0]) == ["role", "content", "b", "a"]

    def test_an_absent_key_is_written_as_null_and_left_out_when_read(self, path: Path) -> None:
        rows = [{"tag": "x"}, {"prompt": [], "label": True}]
        assert rows_in(self.written(path, rows)) == rows

    def test_a_table_is_read_and_written_in_batches(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rowfiles, "BATCH_ROWS", 2)
        rows = [{"tag": str(number)} for number in range(5)]
        self.written(path, rows)
        assert pa.parquet.ParquetFile(path).metadata.num_row_groups == 3
        assert rows_in(path) == rows

    def test_large_rows_make_small_batches(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rowfiles, "BATCH_BYTES", 1000)
        self.written(path, [{"tag": "x" * 400} for _ in range(7)])
        assert pa.parquet.ParquetFile(path).metadata.num_row_groups == 3

    def test_nulls_that_fill_up_structs_are_left_out_except_a_content(self, path: Path) -> None:
        messages = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        ]
        tools = [{"properties": {"a": {"type": "x"}}}, {"properties": {"b": {"type": "y"}}}]
        [row] = rows_in(
            self.table_of(path, {"prompt": [messages], "tools": [tools]}), None, ["tools"]
        )
        assert row == {"tools": tools}
        [row] = rows_in(self.table_of(path, {"prompt": [messages]}))
        assert row == {"prompt": [messages[0], {**messages[1], "content": None}]}

    @pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 1)])
    def test_json_is_parsed_in_every_kind_of_list(self, path: Path, kind: Any) -> None:
        text = pa.array([['{"a": null}'], None], kind(pa.string())).cast(kind(pa.json_()))
        assert rows_in(self.table_of(path, {"prompt": text})) == [{"prompt": [{"a": None}]}, {}]

    def test_only_wanted_columns_are_read_or_all_if_there_is_none(self, path: Path) -> None:
        when = pa.array([1], pa.timestamp("ns"))  # Python cannot hold such times
        assert rows_in(self.table_of(path, {"tag": ["x"], "when": when})) == [{"tag": "x"}]
        assert rows_in(self.table_of(path, {"what": ["x"]})) == [{"what": "x"}]

    def test_a_value_that_cannot_be_read_is_the_error_of_its_row(self, path: Path) -> None:
        texts = pa.array([b"fine", b"caf\xe9", b"good"], pa.binary()).view(pa.string())
        first, bad, last = rows_in(self.table_of(path, {"tag": texts}))
        assert (first, last) == ({"tag": "fine"}, {"tag": "good"})
        assert "a value cannot be read ('utf-8' codec" in bad
        broken = pa.array(['{"a": 1}', "{"], pa.string()).cast(pa.json_())
        good, bad = rows_in(self.table_of(path, {"tag": broken}))
        assert good == {"tag": {"a": 1}}
        assert "a value cannot be read" in bad

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
    def test_a_file_that_is_not_a_table_is_refused(self, path: Path, content: bytes) -> None:
        with pytest.raises(ExchangeError, match="cannot be read as Parquet"):
            rows_in(path, content)

    def test_a_damaged_table_raises_only_exchange_errors(self, path: Path) -> None:
        whole = self.written(path, [ROW] * 50).read_bytes()
        chance = random.Random(0)
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            with suppress(ExchangeError):
                assert all(isinstance(row, dict | str) for row in rows_in(path, bytes(damaged)))

    def test_without_pyarrow_the_error_says_how_to_install_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        for use in (lambda: rows_in(path, b"PAR1"), lambda: self.written(path, [])):
            with pytest.raises(
                MissingDependency, match=r"install --upgrade 'agentpref\[parquet\]'"
            ):
                use()

    def test_a_pyarrow_without_the_json_type_is_refused_with_the_upgrade(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(pa, "json_")
        with pytest.raises(MissingDependency, match=r"version 19 or newer .*json_.*--upgrade"):
            rows_in(path, b"PAR1")

    def test_datasets_reads_every_value_as_it_was_written(self, path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        self.written(path, [ROW, {"tag": "x"}])
        table = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
        assert table[0]["prompt"] == ROW["prompt"]
        assert table[0]["input"] == {**ROW["input"], "tools": None}
        assert table[1]["prompt"] is None


def test_a_stream_gets_json_lines() -> None:
    stream = io.BytesIO()
    assert write_rows([{"tag": "é"}, {}], COLUMNS, stream) == 2
    assert stream.getvalue() == '{"tag":"é"}\n{}\n'.encode()
