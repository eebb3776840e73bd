"""A JSON list, part by part: whatever the chunks are, the items are those that a parser sees."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.prefer.jsonlist import items

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\,[]{}é \n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"]'), inner, max_size=3),
    max_leaves=8,
)


def chunks(text: bytes, size: int) -> Iterator[bytes]:
    return (text[at : at + size] for at in range(0, len(text), size))


def parts(text: bytes, size: int = 4, limit: int = 1000) -> list[bytes]:
    return [part if isinstance(part, bytes) else str(part).encode() for part in
            items(chunks(text, size), limit)]  # fmt: skip


@given(st.lists(values), st.integers(1, 30), st.sampled_from([None, 2]))
def test_the_items_are_those_that_a_parser_sees(
    told: list[object], size: int, indent: int | None
) -> None:
    text = " \n" + json.dumps(told, indent=indent, ensure_ascii=False) + "\n"
    assert [json.loads(item) for item in items(chunks(text.encode(), size), 10_000)] == told


@given(st.binary(), st.integers(1, 30))
def test_any_bytes_come_to_an_end(text: bytes, size: int) -> None:
    for item in items(chunks(b"[" + text, size), 1000):
        assert isinstance(item, bytes | ExchangeError)


def test_a_bad_item_leaves_those_after_it_as_they_are() -> None:
    assert parts(b'[{"a": }, nonsense, {"a": 1}]') == [b'{"a": }', b" nonsense", b' {"a": 1}']


def test_blank_items_are_passed_over() -> None:
    assert parts(b"[]") == parts(b"[ \n ]") == []
    assert parts(b"[1, ,2,]") == [b"1", b"2"]


def test_a_gigantic_item_is_cut_off_and_those_after_it_are_found() -> None:
    long, after = parts(b'["' + b"x" * 900 + b'", 7]', size=10, limit=50)
    assert 50 < len(long) <= 70
    assert after == b" 7"


@pytest.mark.parametrize("text", [b"[1", b'[1, "]', b"[1, [2]"])
def test_a_list_that_does_not_end_says_so(text: bytes) -> None:
    assert parts(text)[0] == b"1"
    assert parts(text)[-1].startswith(b"the list does not end")


@pytest.mark.parametrize("after", [b"x", b"[2]", b"{}", b" \n ]"])
def test_what_follows_a_list_is_not_read(after: bytes) -> None:
    assert [part[:12] for part in parts(b"[1]  " + after)] == [b"1", b"text follows"]
