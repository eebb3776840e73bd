"""Reading the header of a safetensors file, against the library's own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from agentpref.models.base_files import parse_object, read_header


def test_the_header_equals_what_the_library_wrote(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": np.ones((2, 3), "f4"), "b": np.ones(4, "f2")}, file, {"state": "{}"})
    header = read_header(file)
    assert header.metadata == {"state": "{}"}
    assert {name: entry["shape"] for name, entry in header.tensors.items()} == {
        "a": [2, 3],
        "b": [4],
    }
    begin, end = header.tensors["a"]["data_offsets"]
    data = file.read_bytes()[header.start + begin : header.start + end]
    assert np.frombuffer(data, "f4").tolist() == [1.0] * 6


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, b"\xff" * 16, b"\2\0\0\0\0\0\0\0[]", b"\3\0\0\0\0\0\0\0 {}"]
)
def test_a_file_without_a_header_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "not a JSON object"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"b": [{"a": 1, "a": 2}]}', "has the key 'a' twice"),
        (b'{"a": NaN}', "NaN|character"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "."),
    ],
)
def test_json_that_readers_may_read_differently_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(data)
