"""Which run answers a trace, when calls fail, overlap, repeat a run id, or never end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from langchain_core.language_models import (
    FakeListChatModel,
)
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_fakes import Broken, Echo, Mute, Slow, Unheard, chain_of

import agentpref_adapters._langchain_callback as callback_module
from agentpref.errors import ConfigError
from agentpref.record.log import Log
from agentpref.types import Run
from agentpref_adapters.langchain import AgentprefCallback, CallbackCounts


def test_no_run_answers_a_trace_whose_last_call_was_cancelled(callback: AgentprefCallback) -> None:
    async def work(question: str) -> None:
        await FakeListChatModel(responses=["a plan"]).ainvoke(question)
        await asyncio.wait_for(Slow().ainvoke(question), 0.01)

    trace = uuid4()
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(RunnableLambda(work).ainvoke("?", {"callbacks": [callback], "run_id": trace}))
    assert callback.counts.logged == 1
    assert callback.answer_of(trace) is None


@pytest.mark.parametrize("how", ["closed", "raises", "cannot be converted", "cannot be noted"])
def test_no_run_answers_a_trace_whose_last_call_failed(
    how: str, callback: AgentprefCallback
) -> None:
    def work(question: str) -> str:
        FakeListChatModel(responses=["a plan"]).invoke(question)
        if how == "closed":
            with closing(FakeListChatModel(responses=["blue"]).stream(question)) as stream:
                return str(next(stream).content)
        if how == "raises":
            with suppress(RuntimeError):
                Broken().invoke(question)
        elif how == "cannot be converted":
            Mute().invoke(question)
        else:
            FakeListChatModel(responses=["?"]).invoke([Unheard("?")])
        return "?"

    trace = uuid4()
    RunnableLambda(work).invoke("?", {"callbacks": [callback], "run_id": trace})
    assert callback.counts.logged == 1
    assert callback.answer_of(trace) is None


def test_a_call_that_is_tried_again_answers_its_trace(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    async def work(question: str) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(Slow().ainvoke(question), 0.01)
        await FakeListChatModel(responses=["blue"]).ainvoke(question)

    trace = uuid4()
    asyncio.run(RunnableLambda(work).ainvoke("?", {"callbacks": [callback], "run_id": trace}))
    (run,) = runs()
    assert callback.answer_of(trace) == run.run_id


def test_of_calls_that_overlap_none_is_the_last(callback: AgentprefCallback) -> None:
    first, second, third, trace = uuid4(), uuid4(), uuid4(), uuid4()
    answer = LLMResult(generations=[[ChatGeneration(message=AIMessage("blue"))]])

    def start(run_id: UUID) -> None:
        callback.on_chat_model_start({}, [[HumanMessage("?")]], run_id=run_id, parent_run_id=trace)

    for last, other in ((first, second), (second, first)):
        start(first)
        start(second)
        callback.on_llm_end(answer, run_id=last)
        callback.on_llm_end(answer, run_id=other)
        assert callback.answer_of(trace) is None
    start(third)
    assert callback.answer_of(trace) is None
    callback.on_llm_end(answer, run_id=third)
    assert callback.answer_of(trace) == str(third)


def by_invoke_of_text(chain: Runnable[Any, Any], config: RunnableConfig) -> None:
    chain.invoke("?", config)


def by_ainvoke_of_text(chain: Runnable[Any, Any], config: RunnableConfig) -> None:
    asyncio.run(chain.ainvoke("?", config))


def by_stream_of_text(chain: Runnable[Any, Any], config: RunnableConfig) -> None:
    list(chain.stream("?", config))


def by_batch_of_text(chain: Runnable[Any, Any], config: RunnableConfig) -> None:
    chain.batch(["?"], config)


@pytest.mark.parametrize("main", ["answers", "raises", "raises in a chain"])
@pytest.mark.parametrize(
    "call", [by_invoke_of_text, by_ainvoke_of_text, by_stream_of_text, by_batch_of_text]
)
def test_a_model_with_fallbacks_at_the_root_answers_its_trace(
    main: str,
    call: Callable[[Runnable[Any, Any], RunnableConfig], None],
    callback: AgentprefCallback,
    runs: Callable[[], list[Run]],
) -> None:
    model = FakeListChatModel(responses=["blue"])
    broken = RunnableLambda(str) | Broken() if main == "raises in a chain" else Broken()
    trace = uuid4()
    first, second = (model, broken) if main == "answers" else (broken, model)
    call(first.with_fallbacks([second]), {"callbacks": [callback], "run_id": trace})
    (run,) = runs()
    assert run.trace_id == str(trace)
    assert callback.answer_of(trace) == run.run_id


def test_a_chain_that_is_called_as_a_root_inside_another_answers_both_traces(
    callback: AgentprefCallback,
) -> None:
    outer, inner = uuid4(), uuid4()

    def work(question: str) -> str:
        config: RunnableConfig = {"callbacks": [callback], "run_id": inner}
        return chain_of(FakeListChatModel(responses=["blue"])).invoke({"question": "?"}, config)

    RunnableLambda(work).invoke("?", {"callbacks": [callback], "run_id": outer})
    assert callback.answer_of(inner) == callback.answer_of(outer) is not None


# Run ids that come again.


def test_a_second_call_with_the_same_run_id_gets_a_run_of_its_own(
    callback: AgentprefCallback, runs: Callable[[], list[Run]], caplog: pytest.LogCaptureFixture
) -> None:
    run_id = uuid4()
    model = FakeListChatModel(responses=["blue", "red"])
    for question in ("sky?", "rose?"):
        model.invoke(question, {"callbacks": [callback], "run_id": run_id})
    assert [(run.run_id, run.output["content"]) for run in runs()] == [
        (str(run_id), "blue"),
        (f"{run_id}/2", "red"),
    ]
    assert callback.answer_of(run_id) == f"{run_id}/2"
    assert callback.counts == CallbackCounts(logged=2, failed=0, lost=0, open=0, repeated=1)
    assert f"run_id {run_id} was the id of an earlier call" in caplog.text


def test_two_calls_with_one_run_id_at_once_are_not_mixed(
    callback: AgentprefCallback, runs: Callable[[], list[Run]], caplog: pytest.LogCaptureFixture
) -> None:
    run_id = uuid4()
    for question in ("sky?", "rose?"):
        callback.on_chat_model_start({}, [[HumanMessage(question)]], run_id=run_id)
    for answer in ("blue", "red"):
        generation = ChatGeneration(message=AIMessage(answer))
        callback.on_llm_end(LLMResult(generations=[[generation]]), run_id=run_id)
    assert runs() == []
    assert callback.answer_of(run_id) is None
    assert callback.counts == CallbackCounts(logged=0, failed=0, lost=2, open=0)
    assert f"run_id {run_id} is the id of two calls at once" in caplog.text


def test_a_call_that_was_cancelled_can_be_tried_again_with_its_run_id(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    config: RunnableConfig = {"callbacks": [callback], "run_id": uuid4()}

    async def work() -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(Slow().ainvoke("sky?", config), 0.01)
        await FakeListChatModel(responses=["blue"]).ainvoke("sky?", config)

    asyncio.run(work())
    (run,) = runs()
    assert callback.answer_of(config["run_id"]) == run.run_id
    assert callback.counts == CallbackCounts(logged=1, failed=1, lost=0, open=0)


def test_the_tags_of_a_retry_are_not_the_domain_of_a_run(
    callback: AgentprefCallback, runs: Callable[[], list[Run]]
) -> None:
    tries = iter([RuntimeError("down"), None])

    class Flaky(Echo):
        def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
            if error := next(tries):
                raise error
            return super()._generate(*args, **kwargs)

    model = Flaky().with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    model.invoke("sky?", {"callbacks": [callback], "tags": ["shop"]})
    (run,) = runs()
    assert run.tags == ("shop",)


def test_tags_in_one_string_are_refused(log: Log) -> None:
    with pytest.raises(
        ConfigError, match=r"tags is a str of 7 characters; pass a list .* \['support'\]"
    ):
        AgentprefCallback(log, tags="support")


# Calls that never end, and forks.


def test_notes_of_cancelled_calls_are_limited(
    callback: AgentprefCallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback_module, "_MOST_KEPT", 2)

    async def cancelled() -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(Slow().ainvoke("sky?", {"callbacks": [callback]}), 0.01)

    for _ in range(5):
        asyncio.run(cancelled())
    assert callback.counts == CallbackCounts(logged=0, failed=3, lost=0, open=2)


def test_no_notes_are_kept_of_ended_chains(callback: AgentprefCallback) -> None:
    chain = chain_of(FakeListChatModel(responses=["blue"]))
    chain.invoke({"question": "sky?"}, {"callbacks": [callback]})
    with pytest.raises(RuntimeError):
        chain_of(Broken()).invoke({"question": "sky?"}, {"callbacks": [callback]})
    assert len(callback._traces) == len(callback._calls) == callback._bytes == 0


def test_the_prompts_of_cancelled_calls_are_limited_by_their_bytes(
    callback: AgentprefCallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback_module, "_MOST_BYTES", 10_000)
    for _ in range(5):
        asked = [HumanMessage("x" * 4_000)]
        callback.on_chat_model_start({}, [asked], run_id=uuid4())
    assert callback.counts == CallbackCounts(logged=0, failed=3, lost=0, open=2)
    callback.on_chat_model_start({}, [[HumanMessage("x" * 20_000)]], run_id=(large := uuid4()))
    assert callback.counts == CallbackCounts(logged=0, failed=5, lost=0, open=1)
    answer = LLMResult(generations=[[ChatGeneration(message=AIMessage("blue"))]])
    callback.on_llm_end(answer, run_id=large)
    assert callback.counts == CallbackCounts(logged=1, failed=5, lost=0, open=0)


FORKING = """
import os, sys, threading
from uuid import UUID, uuid4
from langchain_core.language_models import FakeListChatModel
from agentpref.record.log import Log
from agentpref_adapters.langchain import AgentprefCallback
log = Log(sys.argv[1])
callback = AgentprefCallback(log)
model = FakeListChatModel(responses=["blue"])
model.invoke("parent?", {"callbacks": [callback]})
held, forked = threading.Event(), threading.Event()
def hold():
    with callback._lock:
        held.set()
        forked.wait(.3)
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    model.invoke("child?", {"callbacks": [callback]})
    assert callback.counts.logged == 1
    sys.exit()
forked.set()
assert os.waitpid(child, 0)[1] == 0
model.invoke("parent again?", {"callbacks": [callback]})
assert callback.counts.logged == 2
log.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_the_callback_is_locked_logs_for_itself(
    home: Path, runs: Callable[[], list[Run]]
) -> None:
    subprocess.run([sys.executable, "-c", FORKING, str(home)], check=True, timeout=60)
    asked = {run.prompt.messages[0]["content"] for run in runs()}
    assert asked == {"parent?", "child?", "parent again?"}
