"""Answers that a vLLM server holds to a grammar: what it is sent, and what it never sees.

The server here is a stand-in; the field is that of vLLM 0.32 (`structured_outputs.grammar`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from llguidance import LLMatcher
from vllm_stand_in import StandIn

from agentpref.errors import ConfigError
from agentpref.models.base import find_base
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.types import BASE
from agentpref_adapters.vllm import VllmBackend

ASK = ({"role": "user", "content": "When is high tide?"},)
TOOL = {
    "type": "function",
    "function": {
        "name": "tides",
        "parameters": {"type": "object", "properties": {"day": {"type": "string"}}},
    },
}


@pytest.fixture
def server() -> Iterator[StandIn]:
    server = StandIn(str(find_base("tiny")))
    yield server
    server.stop()


def test_the_server_gets_the_grammar_that_this_process_would_follow(server: StandIn) -> None:
    request = GenerationRequest(ASK, (TOOL,), tool_choice="tides")
    with closing(VllmBackend(server.url, model="tiny")) as backend:
        backend.generate(BASE, request)
        *_, reply = backend.stream(BASE, request)
        backend.generate(BASE, GenerationRequest(ASK, (TOOL,)))
    assert isinstance(reply, Reply)
    assert reply.prompt_tokens
    held, streamed, free = server.of("/v1/completions")[-3:]
    assert held["structured_outputs"] == streamed["structured_outputs"]
    grammar = held["structured_outputs"]["grammar"]
    assert "tides" in grammar
    assert "::=" not in grammar  # vLLM would take it for EBNF
    assert LLMatcher.validate_grammar_with_warnings(grammar) == (False, [])
    assert "structured_outputs" not in free


def test_a_schema_that_nothing_fulfils_is_refused_before_the_server_sees_it(
    server: StandIn,
) -> None:
    schema = {"type": "integer", "minimum": 3, "maximum": 1}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with closing(VllmBackend(server.url, model="tiny")) as backend:
        asked = len(server.of("/v1/completions"))
        with pytest.raises(ConfigError, match="minimum"):
            backend.generate(BASE, GenerationRequest(ASK, response_format=wanted))
        assert len(server.of("/v1/completions")) == asked
