"""A request is checked before an engine sees it: types, ranges and sizes, with our errors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from agentpref.errors import ConfigError, InvalidMessage
from agentpref.serve.backend import MAX_CHARACTERS, MAX_STOPS, MAX_TOKENS, GenerationRequest

ASK = ({"role": "user", "content": "Hello!"},)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("stop", "ab", "stop is a str of 2 characters, but must be a list of at most"),
        ("stop", [1], "stop is a list of 1, but"),
        ("stop", [""], "stop is a list of 1, but"),
        ("stop", ["x"] * (MAX_STOPS + 1), "stop is a list of 33, but"),
        ("seed", "7", "seed is a str of 1 characters, but must be a whole number"),
        ("seed", 1.5, "seed is 1.5, but"),
        ("seed", True, "seed is True, but"),
        ("seed", 2**63, "seed is 9223372036854775808, but"),
        ("max_tokens", "9", "max_tokens is a str"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("max_tokens", 1.0, "max_tokens is 1.0"),
        ("max_tokens", MAX_TOKENS + 1, "must be a whole number from 1 to 131,072"),
        ("max_tokens", None, "max_tokens is None"),
        ("temperature", "hot", "temperature is a str"),
        ("temperature", None, "temperature is None"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_p", [1], "top_p is a list"),
        ("top_p", 0, "top_p is 0"),
        ("chat_template_kwargs", "x", "chat_template_kwargs is a str"),
        ("tool_choice", None, "tool_choice is None, but must be 'auto', 'none', 'any'"),
        ("tool_choice", "any", "tool_choice is 'any', but no tool is offered"),
        ("tool_choice", "search", "tool_choice is 'search', but must be"),
        ("response_format", "json", "response_format is a str of 4 characters, but must be"),
        ("response_format", {"type": "xml"}, "response_format is of the type 'xml', but must be"),
        ("response_format", {"type": "json_schema"}, "but must be {'type': 'json_object'} or"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 1}}, "but must be"),
    ],
)
def test_a_setting_of_the_wrong_type_or_size_is_named(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        GenerationRequest(ASK, **{name: value})


@pytest.mark.parametrize("tools", ["tools", ["tool"], {"type": "function"}])
def test_tools_of_the_wrong_shape_are_named(tools: Any) -> None:
    with pytest.raises(InvalidMessage, match="tool"):
        GenerationRequest(ASK, tools)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_tokenised() -> None:
    half = "x" * (MAX_CHARACTERS // 2)
    parts = {"role": "user", "content": [{"type": "text", "text": half}]}
    GenerationRequest((parts,))
    with pytest.raises(ConfigError, match=r"have 8,000,\d+ characters, but must have at most 8,0"):
        GenerationRequest((parts, parts))


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    GenerationRequest(
        ASK, max_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.int32(1), stop=["a"]
    )


def test_no_tool_is_offered_where_none_may_be_called() -> None:
    tool = {"type": "function", "function": {"name": "search"}}
    assert GenerationRequest(ASK, (tool,), tool_choice="none").tools == ()
    assert GenerationRequest(ASK, (tool,), tool_choice="search").tools == (tool,)
