from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration
from langchain_core.tools import tool
from pydantic import BaseModel

from agentpref.errors import ConfigError, GenerationFailed
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.best import BestOf
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref.types import Run
from agentpref_adapters.langchain import AgentprefCallback, AgentprefChatModel

BASE_IDENTITY = {"name": "fake", "digest": "0" * 64, "template_digest": "1" * 64}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def shout(text: str) -> str:
    """Say it louder."""
    return text.upper()


class Sum(BaseModel):
    """A sum."""

    a: int
    b: int


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.fixture
def publish(home: Home, tmp_path: Path) -> Callable[[int], str]:
    def publish(seed: int) -> str:
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        revision = Registry(home).publish(folder, parent=None, model=BASE_IDENTITY, training={})
        return revision.revision_id

    return publish


def serve(home: Home, backend: FakeBackend, **settings: Any) -> AgentprefChatModel:
    return AgentprefChatModel(router=Router(Registry(home), backend), **settings)


class Heard:
    """Answers one text after another, and keeps the requests it was asked with."""

    def __init__(self, *texts: str) -> None:
        self.requests: list[GenerationRequest] = []
        self._texts = iter(texts)
        self._last = texts[-1]

    def __call__(self, revision_id: str, request: GenerationRequest) -> str:
        # The fake asks twice when it streams, and once more for its reply.
        if not self.requests or self.requests[-1] is not request:
            self.requests.append(request)
            self._last = next(self._texts)
        return self._last


def test_an_answer_names_its_revision_and_its_tokens(
    home: Home, publish: Callable[[int], str]
) -> None:
    model = serve(home, FakeBackend(lambda revision, request: "blue"), model="tiny")
    assert model.invoke("sky?").response_metadata["revision"] == "base"
    live = publish(1)
    model.router.activate(live)
    answer = model.invoke("sky?")
    assert answer.text == "blue"
    assert answer.response_metadata == {
        "model_name": "tiny",
        "revision": live,
        "finish_reason": "stop",
        "token_ids": [ord(letter) for letter in "blue"],
        "logprobs": [-1.0] * 4,
    }


def test_the_best_of_several_answers_is_asked_for_and_its_score_is_told(home: Home) -> None:
    def rank(request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        return [float(len(str(reply.message["content"]))) for reply in replies]

    backend = FakeBackend(lambda revision, request: "x" * (1 + (request.seed or 0)))
    model = serve(home, backend, temperature=0.8, seed=0, best_of=3)
    model.router.backend = BestOf(backend, rank)
    answer = model.invoke("sky?")
    assert (answer.text, answer.response_metadata["score"]) == ("xxx", 3.0)
    assert model.invoke("sky?", best_of=1).text == "x"
    assert "".join(piece.text for piece in model.stream("sky?")) == "xxx"


def test_settings_reach_the_engine_and_a_call_can_override_them(home: Home) -> None:
    heard = Heard("one", "two")
    model = serve(home, FakeBackend(heard), max_tokens=9, temperature=0.3, top_p=0.5, seed=4)
    model.invoke("sky?")
    model.invoke("sky?", stop=["\n"], temperature=0.0, seed=5)
    first, second = heard.requests
    assert first == GenerationRequest(
        messages=({"role": "user", "content": "sky?"},),
        max_tokens=9,
        temperature=0.3,
        top_p=0.5,
        seed=4,
    )
    assert (second.temperature, second.seed, second.stop, second.max_tokens) == (0, 5, ("\n",), 9)


def test_a_setting_that_does_not_exist_is_refused_by_name(home: Home) -> None:
    model = serve(home, FakeBackend())
    with pytest.raises(ConfigError, match=r"'temprature'.*temperature"):
        model.invoke("sky?", temprature=0.5)


def test_an_error_of_the_engine_reaches_the_caller(home: Home) -> None:
    model = serve(home, FakeBackend(fail_generate={"base"}))
    with pytest.raises(GenerationFailed):
        model.invoke("sky?")


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


def test_a_streamed_answer_comes_in_pieces_and_is_the_same_as_a_whole_one(home: Home) -> None:
    model = serve(home, FakeBackend(lambda revision, request: "It is blue."))
    chunks = list(model.stream("sky?"))
    assert [chunk.text for chunk in chunks] == ["It", " is", " blue.", ""]
    whole = model.invoke("sky?")
    assert joined(chunks).text == whole.text
    assert joined(chunks).response_metadata == whole.response_metadata


def test_the_async_forms_give_the_same_answers_without_blocking_the_loop(home: Home) -> None:
    gate = threading.Event()
    model = serve(home, FakeBackend(lambda revision, request: "It is blue.", gate=gate))

    async def ask() -> tuple[AIMessage, list[AIMessageChunk]]:
        waiting = asyncio.create_task(model.ainvoke("sky?"))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.01, gate.set)
        return await waiting, [chunk async for chunk in model.astream("sky?")]

    whole, chunks = asyncio.run(ask())
    assert whole.text == joined(chunks).text == "It is blue."
    assert whole.response_metadata == joined(chunks).response_metadata


