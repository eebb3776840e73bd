"""Answers that are held to a grammar inside the process."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served, ask, blocked

from agentpref.errors import ConfigError, GenerationFailed, MissingDependency
from agentpref.models.tool_calls import assistant_message
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.types import BASE
from agentpref_adapters.transformers import TransformersBackend

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": ["x", "y"]}},
            "required": ["a", "b"],
        },
    },
}
YES = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": YES}}


def called(prompt: str = "hello", **settings: Any) -> GenerationRequest:
    return ask(prompt, tools=(ADD,), max_tokens=100, **{"tool_choice": "add", **settings})


def as_json(prompt: str = "hello", **settings: Any) -> GenerationRequest:
    return ask(prompt, max_tokens=60, response_format=BY_SCHEMA, **settings)


def arguments(reply: Reply) -> dict[str, Any]:
    (call,) = reply.message["tool_calls"]
    assert call["function"]["name"] == "add"
    return json.loads(call["function"]["arguments"])


def test_a_random_model_calls_the_tool_that_it_must(backend: TransformersBackend) -> None:
    for settings in ({}, {"temperature": 1.5, "seed": 7}, {"temperature": 2.0, "seed": 8}):
        reply = backend.generate(BASE, called(**settings))
        assert reply.finish_reason == "stop"
        assert arguments(reply)["a"] in (1, 2, 3)
        assert arguments(reply)["b"] in ("x", "y")


def test_a_random_model_answers_with_json_of_a_schema(backend: TransformersBackend) -> None:
    reply = backend.generate(BASE, as_json(temperature=1.0, seed=3))
    assert reply.finish_reason == "stop"
    assert isinstance(json.loads(reply.message["content"])["yes"], bool)
    assert reply.token_ids[-1] in backend._decoding.end_tokens


def test_logprobs_are_the_models_own_under_a_grammar(backend: TransformersBackend) -> None:
    import torch

    reply = backend.generate(BASE, as_json())
    prompt, _ = backend._encode(as_json())
    with torch.inference_mode():
        logits = backend.base.model(torch.tensor([[*prompt, *reply.token_ids]])).logits[0]
    own = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    expected = own.gather(-1, torch.tensor(reply.token_ids)[:, None])[:, 0].tolist()
    assert reply.logprobs == pytest.approx(expected, abs=1e-3)
    assert min(reply.logprobs) < -5  # the grammar forced what the model would not have written


def test_requests_with_and_without_a_grammar_share_their_steps(
    served: Served, backend: TransformersBackend
) -> None:
    requests = [ask("hello"), called(), ask("tide"), as_json(), called(temperature=1.0, seed=2)]
    alone = [backend.generate(BASE, request) for request in requests]
    together: dict[int, Reply] = {}

    def generate(n: int) -> None:
        together[n] = backend.generate(BASE, requests[n])

    threads = [threading.Thread(target=generate, args=(n,)) for n in range(len(requests))]
    with blocked(backend) as wait_for:
        for thread in threads:
            thread.start()
        wait_for(len(requests))
    for thread in threads:
        thread.join()
    for n, reply in enumerate(alone):
        assert together[n].token_ids == reply.token_ids
    assert alone[0].token_ids == served.expected[BASE, "hello"]


def test_a_stream_under_a_grammar_has_the_text_of_the_whole_answer(
    backend: TransformersBackend,
) -> None:
    *pieces, reply = backend.stream(BASE, called())
    assert isinstance(reply, Reply)
    assert len(pieces) > 1
    assert assistant_message("".join(map(str, pieces)), turn=1) == reply.message
    assert reply.message == backend.generate(BASE, called()).message


def test_an_answer_that_is_cut_off_says_so_and_makes_no_call(backend: TransformersBackend) -> None:
    reply = backend.generate(BASE, ask("hello", tools=(ADD,), tool_choice="any", max_tokens=4))
    assert reply.finish_reason == "length"
    assert "tool_calls" not in reply.message


def test_no_tool_is_shown_or_called_where_none_may_be(backend: TransformersBackend) -> None:
    free = backend.generate(BASE, ask("hello"))
    none = backend.generate(BASE, ask("hello", tools=(ADD,), tool_choice="none"))
    assert none.token_ids == free.token_ids


def test_what_no_answer_fulfils_is_refused_before_the_engine_sees_it(
    backend: TransformersBackend,
) -> None:
    impossible = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    request = ask(
        "hello",
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": impossible}},
    )
    with blocked(backend), pytest.raises(ConfigError, match="cannot be enforced"):
        backend.generate(BASE, request)
    backend.generate(BASE, ask("hello"))


def test_a_model_that_knows_no_tools_is_named(served: Served, tmp_path: Any) -> None:
    from agentpref.models.base import load_base

    base = load_base(served.base)
    template = base.tokenizer.chat_template
    base.tokenizer.chat_template = template.replace(
        "for call in message.tool_calls or []", "for call in []"
    )
    backend = TransformersBackend(base)
    try:
        with pytest.raises(GenerationFailed, match=r"cannot be held to this answer.*tool calls"):
            backend.generate(BASE, called())
        assert backend.generate(BASE, as_json()).finish_reason == "stop"
    finally:
        backend.close()


def test_the_package_that_is_missing_is_named_and_only_when_it_is_needed(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert backend.generate(BASE, ask("hello")).token_ids
    with pytest.raises(MissingDependency, match=r"agentpref\[train\]"):
        backend.generate(BASE, called())
    monkeypatch.undo()
    assert arguments(backend.generate(BASE, called()))


@pytest.fixture
def tiny() -> Iterator[TransformersBackend]:
    backend = TransformersBackend("tiny")
    yield backend
    backend.close()


def test_the_bundled_model_fills_in_what_it_reads(tiny: TransformersBackend) -> None:
    timer = {
        "type": "object",
        "properties": {"minutes": {"type": "string"}},
        "required": ["minutes"],
    }
    tool = {"type": "function", "function": {"name": "set_timer", "parameters": timer}}
    asked = {"role": "user", "content": "Set a timer of 25 minutes for the tea."}
    reply = tiny.generate(BASE, GenerationRequest((asked,), (tool,), tool_choice="any"))
    (call,) = reply.message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"minutes": "25"}


def test_a_chat_records_what_was_asked_of_an_answer(served: Served, tmp_path: Any) -> None:
    from contextlib import closing

    import agentpref
    from agentpref.home import Home
    from agentpref_adapters.transformers import open_router

    home = Home.create(tmp_path / "home")
    with open_router(home, served.base) as router, closing(agentpref.Log(home.path)) as log:
        chat = agentpref.Chat(log, router)
        hello = [{"role": "user", "content": "hello"}]
        chat.reply(hello, tools=[ADD], tool_choice="any", max_tokens=100)
        chat.reply(hello, response_format=BY_SCHEMA)
        chat.reply(hello)
        log.flush(timeout=10)
        called, by_schema, free = (run.params for run in home.runs())
    assert called["tool_choice"] == "any"
    assert by_schema["response_format"] == BY_SCHEMA
    assert not {"tool_choice", "response_format"} & free.keys()
