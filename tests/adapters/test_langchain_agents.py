"""Middleware that routes an agent's threads, over real agents."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver

from agentpref.errors import ConfigError
from agentpref.home import Home
from agentpref.record.log import Log
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter
from agentpref_adapters.langchain import AgentprefCallback, AgentprefChatModel
from agentpref_adapters.langchain_agents import ServeRevisions

BASE_IDENTITY = {"name": "fake", "digest": "0" * 64, "template_digest": "1" * 64}
CALL = '<tool_call>{"name": "hours", "arguments": {"day": "Sunday"}}</tool_call>'


def hours(day: str) -> str:
    """Look up when the shop is open."""
    return f"closed on {day}"


@pytest.fixture
def router(home: Path, tmp_path: Path) -> Router:
    """Base and a canary of half of the threads; each answers with a call, then with its name."""

    def answer(revision: str, request) -> str:
        return f"{revision} says closed" if request.messages[-1]["role"] == "tool" else CALL

    registry = Registry(Home.create(home))
    folder = write_adapter(tmp_path / "adapter")
    revision = registry.publish(folder, parent=None, model=BASE_IDENTITY, training={})
    router = Router(registry, FakeBackend(answer))
    router.canary(revision.revision_id, weight=0.5)
    return router


def agent_over(router: Router):
    """An agent that was built for another model, which must not be asked."""
    elsewhere = FakeListChatModel(responses=["from elsewhere"])
    middleware = ServeRevisions(AgentprefChatModel(router=router))
    return create_agent(
        elsewhere, tools=[hours], middleware=[middleware], checkpointer=InMemorySaver()
    )


def in_thread(name: str, *callbacks) -> dict:
    return {"configurable": {"thread_id": name}, "callbacks": [*callbacks]}


def test_every_call_of_an_agent_is_answered_by_the_revision_of_its_thread(router: Router) -> None:
    agent = agent_over(router)
    seen = {}
    for n in range(8):
        found = agent.invoke({"messages": [("user", "open?")]}, in_thread(f"t{n}"))["messages"]
        revisions = {m.response_metadata["revision"] for m in found if isinstance(m, AIMessage)}
        with router.acquire(thread_id=f"t{n}") as lease:
            assert revisions == {lease.revision}
        assert found[-1].text == f"{lease.revision} says closed"
        seen |= dict.fromkeys(revisions)
    assert len(seen) == 2


def test_the_async_form_routes_threads_too(router: Router) -> None:
    agent = agent_over(router)

    async def ask(name: str) -> str:
        state = await agent.ainvoke({"messages": [("user", "open?")]}, in_thread(name))
        return state["messages"][-1].response_metadata["revision"]

    for n in range(4):
        with router.acquire(thread_id=f"t{n}") as lease:
            assert asyncio.run(ask(f"t{n}")) == lease.revision


def test_a_page_gets_the_run_of_what_an_agent_answered(router: Router, log: Log, runs) -> None:
    callback = AgentprefCallback(log)
    state = agent_over(router).invoke({"messages": [("user", "open?")]}, in_thread("t1", callback))
    run_id = callback.run_of(state)
    assert run_id == callback.run_of(state["messages"]) == callback.run_of(state["messages"][-1])
    log.thumbs(run_id, up=False)
    last = next(run for run in runs() if run.run_id == run_id)
    assert last.output["content"].endswith("says closed")
    assert last.thread_id == "t1"
    assert last.metadata["finish_reason"] == "stop"


def test_a_model_without_revisions_is_refused() -> None:
    with pytest.raises(ConfigError, match="FakeListChatModel, which has no revisions"):
        ServeRevisions(FakeListChatModel(responses=["x"]))