def test_a_stream_closed_early_gives_its_lease_back(
    home: Home, publish: Callable[[int], str]
) -> None:
    backend = FakeBackend()
    model = serve(home, backend)
    first, second, third = publish(1), publish(2), publish(3)
    model.router.activate(first)
    stream = model.stream("a b c")
    next(stream)
    model.router.activate(second)
    model.router.activate(third)
    assert first in backend.list_loaded()
    stream.close()
    assert first not in backend.list_loaded()


def test_an_async_stream_closed_early_gives_its_lease_back(
    home: Home, publish: Callable[[int], str]
) -> None:
    backend = FakeBackend()
    model = serve(home, backend)
    first, second, third = publish(1), publish(2), publish(3)
    model.router.activate(first)

    async def leave() -> None:
        stream = model.astream("a b c")
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    model.router.activate(second)
    model.router.activate(third)
    assert first not in backend.list_loaded()


class Endless(FakeBackend):
    """Writes until it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.left = threading.Event(), threading.Event()

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        try:
            while True:
                self.begun.set()
                yield "on "
        finally:
            self.left.set()


async def through_tools(model: AgentprefChatModel) -> None:
    """Where tools are offered no piece is handed on, so that the consumer never gets a turn."""
    async for _ in model.bind_tools([add]).astream("hello"):
        pass


async def through_chunks(model: AgentprefChatModel) -> None:
    async for _ in model.astream("hello"):
        pass


async def through_ainvoke(model: AgentprefChatModel) -> None:
    await model.ainvoke("hello")


@pytest.mark.parametrize("ask", [through_chunks, through_tools, through_ainvoke])
def test_a_cancelled_task_stops_its_request(home: Home, ask: Callable[..., Any]) -> None:
    backend = Endless()
    model = serve(home, backend)

    async def cancel() -> None:
        task = asyncio.create_task(ask(model))
        await asyncio.to_thread(backend.begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
        assert await asyncio.to_thread(backend.left.wait, 20)
        del cancelled  # until now its traceback kept alive whatever it had come through

    asyncio.run(cancel())


# Tools.


def test_a_tool_call_is_parsed_and_the_tools_are_described_to_the_engine(home: Home) -> None:
    heard = Heard("Let me see. " + CALL)
    answer = serve(home, FakeBackend(heard)).bind_tools([add, Sum]).invoke("1 + 2?")
    assert answer.text == "Let me see."
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 1, "b": 2})
    assert [tool["function"]["name"] for tool in heard.requests[0].tools] == ["add", "Sum"]


class Careless(FakeBackend):
    """Passes on as tool calls whatever the model wrote, as some engines do."""

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        reply = super().generate(revision_id, request)
        call = {"id": "c1", "type": "function"}
        written = ['{"a": 1}', "no JSON", "[1]"]
        calls = [{**call, "function": {"name": "add", "arguments": text}} for text in written]
        return replace(reply, message={"role": "assistant", "content": None, "tool_calls": calls})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_whose_arguments_are_not_a_json_object_is_invalid(
    home: Home, streaming: bool
) -> None:
    model = serve(home, Careless(lambda revision, request: "")).bind_tools([add])
    answer = joined(list(model.stream("1 + 2?"))) if streaming else model.invoke("1 + 2?")
    assert answer.text == ""
    assert [call["args"] for call in answer.tool_calls] == [{"a": 1}]
    assert [call["args"] for call in answer.invalid_tool_calls] == ["no JSON", "[1]"]


def test_a_stream_with_tools_comes_in_pieces_and_each_call_in_one(home: Home) -> None:
    text = f"Let me see. {CALL}{CALL.replace('1', '5')}"
    model = serve(home, FakeBackend(lambda revision, request: text)).bind_tools([add])
    chunks = list(model.stream("1 + 2?"))
    assert [chunk.text for chunk in chunks if chunk.text] == ["Let", " me", " see."]
    calls = [chunk.tool_call_chunks for chunk in chunks if chunk.tool_call_chunks]
    assert [(call["name"], call["args"], call["index"]) for (call,) in calls] == [
        ("add", '{"a": 1, "b": 2}', 0),
        ("add", '{"a": 5, "b": 2}', 1),
    ]
    whole, once = joined(chunks), model.invoke("1 + 2?")
    assert (whole.content, whole.tool_calls) == (once.content, once.tool_calls)


def test_text_that_only_looks_like_a_call_is_streamed_as_text(home: Home) -> None:
    text = 'A call is <tool_call>{"name": 1}</tool_call> or <tool_call>{"na'
    model = serve(home, FakeBackend(lambda revision, request: text)).bind_tools([add])
    whole = joined(list(model.stream("how?")))
    assert (whole.text, whole.tool_calls) == (text, [])


def test_a_tool_result_is_sent_with_the_id_of_its_call(home: Home) -> None:
    heard = Heard(CALL, "3")
    model = serve(home, FakeBackend(heard)).bind_tools([add])
    asked = HumanMessage("1 + 2?")
    called = model.invoke([asked])
    call_id = called.tool_calls[0]["id"]
    assert call_id
    model.invoke([asked, called, ToolMessage("3", tool_call_id=call_id)])
    _, request_call, result = heard.requests[1].messages
    assert request_call["tool_calls"][0]["id"] == result["tool_call_id"] == call_id


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        (None, "auto"),
        (False, "auto"),
        ("auto", "auto"),
        ("any", "any"),
        ("required", "required"),
        (True, "any"),
        ("none", "none"),
        ("shout", "shout"),
        ({"type": "function", "function": {"name": "shout"}}, "shout"),
        ({"type": "tool", "name": "shout"}, "shout"),
        ({"type": "any"}, "any"),
    ],
)
def test_a_tool_choice_reaches_the_engine_in_any_providers_form(
    home: Home, choice: Any, asked: str
) -> None:
    heard = Heard("hello")
    serve(home, FakeBackend(heard)).bind_tools([add, shout], tool_choice=choice).invoke("hello")
    (request,) = heard.requests
    offered = [] if asked == "none" else ["add", "shout"]
    assert request.tool_choice == asked
    assert [tool["function"]["name"] for tool in request.tools] == offered


def test_a_tool_choice_that_names_an_unknown_tool_is_refused(home: Home) -> None:
    with pytest.raises(ConfigError, match=r"'ad'.*add, shout"):
        serve(home, FakeBackend()).bind_tools([add, shout], tool_choice="ad")


def test_structured_output_is_read_from_a_tool_call(home: Home) -> None:
    heard = Heard(CALL.replace('"add"', '"Sum"'))
    model = serve(home, FakeBackend(heard))
    assert model.with_structured_output(Sum).invoke("1 + 2?") == Sum(a=1, b=2)
    assert heard.requests[0].tool_choice == "any"


def test_structured_output_is_read_from_the_text_where_a_schema_is_enforced_on_it(
    home: Home,
) -> None:
    heard = Heard('{"a": 1, "b": 2}', '{"a": 1, "b": 2}', '{"a": 1, "b')
    model = serve(home, FakeBackend(heard))
    assert model.with_structured_output(Sum, method="json_schema").invoke("?") == Sum(a=1, b=2)
    any_json = model.with_structured_output(Sum.model_json_schema(), method="json_mode")
    assert any_json.invoke("?") == {"a": 1, "b": 2}
    raw = model.with_structured_output(Sum, method="json_schema", include_raw=True).invoke("?")
    assert raw["parsed"] is None
    assert raw["parsing_error"] is not None
    by_schema, by_mode, _ = (request.response_format for request in heard.requests)
    assert by_schema is not None
    assert by_schema["json_schema"]["schema"]["required"] == ["a", "b"]
    assert by_mode == {"type": "json_object"}


def test_a_way_of_structured_output_that_does_not_exist_is_refused(home: Home) -> None:
    with pytest.raises(ConfigError, match=r"'grammar'.*'json_schema'"):
        serve(home, FakeBackend()).with_structured_output(Sum, method="grammar")


def test_an_answer_says_how_many_tokens_it_took_where_the_engine_says_so(home: Home) -> None:
    class Counting(FakeBackend):
        def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
            return replace(super().generate(revision_id, request), prompt_tokens=7)

    model = serve(home, Counting(lambda revision, request: "blue"))
    counted = {"input_tokens": 7, "output_tokens": 4, "total_tokens": 11}
    assert model.invoke("sky?").usage_metadata == counted
    assert joined(list(model.stream("sky?"))).usage_metadata == counted
    assert serve(home, FakeBackend()).invoke("sky?").usage_metadata is None


def test_stop_strings_of_the_model_end_answers_unless_a_call_names_others(home: Home) -> None:
    heard = Heard("one", "two")
    model = serve(home, FakeBackend(heard), stop=["END"])
    model.invoke("sky?")
    model.invoke("sky?", stop=["\n"])
    assert [request.stop for request in heard.requests] == [("END",), ("\n",)]


# Threads and canaries.


def through_invoke(model: AgentprefChatModel, config: Any) -> AIMessage:
    return model.invoke("hello", config)


def through_ainvoke(model: AgentprefChatModel, config: Any) -> AIMessage:
    return asyncio.run(model.ainvoke("hello", config))


def through_stream(model: AgentprefChatModel, config: Any) -> AIMessage:
    return joined(list(model.stream("hello", config)))


def through_astream(model: AgentprefChatModel, config: Any) -> AIMessage:
    async def read() -> list[AIMessageChunk]:
        return [chunk async for chunk in model.astream("hello", config)]

    return joined(asyncio.run(read()))


def through_batch(model: AgentprefChatModel, config: Any) -> AIMessage:
    return model.batch(["hello"], config)[0]


def through_chain(model: AgentprefChatModel, config: Any) -> AIMessage:
    chain = (lambda text: [HumanMessage(text)]) | model
    return chain.invoke("hello", config)


def through_chain_batch(model: AgentprefChatModel, config: Any) -> AIMessage:
    chain = (lambda text: [HumanMessage(text)]) | model
    return chain.batch(["hello"], config)[0]


@pytest.mark.parametrize(
    "ask",
    [
        through_invoke,
        through_ainvoke,
        through_stream,
        through_astream,
        through_batch,
        through_chain,
        through_chain_batch,
    ],
)
def test_a_thread_stays_on_its_side_of_a_canary_in_every_form_of_call(
    home: Home,
    publish: Callable[[int], str],
    ask: Callable[[AgentprefChatModel, Any], AIMessage],
) -> None:
    model = serve(home, FakeBackend())
    live, canary = publish(1), publish(2)
    model.router.activate(live)
    model.router.canary(canary, 0.5)
    expected = {}
    for thread in map(str, range(8)):
        with model.router.acquire(thread) as lease:
            expected[thread] = lease.revision
    assert set(expected.values()) == {live, canary}
    for thread, revision in expected.items():
        for place in ("metadata", "configurable"):
            answer = ask(model, {place: {"thread_id": thread}})
            assert answer.response_metadata["revision"] == revision


def test_generate_reads_the_thread_from_the_metadata(
    home: Home, publish: Callable[[int], str]
) -> None:
    model = serve(home, FakeBackend())
    canary = publish(1)
    model.router.canary(canary, 1.0)
    result = model.generate([[HumanMessage("hello")]], metadata={"thread_id": "t1"})
    (answer,) = result.generations[0]
    assert isinstance(answer, ChatGeneration)
    assert answer.message.response_metadata["revision"] == canary


def test_the_thread_of_the_model_is_used_for_calls_without_one(
    home: Home, publish: Callable[[int], str]
) -> None:
    router = serve(home, FakeBackend()).router
    live, canary = publish(1), publish(2)
    router.activate(live)
    router.canary(canary, 0.5)
    for thread in map(str, range(8)):
        model = AgentprefChatModel(router=router, thread_id=thread)
        with router.acquire(thread) as lease:
            expected = lease.revision
        assert model.invoke("hello").response_metadata["revision"] == expected


def test_a_process_wide_cache_is_not_used(home: Home, publish: Callable[[int], str]) -> None:
    model = serve(home, FakeBackend())
    set_llm_cache(InMemoryCache())
    try:
        assert model.invoke("hello").response_metadata["revision"] == "base"
        live = publish(1)
        model.router.activate(live)
        assert model.invoke("hello").response_metadata["revision"] == live
    finally:
        set_llm_cache(None)


# Together with the callback.


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    with closing(Log(home.path)) as log:
        yield log


def logged(home: Home, log: Log) -> list[Run]:
    log.flush(timeout=10)
    with closing(connect(home, readonly=True)) as connection:
        return list(Store(connection).runs("default"))


@pytest.mark.parametrize("ask", [through_invoke, through_stream, through_astream, through_batch])
def test_the_callback_logs_the_revision_the_tokens_and_the_settings(
    home: Home,
    publish: Callable[[int], str],
    log: Log,
    ask: Callable[[AgentprefChatModel, Any], AIMessage],
) -> None:
    model = serve(home, FakeBackend(lambda revision, request: "blue"), model="tiny", seed=3)
    live = publish(1)
    model.router.activate(live)
    config = {"callbacks": [AgentprefCallback(log)], "configurable": {"thread_id": "t1"}}
    ask(model, config)
    (run,) = logged(home, log)
    assert (run.model, run.revision, run.thread_id) == ("tiny", live, "t1")
    assert run.output == {"role": "assistant", "content": "blue"}
    assert run.token_ids == tuple(map(ord, "blue"))
    assert run.logprobs == (-1.0,) * 4
    assert run.params == {"max_tokens": 128, "temperature": 0.0, "top_p": 1.0, "seed": 3}


def test_an_agent_over_the_router_uses_its_tool_and_is_logged(
    home: Home, publish: Callable[[int], str], log: Log
) -> None:
    def answer(revision: str, request: GenerationRequest) -> str:
        return "It is 3." if request.messages[-1]["role"] == "tool" else CALL

    model = serve(home, FakeBackend(answer))
    live = publish(1)
    model.router.activate(live)
    agent = create_agent(model, [add])
    config: Any = {"callbacks": [AgentprefCallback(log)], "configurable": {"thread_id": "t1"}}
    state = agent.invoke({"messages": [("user", "1 + 2?")]}, config)
    assert [message.text for message in state["messages"]] == ["1 + 2?", "", "3", "It is 3."]
    first, second = logged(home, log)
    assert first.output["tool_calls"][0]["function"]["name"] == "add"
    assert second.prompt.messages[1] == first.output
    assert second.prompt.messages[2]["content"] == "3"
    assert second.output["content"] == "It is 3."
    assert {(run.revision, run.thread_id) for run in (first, second)} == {(live, "t1")}
    assert [tool["function"]["name"] for tool in second.prompt.tools] == ["add"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_agent_over_the_real_engine_is_logged_as_the_revision_that_wrote_it(
    home: Home, log: Log, random_base: Path, tmp_path: Path
) -> None:
    from agentpref_adapters.transformers import TransformersBackend

    with closing(TransformersBackend(str(random_base))) as backend:
        registry = Registry(home)
        router = Router(registry, backend)
        layers = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(2)}
        folder = write_adapter(tmp_path / "adapter", layers=layers)
        identity = backend.base.identity
        live = registry.publish(folder, parent=None, model=identity, training={}).revision_id
        agent = create_agent(AgentprefChatModel(router=router, max_tokens=12), [add])
        config: Any = {"callbacks": [AgentprefCallback(log)]}
        agent.invoke({"messages": [("user", "1 + 2?")]}, config)
        router.activate(live)
        agent.invoke({"messages": [("user", "1 + 2?")]}, config)

        before, after = logged(home, log)
        assert (before.revision, after.revision) == ("base", live)
        assert before.prompt == after.prompt
        for run in (before, after):
            request = GenerationRequest(run.prompt.messages, run.prompt.tools, max_tokens=12)
            reply = backend.generate(str(run.revision), request)
            assert run.token_ids == reply.token_ids
            assert run.logprobs == pytest.approx(reply.logprobs)
            assert run.output == reply.message
