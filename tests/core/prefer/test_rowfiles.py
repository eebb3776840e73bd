"""Files of rows: JSON lists give the items that a parser gives, and Parquet keeps every value."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError, MissingDependency
from agentpref.prefer import jsonrows, rowfiles
from agentpref.prefer.jsonrows import Meter
from agentpref.prefer.rowfiles import read_rows, write_rows

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
            patch.setattr(jsonrows, "CHUNK_BYTES", chunk)
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
        bad, good = rows_in(path, b'[{"tag": ' + value + b'}, {"tag": 1}]')
        assert "it holds a value that cannot be stored" in bad
        assert good == {"tag": 1}
        assert rows_in(path, b'[{"a": ' + value + b', "tag": 1}]') == [{"a": True, "tag": 1}]

    def test_of_two_equal_keys_the_last_counts_as_in_json_lines(self, path: Path) -> None:
        item = b'{"a": 1, "a": 2}'
        assert rows_in(path, b"[" + item + b"]") == rows_in(path, item) == [{"a": 2}]

    def test_a_gigantic_item_ends_the_reading_before_it_fills_the_memory(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jsonrows, "CHUNK_BYTES", 10)
        monkeypatch.setattr(jsonrows, "MAX_ROW_BYTES", 50)
        with pytest.raises(ExchangeError, match="row 2 is longer than 50 bytes; check that"):
            rows_in(path, b'[{}, {"a": "' + b"x" * 900 + b'"}]')

    @pytest.mark.parametrize(
        "text", [b"[{}", b'[{}, "]', b"[{}, [2]", b"[{}] x", b"[{}][]", b"[{},]"]
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

    @given(st.sampled_from([1, 3, 1 << 16]), st.lists(items))
    def test_nan_and_infinities_of_a_column_are_missing_values(
        self, path: Path, chunk: int, told: list[dict[str, object]]
    ) -> None:
        rows = [{**row, "tag": float("nan"), "text": 'NaN "\\\\" -Infinity'} for row in told]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jsonrows, "CHUNK_BYTES", chunk)
            found = rows_in(path, b"[" + json.dumps(rows).encode()[1:], {"tag", "text", 'a"]'})
        assert [row["tag"] for row in found] == [None] * len(told)
        assert {row["text"] for row in found} <= {rows[0]["text"] if rows else ""}

    def test_text_that_is_not_utf8_is_refused_with_the_cure(self, path: Path) -> None:
        with pytest.raises(ExchangeError, match=r"from row 1 on .*invalid bytes in UTF8.*iconv"):
            rows_in(path, b'[{"a": "caf\xe9"}]')


NOT_JSON = b'{"label": 1, "score": NaN, "scores": [Infinity, {"x": -Infinity}]}'
HALF_AN_EMOJI = b'{"label": 1, "emoji": "\\ud83d", "scores": [0]}'


@pytest.mark.parametrize("text", [NOT_JSON, b"[" + NOT_JSON + b"]", HALF_AN_EMOJI])
def test_a_column_that_is_not_wanted_never_spoils_a_row(path: Path, text: bytes) -> None:
    (row,) = rows_in(path, text)
    assert row["label"] == 1
    assert row["scores"]


@pytest.mark.parametrize("text", [b'{"prompt": [NaN]}\n{}', b'[{"prompt": [NaN]}, {}]'])
def test_nan_inside_a_value_that_is_wanted_is_an_error_of_its_row(path: Path, text: bytes) -> None:
    bad, good = rows_in(path, text)
    assert "write one JSON object on each line" in bad
    assert good == {}


@pytest.mark.parametrize("text", [b'{"tag": "x"}\n', b'[{"tag": "x"}]'])
def test_a_file_that_gzip_packed_is_read(path: Path, text: bytes) -> None:
    assert rows_in(path, gzip.compress(text)) == [{"tag": "x"}]
    with pytest.raises(ExchangeError, match=r"cannot be unpacked to its end .*; fetch the file"):
        rows_in(path, gzip.compress(text)[:-9])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_the_cure(path: Path, encoding: str) -> None:
    with pytest.raises(ExchangeError, match=r"it is UTF-16, not UTF-8; .*iconv -f UTF-16 -t"):
        rows_in(path, '{"tag": "x"}\n'.encode(encoding))


def test_a_name_that_says_csv_is_believed(tmp_path: Path) -> None:
    assert rows_in(tmp_path / "rows.csv", b"prompt,tag\na,b\n") == [{"prompt": "a", "tag": "b"}]
    with pytest.raises(ExchangeError, match="its first line names no column"):
        rows_in(tmp_path / "rows.csv.gz", gzip.compress(b"1,2\n3,4\n"))


@pytest.mark.parametrize(
    "start", [b"", b'{"tag": "', b'[{"tag": "', b'prompt,tag\n"', b"prompt,tag\n"]
)
def test_a_gzip_bomb_takes_no_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(jsonrows, "MAX_ROW_BYTES", 1 << 20)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(64):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    with suppress(ExchangeError):
        assert all(isinstance(row, ExchangeError) for _, row in read_rows(path, COLUMNS, Meter()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_name_that_ends_in_gz_is_packed_the_same_each_time(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    assert write_rows([{"tag": "x"}], COLUMNS, file) == 1
    packed = file.read_bytes()
    assert gzip.decompress(packed) == b'{"tag":"x"}\n'
    write_rows([{"tag": "x"}], COLUMNS, file)
    assert file.read_bytes() == packed


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv.gz", "rows.parquet.gz"])
def test_a_name_that_says_what_is_not_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExchangeError, match=r"name a file that ends in \.jsonl, .*\.parquet"):
        write_rows([{"tag": "x"}], COLUMNS, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


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

    def test_rows_with_columns_that_are_not_read_are_counted(self, path: Path) -> None:
        columns = {"tag": ["x", "y", "z"], "score": [None, 1.5, 2.5], "empty": pa.nulls(3)}
        pa.parquet.write_table(pa.table({**columns, "meta": [{"a": 1, "b": 2}] * 3}), path)
        meter = Meter()
        list(read_rows(path, COLUMNS, meter))
        assert meter.unread == {"score": 2, "meta": 3}

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


@pytest.mark.parametrize("to", ["stream", "file"])
def test_json_lines_hold_no_raw_control_and_read_back_as_the_same(tmp_path: Path, to: str) -> None:
    """People look at exports on terminals, which would obey what others wrote."""
    row = {"prompt": ["a\u009b31mb\u202ec\x1b[2Jd\u2028e\U000e0041f é 😀"], "tag": "\u2066"}
    stream, path = io.BytesIO(), tmp_path / "rows.jsonl"
    write_rows([row], COLUMNS, stream if to == "stream" else path)
    written = stream.getvalue() if to == "stream" else path.read_bytes()
    (line,) = written.decode().removesuffix("\n").split("\n")
    assert line.isprintable()
    assert "é 😀" in line
    assert rows_in(tmp_path / "again", written) == [row]


def test_a_stream_gets_json_lines() -> None:
    stream = io.BytesIO()
    assert write_rows([{"tag": "é"}, {}], COLUMNS, stream) == 2
    assert stream.getvalue() == '{"tag":"é"}\n{}\n'.encode()


def test_the_next_export_removes_the_draft_of_one_that_was_killed(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from agentpref.prefer.rowfiles import write_rows
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        write_rows([{"text": "a secret"}], {}, sys.argv[1])
    """
    target = tmp_path / "rows.jsonl"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.iterdir()
    assert "a secret" in left.read_text(encoding="utf-8")
    write_rows([{"text": "another"}], {}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
