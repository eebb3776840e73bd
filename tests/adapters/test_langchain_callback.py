from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import (
    FakeListChatModel,
    FakeListLLM,
)
from langchain_core.language_models.fake_chat_models import FakeListChatModelError
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langchain_fakes import Broken, Echo, Scripted, Several, Unheard, chain_of
from langgraph.checkpoint.memory import InMemorySaver

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Run
from agentpref_adapters.langchain import AgentprefCallback, CallbackCounts


def asked(question: str) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": "Be brief."}, {"role": "user", "content": question})


# Each way of calling a chain with one question.


def by_invoke(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    return chain.invoke({"question": "sky?"}, config)


def by_ainvoke(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    return asyncio.run(chain.ainvoke({"question": "sky?"}, config))


def by_stream(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    return "".join(chain.stream({"question": "sky?"}, config))


def by_astream(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    async def read() -> str:
        return "".join([piece async for piece in chain.astream({"question": "sky?"}, config)])

    return asyncio.run(read())


def by_events(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    async def read() -> str:
        events = [event async for event in chain.astream_events({"question": "sky?"}, config)]
        return str(events[-1]["data"]["output"])

    return asyncio.run(read())


def by_batch(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    return chain.batch([{"question": "sky?"}], [config])[0]


def by_abatch(chain: Runnable[Any, str], config: RunnableConfig) -> str:
    return asyncio.run(chain.abatch([{"question": "sky?"}], [config]))[0]


@pytest.mark.parametrize(
    "call", [by_invoke, by_ainvoke, by_stream, by_astream, by_events, by_batch, by_abatch]
)
def test_a_model_call_of_a_chain_is_logged_once_in_every_form_of_call(
    call: Callable[[Runnable[Any, str], RunnableConfig], str],
    callback: AgentprefCallback,
    runs: Callable[[], list[Run]],
    name: Callable[[str], str],
) -> None:
    trace = uuid4()
    config: RunnableConfig = {
        "callbacks": [callback],
        "run_id": trace,
        "tags": ["weather"],
        "metadata": {"user_id": "u1", "thread_id": "t1", "plan": "pro"},
    }
    assert call(chain_of(FakeListChatModel(responses=["It is blue."])), config) == "It is blue."
    (run,) = runs()
    assert run.prompt.messages == asked("sky?")
    assert run.output == {"role": "assistant", "content": "It is blue."}
    assert (run.thread_id, run.user_id, run.trace_id) == ("t1", name("u1"), str(trace))
    assert run.tags == ("weather",)
    assert run.metadata == {"plan": "pro"}
    assert callback.answer_of(trace) == run.run_id
    assert callback.counts == CallbackCounts(logged=1, failed=0, lost=0, open=0)


@pytest.mark.parametrize("call", [by_invoke, by_ainvoke, by_stream, by_astream, by_events])
def test_the_thread_is_read_from_configurable(
    call: Callable[[Runnable[Any, str], RunnableConfig], str],
    callback: AgentprefCallback,
    runs: Callable[[], list[Run]],
) -> None:
    config: RunnableConfig = {"callbacks": [callback], "configurable": {"thread_id": "t1"}}
    call(chain_of(FakeListChatModel(responses=["blue"])), config)
    (run,) = runs()
    assert run.thread_id == "t1"


def test_feedback_can_be_given_by_the_run_id_of_langchain(log: Log, home: Path) -> None:
    run_id = uuid4()
    model = FakeListChatModel(responses=["blue"])
    model.invoke("sky?", {"callbacks": [AgentprefCallback(log)], "run_id": run_id})
    log.feedback(str(run_id), key="thumbs", score=0, comment="too short")
    log.flush(timeout=10)
    with closing(connect(Home.open(home), readonly=True)) as connection:
        (feedback,) = Store(connection).feedback("default")
    assert (feedback.run_id, feedback.score) == (str(run_id), 0)


def test_model_and_sampling_are_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    model = Echo().bind(model="gpt-x", temperature=0.5, api_key="secret")
    model.invoke("sky?", {"callbacks": [callback]}, stop=["\n"])
    (run,) = runs()
    assert run.model == "gpt-x"
    assert run.params == {"temperature": 0.5, "stop": ["\n"]}


def test_only_sampling_parameters_and_the_users_own_tags_and_metadata_are_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    metadata = {
        **{"plan": "pro", "thread_id": "t1", "ls_provider": "openai", "langgraph_node": "planner"},
        **{"langgraph_step": 2, "lc_versions": {}, "checkpoint_ns": "x", "__private": 1},
    }
    steps = ["seq:step:2", "map:key:answer", "branch:1", "langsmith:hidden"]
    sampling = {"temperature": 0.0, "seed": None, "stop": ["\n"]}
    callback.on_chat_model_start(
        {},
        [[HumanMessage("hi")]],
        run_id=(run_id := uuid4()),
        tags=["billing", *steps, "branch:main"],
        metadata=metadata,
        invocation_params={**sampling, "api_key": "secret", "_type": "x"},
    )
    answer = ChatGeneration(message=AIMessage("hello"))
    callback.on_llm_end(LLMResult(generations=[[answer]]), run_id=run_id)
    (run,) = runs()
    assert run.params == {"temperature": 0.0, "stop": ["\n"]}
    assert run.tags == ("billing", "branch:main")
    assert run.metadata == {"plan": "pro", "langgraph_node": "planner"}
    assert run.thread_id == "t1"


def test_the_model_that_answered_is_logged_rather_than_the_one_that_was_asked_for(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    answer = AIMessage("blue", response_metadata={"model_name": "gpt-x-2026", "logprobs": {"a": 1}})
    model = Scripted(messages=iter([answer])).bind(model="gpt-x")
    model.invoke("sky?", {"callbacks": [callback]})
    (run,) = runs()
    assert (run.model, run.revision, run.logprobs) == ("gpt-x-2026", None, None)


def test_the_config_overrides_the_arguments_of_the_callback(
    log: Log, runs: Callable[[], list[Run]], name: Callable[[str], str]
) -> None:
    callback = AgentprefCallback(log, tags=["shop"], thread_id="none", user_id="nobody")
    model = Echo()
    model.invoke("one", {"callbacks": [callback]})
    metadata = {"user_id": "u1", "thread_id": 7}
    model.invoke("two", {"callbacks": [callback], "metadata": metadata, "tags": ["a", "shop"]})
    first, second = runs()
    assert (first.thread_id, first.user_id, first.tags) == ("none", name("nobody"), ("shop",))
    assert (second.thread_id, second.user_id, second.tags) == ("7", name("u1"), ("shop", "a"))


def test_the_prompt_of_a_text_model_is_logged_as_a_user_message(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    FakeListLLM(responses=["blue"]).invoke("sky?", {"callbacks": [callback]})
    (run,) = runs()
    assert run.prompt.messages == ({"role": "user", "content": "sky?"},)
    assert run.output == {"role": "assistant", "content": "blue"}


def test_several_answers_to_one_prompt_are_logged_as_several_runs(
    log: Log, callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    run_id = uuid4()
    Several().generate([[HumanMessage("sky?")]], callbacks=[callback], run_id=run_id, n=3)
    by_id = {run.run_id: run for run in runs()}
    assert list(by_id) == [str(run_id), f"{run_id}:1", f"{run_id}:2"]
    assert [run.output["content"] for run in by_id.values()] == ["answer 0", "answer 1", "answer 2"]
    assert len({run.prompt.id for run in by_id.values()}) == 1
    log.compare(str(run_id), f"{run_id}:1", winner="b")


def test_generate_with_several_prompts_logs_each(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    prompts: list[list[BaseMessage]] = [[HumanMessage("one")], [HumanMessage("two")]]
    Echo().generate(prompts, callbacks=[callback])
    assert [run.output["content"] for run in runs()] == ["one", "two"]


def assert_fifty_echoes(runs: list[Run], callback: AgentprefCallback) -> None:
    assert len({run.run_id for run in runs}) == len({run.trace_id for run in runs}) == 50
    for run in runs:
        assert run.output["content"] == run.prompt.messages[-1]["content"]
    assert {run.output["content"] for run in runs} == {f"question {i}" for i in range(50)}
    assert callback.counts == CallbackCounts(logged=50, failed=0, lost=0, open=0)


def test_fifty_concurrent_calls_in_threads_are_not_mixed(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    questions = [{"question": f"question {i}"} for i in range(50)]
    config: RunnableConfig = {"callbacks": [callback], "max_concurrency": 16}
    chain_of(Echo()).batch(questions, config)
    assert_fifty_echoes(runs(), callback)


def test_fifty_concurrent_calls_in_one_event_loop_are_not_mixed(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    questions = [{"question": f"question {i}"} for i in range(50)]
    asyncio.run(chain_of(Echo()).abatch(questions, {"callbacks": [callback]}))
    assert_fifty_echoes(runs(), callback)


# Agents.


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def adding_agent() -> Any:
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1", "type": "tool_call"}
    script = [
        AIMessage("", tool_calls=[call]),
        AIMessage("It is 3."),
        AIMessage("You are welcome."),
    ]
    return create_agent(
        Scripted(messages=iter(script)),
        [add],
        system_prompt="Use tools.",
        checkpointer=InMemorySaver(),
    )


def test_each_model_call_of_an_agent_is_logged_with_all_that_the_model_saw(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    trace, later = uuid4(), uuid4()
    config: RunnableConfig = {"callbacks": [callback], "configurable": {"thread_id": "t1"}}
    agent = adding_agent()
    agent.invoke({"messages": [("user", "1 + 2?")]}, {**config, "run_id": trace})
    agent.invoke({"messages": [("user", "Thanks.")]}, {**config, "run_id": later})

    first, second, third = runs()
    function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "c1", "function": function}],
    }
    result = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    assert first.prompt.messages == (
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "1 + 2?"},
    )
    assert first.output == called
    assert second.prompt.messages == (*first.prompt.messages, called, result)
    assert second.output == {"role": "assistant", "content": "It is 3."}
    assert third.prompt.messages == (
        *second.prompt.messages,
        second.output,
        {"role": "user", "content": "Thanks."},
    )
    for run in (first, second, third):
        assert run.thread_id == "t1"
        assert [tool["function"]["name"] for tool in run.prompt.tools] == ["add"]
    assert [run.trace_id for run in (first, second, third)] == [str(trace), str(trace), str(later)]
    assert callback.answer_of(trace) == second.run_id
    assert callback.answer_of(later) == third.run_id


def test_a_conversation_of_an_agent_shares_its_messages_on_disk(
    callback: AgentprefCallback, runs: Callable[[], list[Run]], home: Path
) -> None:
    config: RunnableConfig = {"callbacks": [callback], "configurable": {"thread_id": "t1"}}
    agent = adding_agent()
    agent.invoke({"messages": [("user", "1 + 2?")]}, config)
    agent.invoke({"messages": [("user", "Thanks.")]}, config)
    assert len(runs()) == 3
    with closing(connect(Home.open(home), readonly=True)) as connection:
        (messages,) = connection.execute("SELECT count(*) FROM message").fetchone()
    # tools, system, user, call, result, answer, user, answer: one row each
    assert messages == 8


def test_the_stream_of_an_async_agent_is_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    async def read() -> list[Any]:
        config: RunnableConfig = {"callbacks": [callback], "configurable": {"thread_id": "t1"}}
        question = {"messages": [("user", "1 + 2?")]}
        return [step async for step in adding_agent().astream(question, config)]

    assert asyncio.run(read())
    first, second = runs()
    assert second.output["content"] == "It is 3."
    assert first.trace_id == second.trace_id


def test_a_model_call_in_a_tool_belongs_to_the_trace_of_the_agent(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    @tool
    def look_up(question: str) -> str:
        """Ask another model."""
        return chain_of(FakeListChatModel(responses=["blue"])).invoke({"question": question})

    trace = uuid4()
    RunnableLambda(lambda question: look_up.invoke({"question": question})).invoke(
        "sky?", {"callbacks": [callback], "run_id": trace}
    )
    (run,) = runs()
    assert run.trace_id == str(trace)


# What goes wrong.


def test_metadata_that_is_not_json_does_not_prevent_logging(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    metadata = {"session": object(), "plan": "pro"}
    Echo().invoke("sky?", {"callbacks": [callback], "metadata": metadata})
    (run,) = runs()
    assert run.metadata["plan"] == "pro"


def test_a_model_that_raises_is_counted_and_not_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    with pytest.raises(RuntimeError, match="engine is down"):
        chain_of(Broken()).invoke({"question": "sky?"}, {"callbacks": [callback]})
    assert runs() == []
    assert callback.counts == CallbackCounts(logged=0, failed=1, lost=0, open=0)


def test_a_stream_that_raises_midway_is_counted_and_not_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    model = FakeListChatModel(responses=["blue"], error_on_chunk_number=2)
    with pytest.raises(FakeListChatModelError):
        list(model.stream("sky?", {"callbacks": [callback]}))
    assert runs() == []
    assert callback.counts == CallbackCounts(logged=0, failed=1, lost=0, open=0)


def test_a_stream_that_is_closed_early_is_counted_and_not_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    stream = FakeListChatModel(responses=["blue"]).stream("sky?", {"callbacks": [callback]})
    next(stream)
    stream.close()
    assert runs() == []
    assert callback.counts == CallbackCounts(logged=0, failed=1, lost=0, open=0)


def test_the_calls_of_a_batch_that_succeed_are_logged_beside_those_that_raise(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    model = Echo() | RunnableLambda(lambda message: message.text)
    broken = Broken().with_fallbacks([Echo()])
    (model | broken).batch(["one", "two"], {"callbacks": [callback]})
    assert sorted(run.output["content"] for run in runs()) == ["one", "one", "two", "two"]
    assert callback.counts == CallbackCounts(logged=4, failed=2, lost=0, open=0)


@pytest.mark.guarantee("logging")
def test_a_log_that_fails_never_breaks_the_chain(
    log: Log, callback: AgentprefCallback, caplog: pytest.LogCaptureFixture
) -> None:
    log.close()
    with caplog.at_level(logging.WARNING):
        answer = chain_of(FakeListChatModel(responses=["blue"])).invoke(
            {"question": "sky?"}, {"callbacks": [callback]}
        )
    assert answer == "blue"
    assert callback.counts == CallbackCounts(logged=1, failed=0, lost=0, open=0)
    assert log.dropped == {"LogClosed": 1}
    assert "closed" in caplog.text


def test_a_message_that_cannot_be_converted_never_breaks_the_chain(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    odd = Unheard("?")
    assert FakeListChatModel(responses=["?"]).invoke([odd], {"callbacks": [callback]}).text == "?"
    assert runs() == []
    assert callback.counts == CallbackCounts(logged=0, failed=0, lost=1, open=0)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "video", "url": "https://example.org/cat.mp4"},
        {"type": "text-plain", "text": "a file"},
        {"type": "image", "source": {"type": "base64"}},
        {"type": "media", "mime_type": "video/mp4", "file_uri": "gs://bucket/cat.mp4"},
    ],
)
def test_a_call_with_a_block_that_openai_does_not_have_is_logged_as_it_is(
    block: dict[str, Any], callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    text = {"type": "text", "text": "what is this?"}
    model = FakeListChatModel(responses=["?"])
    model.invoke([HumanMessage([block, text])], {"callbacks": [callback]})
    (run,) = runs()
    assert run.prompt.messages == ({"role": "user", "content": [block, text]},)


def test_values_that_json_cannot_hold_do_not_lose_a_run(
    log: Log, callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    circular: dict[str, Any] = {}
    circular["self"] = circular
    metadata: dict[Any, Any] = {1: "a", ("b", 2): (3,), "big": 2**70, "half": "\ud83d"}
    metadata["circular"] = circular
    call = {"name": "f", "args": {"when": {1, 2}}, "id": "c1", "type": "tool_call"}
    asked = [HumanMessage("hi \ud83d"), AIMessage("", tool_calls=[call])]
    image = {"type": "media", "mime_type": "video/mp4", "data": b"ab"}
    Several().generate(
        [[*asked, HumanMessage([image])]], callbacks=[callback], metadata=metadata, n=1
    )
    (run,) = runs()
    assert run.prompt.messages[0]["content"] == "hi \ufffd"
    (called,) = run.prompt.messages[1]["tool_calls"]
    assert called["function"]["arguments"] == {"when": "{1, 2}"}
    assert run.prompt.messages[2]["content"] == [{**image, "data": "YWI="}]
    assert run.metadata["1"] == "a"
    assert run.metadata["('b', 2)"] == [3]
    assert run.metadata["big"] == str(2**70)
    assert run.metadata["half"] == "\ufffd"
    assert run.metadata["circular"] == {"self": "[circular]"}
    kinds = ("surrogate", "key", "integer", "circular", "object")
    assert (log.altered, log.dropped) == (dict.fromkeys(kinds, 1), {})


def test_a_character_that_a_stream_split_is_joined(
    log: Log, callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    split = "Ja \ud83d\ude00"
    list(FakeListChatModel(responses=[split]).stream("?", {"callbacks": [callback]}))
    (run,) = runs()
    assert run.output["content"] == "Ja 😀"
    assert log.altered == {}


def test_what_a_provider_sends_as_reasoning_is_logged(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    answer = AIMessage("4", additional_kwargs={"reasoning_content": "2 + 2 is 4"})
    model = Scripted(messages=iter([answer, AIMessage("8")]))
    model.invoke("2 + 2?", {"callbacks": [callback]})
    model.invoke(
        [HumanMessage("2 + 2?"), answer, HumanMessage("4 + 4?")], {"callbacks": [callback]}
    )
    first, second = runs()
    said = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 is 4"}
    assert first.output == second.prompt.messages[1] == said


def test_without_langchain_core_the_error_names_the_install_command() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import agentpref_adapters.langchain"
    tried = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "MissingDependency" in tried.stderr
    assert "pip install 'agentpref[langchain]'" in tried.stderr
