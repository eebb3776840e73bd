"""Answers that a real vLLM holds to a grammar: calls that are asked for, and JSON by a schema."""

from __future__ import annotations

import json

import pytest

from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.types import BASE
from agentpref_adapters.vllm import VllmBackend

ASK = ({"role": "user", "content": "Remind me to water the plants."},)
DAYS = ["Monday", "Tuesday"]
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"day": {"enum": DAYS}},
                "required": ["day"],
            },
        },
    }
    for name in ("remind", "cancel")
)


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"remind", "cancel"}), ("cancel", {"cancel"})]
)
def test_a_call_that_is_asked_for_is_written_whole_and_streamed(
    backend: VllmBackend, choice: str, names: set[str]
) -> None:
    request = GenerationRequest(ASK, TOOLS, tool_choice=choice, max_tokens=200, seed=1)
    *_, streamed = backend.stream(BASE, request)
    for reply in (backend.generate(BASE, request), streamed):
        assert isinstance(reply, Reply)
        calls = [call["function"] for call in reply.message["tool_calls"]]
        assert calls
        assert {call["name"] for call in calls} <= names
        assert {json.loads(call["arguments"])["day"] for call in calls} <= {*DAYS}


def test_an_answer_by_a_schema_is_what_the_schema_says(backend: VllmBackend) -> None:
    schema = {
        "type": "object",
        "properties": {"day": {"enum": DAYS}, "sure": {"type": "boolean"}},
        "required": ["day", "sure"],
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    request = GenerationRequest(ASK, response_format=wanted, max_tokens=200)
    answer = json.loads(backend.generate(BASE, request).message["content"])
    assert answer.keys() == {"day", "sure"}
    assert answer["day"] in DAYS
    assert isinstance(answer["sure"], bool)
