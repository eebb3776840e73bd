"""Values that JSON cannot hold are changed as little as possible, and counted."""

from __future__ import annotations

import math
from abc import ABCMeta
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import InvalidMessage
from agentpref.record.database import connect
from agentpref.record.ingest import freeze_what_can_be_kept
from agentpref.record.ingest.salvage import MAX_DEPTH, Salvage
from agentpref.record.log import Log
from agentpref.record.store import Store

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


class Odd(Exception):
    """Of no kind that anybody expects."""


def raising(*_: Any, **__: Any) -> Any:
    raise Odd


SPECIAL = (
    *("__repr__", "__str__", "__iter__", "__len__", "__getitem__", "__contains__", "__eq__"),
    *(
        "__hash__",
        "__lt__",
        "__le__",
        "__int__",
        "__index__",
        "__float__",
        "__bool__",
        "__format__",
    ),
    *("keys", "items", "get", "encode", "isprintable", "strip", "__class__"),
)


def hostile(base: type, *arguments: Any, metaclass: type = type) -> Any:
    """An instance of a class, each of whose methods raises."""
    methods: dict[str, Any] = dict.fromkeys(SPECIAL, raising)
    methods["__class__"] = property(raising)
    if base is Mapping:
        methods |= {"__iter__": raising, "__len__": raising, "__getitem__": raising}
    return metaclass("Own", (base,), methods)(*arguments)  # type: ignore[misc]


def a_generator() -> Iterator[int]:
    yield 1


HOSTILE = st.sampled_from(
    [
        lambda: hostile(object),
        lambda: hostile(str, "a"),
        lambda: hostile(int, 7),
        lambda: hostile(float, 0.5),
        lambda: hostile(bytes, b"b"),
        lambda: hostile(list, [1]),
        lambda: hostile(tuple, (1,)),
        lambda: hostile(dict, {"a": 1}),
        lambda: hostile(UserDict, {"a": 1}),
        lambda: hostile(Mapping, metaclass=ABCMeta),
        lambda: hostile(datetime, 2026, 1, 1),
        a_generator,
        lambda: datetime(2026, 1, 1),
        lambda: timedelta(1),
        lambda: math.nan,
        lambda: -math.inf,
        lambda: b"\xff",
        lambda: 2**99,
        lambda: "\ud83d",
        lambda: {1, 2},
        lambda: Colour.RED,
        lambda: Odd,
    ]
)  # hypothesis calls the methods of values, so it draws makers of them

VALUES = st.recursive(
    HOSTILE | (st.text(max_size=3) | st.integers()).map(lambda value: lambda: value),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda made: lambda: [make() for make in made])
        | st.dictionaries(st.text(max_size=2), inner).map(
            lambda made: lambda: {key: make() for key, make in made.items()}
        )
    ),
    max_leaves=6,
)


@given(VALUES, VALUES)
@settings(max_examples=150, deadline=None)
def test_no_metadata_drops_a_run_and_record_raises_for_none(
    hostile_home: Log, metadata: Any, params: Any
) -> None:
    before = hostile_home.dropped
    hostile_home.record(ASKED, "4", metadata=metadata(), params=params())
    assert hostile_home.flush()
    assert hostile_home.dropped == before == {}


@given(VALUES, VALUES, VALUES, VALUES)
@settings(max_examples=100, deadline=None)
def test_record_raises_for_no_value_of_any_part(
    hostile_home: Log, messages: Any, output: Any, name: Any, model: Any
) -> None:
    asked, tools = messages(), messages()
    hostile_home.record(asked, output(), run_id=name(), model=model(), tags=name(), tools=tools)
    hostile_home.record([{"role": "user", "content": name()}], model(), thread_id=output())
    assert hostile_home.flush()


@pytest.fixture(scope="module")
def hostile_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    with Log(tmp_path_factory.mktemp("hostile") / "home") as log:
        yield log


def test_each_value_of_metadata_is_kept_by_what_it_extends_or_its_repr(tmp_path: Path) -> None:
    own = {"own": hostile(str, "a"), "n": hostile(int, 7), "f": hostile(float, 0.5)}
    with Log(tmp_path / "home") as log:
        log.record(ASKED, "4", metadata=own | {"x": hostile(object), "set": {1}, "at": 2**70})
        log.record(ASKED, "5", metadata=["no", "mapping"])  # type: ignore[arg-type]
        log.flush()
        assert log.dropped == {}
        assert log.altered == {"object": 2, "integer": 1}
        with closing(connect(log.home, readonly=True)) as connection:
            first, second = (run.metadata for run in Store(connection).runs("default"))
    assert first == {
        "own": "a", "n": 7, "f": 0.5, "set": "{1}", "at": str(2**70),
        "x": "<<class 'test_salvage.Own'> without a repr>",
    }  # fmt: skip
    assert second == {"value": ["no", "mapping"]}
