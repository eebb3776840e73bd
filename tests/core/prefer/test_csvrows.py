"""CSV: columns by name become rows, and what is damaged is an error of its row with the cure."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.prefer import csvrows, jsonrows
from agentpref.prefer.formats import TextRow
from agentpref.prefer.jsonrows import Meter
from agentpref.prefer.rowfiles import read_rows
from agentpref.prefer.rowreader import RowReader

WANTED = {"prompt", "chosen", "rejected", "completion", "label", "tag"}
PAIRS = b"prompt,chosen,rejected\nHow?,So.,No.\n"


def found_in(content: bytes, name: str = "", wanted: Any = WANTED) -> list[tuple[str, Any]]:
    stream = io.BytesIO(content)
    if name:
        stream.name = name
    rows = read_rows(stream, wanted, Meter())
    return [(at, str(row) if isinstance(row, ExchangeError) else row) for at, row in rows]


def test_the_header_names_the_columns_of_each_row() -> None:
    assert found_in(PAIRS) == [("line 2", {"prompt": "How?", "chosen": "So.", "rejected": "No."})]


@pytest.mark.parametrize(
    "content",
    [
        PAIRS.replace(b",", b"\t"),
        PAIRS.replace(b",", b";"),
        b"\xef\xbb\xbf" + PAIRS,
        PAIRS.replace(b"\n", b"\r\n"),
        gzip.compress(PAIRS, mtime=0),
        b"\n" + PAIRS.replace(b"chosen", b' "chosen"', 1).replace(b' "chosen"', b"chosen ", 1),
    ],
)
def test_spreadsheets_write_it_in_many_ways(content: bytes) -> None:
    [(_, row)] = found_in(content)
    assert row == {"prompt": "How?", "chosen": "So.", "rejected": "No."}


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\0") | st.sampled_from('",;\n')
)


@given(st.lists(st.tuples(texts, texts, texts), max_size=5), st.sampled_from(csvrows.DELIMITERS))
def test_what_a_writer_of_csv_writes_is_read_back(rows: list, delimiter: str) -> None:
    told = io.StringIO()
    writer = csv.writer(told, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "chosen", "tag"), *rows])
    found = [row for _, row in found_in(told.getvalue().encode())]
    assert [tuple(row.values()) for row in found] == rows


@given(st.binary())
def test_any_bytes_end_in_rows_or_an_exchange_error(content: bytes) -> None:
    try:
        assert all(isinstance(row, dict | str) for _, row in found_in(content, "x.csv"))
    except ExchangeError as error:
        assert str(error).startswith("x.csv: ")  # noqa: PT017


def test_a_row_is_placed_on_the_line_on_which_it_begins() -> None:
    told = b'prompt,tag\n"a\n\nb",x\n\nc,y\n'
    assert [place for place, _ in found_in(told)] == ["line 2", "line 6"]


def test_damage_is_an_error_of_its_row_and_the_rows_after_it_are_read() -> None:
    told = (
        b'prompt,tag\n"a"b,x\nonly\na,b,c\ncaf\xe9,x\n'
        + b"w" * (csv.field_size_limit() + 1)
        + b",x\nlast,x\n"
    )
    found = found_in(told)
    assert [place for place, _ in found] == [f"line {n}" for n in range(2, 8)]
    quotes, few, many, latin, long, last = (row for _, row in found)
    assert "double its quotes" in quotes
    assert "has 1 cell, and the header names 2 columns" in few
    assert "has 3 cells" in many
    assert "byte 3 is not UTF-8 (0xe9)" in latin
    assert "iconv" in latin
    assert "write JSON lines, whose texts may be longer" in long
    assert last == {"prompt": "last", "tag": "x"}


def test_a_quote_that_is_never_closed_ends_in_an_error() -> None:
    [(place, row)] = found_in(b'prompt,tag\n"a,x\nb,y\n')
    assert (place, "unexpected end of data" in row) == ("line 2", True)


@pytest.mark.parametrize(
    "row", [b"x" * 200, b'"' + b"\n" * 99 + b'",x', b'"a\n","b\n","c\n",' * 30, b'"' + b"x\n" * 80]
)
def test_a_gigantic_row_ends_before_it_fills_the_memory(monkeypatch, row: bytes) -> None:
    monkeypatch.setattr(jsonrows, "MAX_ROW_BYTES", 60)
    found = found_in(b"prompt,tag\nfirst,x\n" + row + b"\nlast,x\n")
    assert found[0] == ("line 2", {"prompt": "first", "tag": "x"})
    assert "it is longer than 60 bytes" in found[1][1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"How?,So.,No.\nWhy?,So.,No.\n", "its first line names no column that a format knows"),
        (b"prompt,chosen,prompt\na,b,c\n", "it has the column 'prompt' twice"),
        (b'prompt,"cho"sen\na,b\n', "its header, line 1, cannot be read: it is not CSV"),
        (b"prompt,cho\xffsen\na,b\n", "its header, line 1, cannot be read: byte 10 is not UTF-8"),
    ],
)
def test_a_header_that_names_nothing_ends_the_reading(content: bytes, words: str) -> None:
    with pytest.raises(ExchangeError, match=words):
        found_in(content, "x.csv")


def test_a_line_of_text_is_not_taken_for_a_header() -> None:
    [(_, row)] = found_in(b"Hello, world\n")
    assert "it is not JSON" in row


def test_a_column_without_a_name_is_called_by_its_place() -> None:
    assert found_in(b",prompt,tag\n0,a,x\n") == [
        ("line 2", {"column 1": "0", "prompt": "a", "tag": "x"})
    ]


class TestWhatCellsMean:
    """Cells are text; the format says what is made of them."""

    @pytest.mark.parametrize(
        ("text", "label"), [("True", 1), ("false", 0), ("1", 1), ("0.0", 0), (" TRUE ", 1)]
    )
    def test_a_flag_is_read_as_spreadsheets_write_it(self, text: str, label: int) -> None:
        row = TextRow(prompt="How?", completion="So.", label=text, tag="", tools="")
        assert RowReader().read(row).labels == (label,)

    def test_another_word_is_no_flag(self) -> None:
        with pytest.raises(ExchangeError, match="'label' is a str of 5 characters; write true"):
            RowReader().read(TextRow(prompt="How?", completion="So.", label="maybe"))

    def test_an_answer_that_is_json_stays_text(self) -> None:
        row = TextRow(prompt="How many?", chosen='{"count": 1}', rejected="[1]")
        answers = [message["content"] for message in RowReader().read(row).completions]
        assert answers == ['{"count": 1}', "[1]"]

    def test_messages_are_written_as_json(self) -> None:
        asked = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]'
        tools = '[{"type": "function", "function": {"name": "look"}}]'
        row = TextRow(prompt=asked, chosen="So.", rejected="No.", tools=tools, tag="hours")
        record = RowReader().read(row)
        assert [m["role"] for m in record.prompt.messages] == ["system", "user"]
        assert record.prompt.tools[0]["function"]["name"] == "look"
        assert record.tag == "hours"

    def test_formats_of_objects_and_turns_are_written_as_json(self) -> None:
        said = '[{"role": "assistant", "content": "So."}]'
        openai = TextRow(
            input='{"messages": [{"role": "user", "content": "How?"}]}',
            preferred_output=said,
            non_preferred_output=said.replace("So", "No"),
        )
        sharegpt = TextRow(
            conversations='[{"from": "human", "value": "How?"}]',
            chosen='{"from": "gpt", "value": "So."}',
            rejected='{"from": "gpt", "value": "No."}',
        )
        alpaca = TextRow(
            instruction="How?", input="", chosen='{"a": 1}', rejected="No.", history='[["a", "b"]]'
        )
        one, two, three = (RowReader().read(row) for row in (openai, sharegpt, alpaca))
        assert one.prompt == two.prompt
        assert one.completions == two.completions
        assert three.completions[0]["content"] == '{"a": 1}'
        assert len(three.prompt.messages) == 3


def test_parquet_in_a_pipe_is_refused_with_the_cure(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with pytest.raises(ExchangeError, match=r"is Parquet, which is not read in order; save it"):
        list(read_rows(Pipe(b"PAR1 and more"), WANTED, Meter()))


def test_a_stream_stays_open_for_its_owner() -> None:
    stream = io.BytesIO(PAIRS)
    list(read_rows(stream, WANTED, Meter()))
    assert not stream.closed
