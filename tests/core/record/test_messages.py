"""A prompt's id depends on all of its content and on nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import InvalidMessage
from agentpref.record.messages import (
    Linker,
    Node,
    canonical,
    new_id,
    node_id,
    prompt_of,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT},
    optional={"name": TEXT, "tool_calls": st.lists(JSON, max_size=2)},
)
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=6)
TOOLS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=2)


def unchain(nodes: list[Node]) -> tuple[list[Any], list[Any]]:
    bodies = [orjson.loads(node.body) for node in nodes]
    tools = bodies.pop(0)["tools"] if "tools" in bodies[0] else []
    return bodies, tools


@given(MESSAGES, TOOLS)
def test_a_chain_holds_its_messages_and_tools(messages: list[Any], tools: list[Any]) -> None:
    nodes = Linker().chain(messages, tools)
    assert orjson.dumps(unchain(nodes)) == orjson.dumps((messages, tools)), "in the order of keys"
    assert nodes[-1].id == prompt_of(messages, tools).id
    assert [node.parent for node in nodes] == [None, *(node.id for node in nodes[:-1])]
    assert all(node_id(node.parent, orjson.loads(node.body)) == node.id for node in nodes)


@given(MESSAGES, MESSAGES, TOOLS, TOOLS)
def test_only_equal_prompts_share_an_id(
    one: list[Any], other: list[Any], tools: list[Any], other_tools: list[Any]
) -> None:
    same = canonical({"m": one, "t": tools}) == canonical({"m": other, "t": other_tools})
    assert (prompt_of(one, tools).id == prompt_of(other, other_tools).id) is same


@given(MESSAGES, MESSAGE)
def test_a_longer_conversation_keeps_its_nodes(messages: list[Any], reply: Any) -> None:
    before = Linker().chain(messages)
    after = Linker().chain([*messages, reply])
    assert after[:-1] == before
    assert after[-1] == Linker().child(before[-1].id, reply)


@given(JSON)
def test_the_canonical_form_is_stable(value: Any) -> None:
    text = canonical({"value": value})
    assert canonical(orjson.loads(text)) == text


def test_known_prompts_keep_their_ids() -> None:
    ask = {"role": "user", "content": "hello"}
    assert canonical(ask) == b'{"content":"hello","role":"user"}'
    assert prompt_of([ask]).id == "c9a0f457786f263ee5ac976323e4ab09"
    assert prompt_of([ask], [{"name": "add"}]).id == "d8e2861312268d24f2e780e092a451e2"


def test_the_order_of_keys_and_the_kind_of_mapping_do_not_matter() -> None:
    one: Mapping[str, Any] = {"role": "user", "content": "x", "meta": {"a": 1, "b": 2}}
    other = MappingProxyType({**one, "meta": MappingProxyType({"b": 2, "a": 1})})
    assert prompt_of([one]).id == prompt_of([other]).id


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
def test_every_role_is_accepted(role: str) -> None:
    prompt_of([{"role": role, "content": "x"}])
    prompt_of([{"role": role, "content": [{"type": "text", "text": "x"}]}])


def test_only_an_assistant_may_have_no_content() -> None:
    prompt_of([{"role": "assistant", "tool_calls": [{"id": "1"}]}])
    with pytest.raises(InvalidMessage, match="message 0 has content of type NoneType"):
        prompt_of([{"role": "user"}])


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(InvalidMessage, match="message 0 is not JSON"):
        prompt_of([{"role": "user", "content": "x", "n": 2**64}])
    with pytest.raises(InvalidMessage, match="the list of tools is not JSON"):
        prompt_of([{"role": "user", "content": "x"}], [{"f": len}])


# Ids


def test_an_id_is_a_uuid_of_its_moment() -> None:
    before = time.time_ns() // 1_000_000
    made = UUID(new_id())
    after = time.time_ns() // 1_000_000
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert before <= made.int >> 80 <= after


def test_ids_sort_within_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [1_700_000_000_000_000_000 + n * 1_000 for n in (0, 1, 500, 998, 999, 1_000, 2_000)]
    ticking = iter(moments)
    monkeypatch.setattr(time, "time_ns", lambda: next(ticking))
    ids = [new_id() for _ in moments]
    assert sorted(ids) == ids


def test_ids_made_at_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    assert len({new_id() for _ in range(1_000)}) == 1_000
