"""An import of any file counts every row or ends with an ExchangeError."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.home import Home
from agentpref.prefer.exchange import Imported, import_file
from agentpref.prefer.rowreader import RowReader
from agentpref.record.database import connect
from agentpref.record.ingest.redaction import redact
from agentpref.record.integrity import examine

pytestmark = pytest.mark.slow

ASKED = [{"role": "user", "content": "The sky?"}]
BLUE, RED = ({"role": "assistant", "content": text} for text in ("Blue.", "Red."))
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "The sky?"}]
VALID: list[dict[str, Any]] = [
    {"prompt": ASKED, "chosen": [BLUE], "rejected": [CALLED], "tools": [{"name": "f"}]},
    {"prompt": "The sky?", "chosen": "Blue.", "rejected": "Red.", "tag": "sky"},
    {"chosen": "The sky is blue.", "rejected": "The sky is red."},
    {"prompt": ASKED, "completion": [*ASKED, BLUE], "label": True, "tools": '[{"name": "f"}]'},
    {
        "input": {"messages": ASKED, "tools": [{"name": "f"}], "parallel_tool_calls": True},
        "preferred_output": [CALLED],
        "non_preferred_output": [RED],
    },
    {
        "conversations": TURNS,
        "chosen": {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        "rejected": {"from": "gpt", "value": "Red.", "agentpref": json.dumps(RED)},
        "tools": '[{"name": "f"}]',
    },
    {
        "instruction": "The sky?",
        "input": "At noon.",
        "history": [["Hi!", "Hello."]],
        "system": "Be brief.",
        "chosen": "Blue.",
        "rejected": "Red.",
    },
]
NAMES = sorted(RowReader().keys | {"role", "content", "tool_calls", "from", "value", "agentpref"})
WORDS = ["user", "assistant", "tool", "human", "gpt", "function_call", "observation", "", "{}", "["]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
)
json_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside a value."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    return [path for key in keys for path in [(*above, key), *places(value[key], (*above, key))]]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A valid row in which something was put in another's place, renamed or taken out."""
    row = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(places(row) or [("tag",)]))
        inside: Any = row
        for step in above:
            inside = inside[step]
        change = draw(st.sampled_from(["put", "put", "take", "name"]))
        if change == "put" or not isinstance(inside, dict):
            inside[key] = draw(json_values)
        else:
            value = inside.pop(key, None)
            if change == "name":
                inside[draw(st.sampled_from(NAMES))] = value
    return row


lines = st.lists(mutated() | json_values, min_size=1, max_size=6)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.create(tmp_path_factory.mktemp("fuzz") / "home")


def imported(home: Home, path: Path, **options: Any) -> Imported | str:
    """What an import counted, or its ExchangeError; any other error fails the test."""
    try:
        return import_file(home, path, **options)
    except ExchangeError as error:
        return str(error)


def import_in_every_way(home: Home, content: bytes, rows: Sequence[Any] | None = None) -> None:
    """With bad rows skipped, every row is counted, unless the file itself is broken.

    A page of an API counts as the rows that it has, so as no more than the values inside it.
    """
    path = home.path.parent / "rows"
    path.write_bytes(content)
    for options in ({}, {"redact": redact}, {"format": "llamafactory"}, {"format": "openai"}):
        ended = imported(home, path, **options)
        assert isinstance(ended, Imported) or ended.startswith(str(path))
    done = imported(home, path, skip_bad=True)
    if isinstance(done, Imported):
        counted, left_out = done.added + done.known + done.bad, sum(done.left_out.values())
        if rows is not None:
            assert len(rows) <= counted + left_out
            assert counted <= len(rows) + sum(len(places(row)) for row in rows)
    else:
        ends = ("holds no rows", "cannot be read as", "it is compressed", "UTF-16", "unpacked")
        assert any(end in done for end in ends)
        assert not rows


@settings(max_examples=150)
@given(st.binary(max_size=200), st.sampled_from([b"", b"[", b"{", b"\xef\xbb\xbf", b'[{"']))
def test_any_bytes(home: Home, content: bytes, start: bytes) -> None:
    import_in_every_way(home, start + content)


@settings(max_examples=150)
@given(lines)
def test_any_rows_on_lines(home: Home, rows: list[Any]) -> None:
    import_in_every_way(home, b"\n".join(map(orjson.dumps, rows)), listed(rows))


@settings(max_examples=100)
@given(lines)
def test_any_rows_in_a_list(home: Home, rows: list[Any]) -> None:
    import_in_every_way(home, orjson.dumps(rows), rows)


def listed(rows: list[Any]) -> list[Any] | None:
    """The rows; none can tell how many there are where the first line begins a list."""
    return None if isinstance(rows[0], list) else rows


def test_the_rows_are_valid_before_they_are_mutated(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, VALID)))
    done = import_file(home, path, namespace="valid")
    assert (done.added, done.bad) == (len(VALID), 0)


def test_the_home_passes_verify_after_all_imports(home: Home) -> None:
    with closing(connect(home)) as connection:
        assert examine(connection).problems == []
