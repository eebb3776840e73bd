"""Values that JSON cannot hold are changed as little as possible, and counted."""

from __future__ import annotations

from collections import UserDict
from enum import Enum, IntEnum
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import InvalidMessage
from agentpref.record.ingest import freeze_what_can_be_kept
from agentpref.record.ingest.salvage import MAX_DEPTH, Salvage

ASKED = [{"role": "user", "content": "2 + 2?"}]


def salvaged(value: Any) -> tuple[Any, dict[str, int]]:
    salvage = Salvage()
    plain = salvage.plain(value)
    return orjson.loads(orjson.dumps(plain)), dict(salvage.changes)


class Level(IntEnum):
    LOW = 1


class Colour(Enum):
    RED = "red"


class Hostile(UserDict):  # type: ignore[type-arg]
    def keys(self) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "kept", "changes"),
    [
        ("a\ud83d\ude00b", "a😀b", {}),
        ("\ud83d", "\ufffd", {"surrogate": 1}),
        ("\ude00 \ufffd \ud83d\ud83d\ude00", "\ufffd \ufffd \ufffd😀", {"surrogate": 2}),
        ({1: "a", "1": "b", None: "c"}, {"1": "a", "1_": "b", "null": "c"}, {"key": 2}),
        ({("a", 1): "x"}, {"('a', 1)": "x"}, {"key": 1}),
        ({"\ud83d": 1}, {"\ufffd": 1}, {"surrogate": 1}),
        ((1, (2,)), [1, [2]], {}),
        (2**64, str(2**64), {"integer": 1}),
        ([2**64 - 1, -(2**63)], [2**64 - 1, -(2**63)], {}),
        (b"ab", "YWI=", {"object": 1}),
        ({"x": len}, {"x": "<built-in function len>"}, {"object": 1}),
        (UUID(int=7), str(UUID(int=7)), {}),
        ([Level.LOW, Colour.RED, None, True, 1.5], [1, "red", None, True, 1.5], {}),
        (UserDict({"a": (1,)}), {"a": [1]}, {}),
    ],
)
def test_a_value_becomes_json_and_its_changes_are_counted(
    value: Any, kept: Any, changes: dict[str, int]
) -> None:
    assert salvaged(value) == (kept, changes)


def test_an_integer_of_more_digits_than_python_writes_is_kept_in_hexadecimal() -> None:
    number = 10**5_000
    kept, changes = salvaged(number)
    assert (int(kept, 16), changes) == (number, {"integer": 1})
    assert salvaged({number: 1})[0] == {hex(number): 1}
    assert len(salvaged({(number,): 1})[0]) == 1


def test_what_contains_itself_is_cut() -> None:
    value: dict[str, Any] = {"list": []}
    value["list"].append(value)
    assert salvaged([value, value["list"]]) == (
        [{"list": ["[circular]"]}, [{"list": "[circular]"}]],
        {"circular": 2},
    )


def test_what_comes_twice_is_kept_twice() -> None:
    shared = {"a": 2**70}
    assert salvaged([shared, shared])[0] == [{"a": str(2**70)}] * 2


def test_what_is_nested_too_deep_is_kept_as_text() -> None:
    value: Any = "inside"
    for _ in range(5_000):
        value = [value]
    kept, changes = salvaged(value)
    for _ in range(MAX_DEPTH):
        (kept,) = kept
    assert kept.startswith("[[[")
    assert changes == {"deep": 1}


def test_an_object_that_raises_is_kept_by_its_type() -> None:
    kept, changes = salvaged({"x": Hostile()})
    assert kept["x"].startswith("<Hostile instance at")
    assert changes == {"object": 1}


wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    | st.binary() | st.builds(object) | st.builds(Hostile) | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.tuples(inner)
    | st.dictionaries(st.text(st.characters()) | st.integers() | st.tuples(st.text()), inner),
    max_leaves=8,
)  # fmt: skip


@given(wild)
def test_any_value_becomes_json_and_json_stays_as_it_is(value: Any) -> None:
    kept, _ = salvaged(value)
    assert salvaged(kept) == (kept, {})


@pytest.mark.parametrize("content", [b"2 + 2?", object(), None])
def test_a_message_of_the_wrong_shape_is_refused_and_not_made_a_text(content: Any) -> None:
    with pytest.raises(InvalidMessage, match="message 0 has content of type"):
        freeze_what_can_be_kept([{"role": "user", "content": content}], "4", ())
    with pytest.raises(InvalidMessage, match="the output is a"):
        freeze_what_can_be_kept(ASKED, content, ())
    with pytest.raises(InvalidMessage, match="tools is a"):
        freeze_what_can_be_kept(ASKED, "4", object())
