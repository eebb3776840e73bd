"""A chat answers through the router, records what was served, and takes feedback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import agentpref
from agentpref.errors import ConfigError, GenerationFailed, InvalidMessage, UnknownRun
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.serve.chat import Chat, ChatReply
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend, write_adapter

ASK = [{"role": "user", "content": "When is high tide?"}]
TOOL = {"type": "function", "function": {"name": "tides", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "tides", "arguments": {"at": "sea"}}</tool_call>'


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def revision(registry: Registry, tmp_path: Path) -> str:
    adapter = write_adapter(tmp_path / "adapter")
    name = registry.publish(adapter, parent=None, model={"name": "tiny"}, training={}).revision_id
    registry.promote(name)
    return name


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def chat(registry: Registry, backend: FakeBackend) -> Iterator[Chat]:
    with agentpref.Log(registry.home.path) as log, Router(registry, backend) as router:
        yield agentpref.Chat(log, router, model="tiny")


def runs(registry: Registry) -> list[agentpref.Run]:
    with closing(connect(registry.home, readonly=True)) as connection:
        return list(Store(connection).runs("default"))


def test_an_answer_is_recorded_with_what_was_served(
    chat: Chat, registry: Registry, revision: str
) -> None:
    chat.router.sync()
    reply = chat.reply(
        ASK,
        tools=[TOOL],
        thread_id="t1",
        trace_id="task",
        tags=["sea"],
        metadata={"page": 3},
        max_tokens=32,
        temperature=0.7,
        seed=5,
    )
    assert reply.text == f"{revision} heard: When is high tide?"
    assert (reply.revision, reply.finish_reason) == (revision, "stop")
    chat.log.flush()
    [run] = runs(registry)
    assert run.run_id == reply.run_id
    assert (run.model, run.revision) == ("tiny", revision)
    assert (run.thread_id, run.trace_id, run.tags) == ("t1", "task", ("sea",))
    assert (run.output, list(run.prompt.messages)) == (reply.message, ASK)
    assert list(run.prompt.tools) == [TOOL]
    assert run.metadata == {"page": 3, "finish_reason": "stop"}
    assert run.params == {
        "max_tokens": 32,
        "temperature": 0.7,
        "top_p": 1.0,
        "seed": 5,
        "stop": [],
    }
    assert run.token_ids == tuple(map(ord, reply.text))
    assert run.logprobs == (-1.0,) * len(reply.text)


def test_a_stream_yields_pieces_and_ends_with_the_recorded_answer(
    chat: Chat, registry: Registry
) -> None:
    *pieces, reply = chat.stream(ASK, thread_id="t1")
    assert isinstance(reply, ChatReply)
    assert len(pieces) > 1
    assert "".join(map(str, pieces)) == reply.text
    chat.log.flush()
    assert [(run.run_id, run.thread_id) for run in runs(registry)] == [(reply.run_id, "t1")]


def test_a_stream_that_is_closed_early_is_not_recorded(chat: Chat, registry: Registry) -> None:
    pieces = chat.stream(ASK)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    chat.log.flush()
    assert runs(registry) == []
    assert chat.router.acquire().revision == "base"


def test_feedback_on_an_answer_that_waits_in_the_queue_is_kept(
    chat: Chat, registry: Registry
) -> None:
    reply = chat.reply(ASK)
    chat.thumbs(reply.run_id, up=False, comment="wrong", user_id="ana")
    chat.correct(reply.run_id, "At six.", user_id="ana")
    with closing(connect(registry.home, readonly=True)) as connection:
        store = Store(connection)
        said = [(one.run_id, one.key, one.score) for one in store.feedback("default")]
        [pair] = read_examples(store, "default", held_out=0.2).pairs
    assert said == [(reply.run_id, "thumbs", 0.0), (reply.run_id, "correction", None)]
    chosen, rejected = pair.completions
    assert rejected.message == reply.message
    assert chosen.message["content"] == "At six."
    with pytest.raises(UnknownRun):
        chat.thumbs("no-run", up=True)


def test_tool_calls_are_recorded_and_leave_the_text_empty(
    registry: Registry, backend: FakeBackend
) -> None:
    backend = FakeBackend(lambda name, request: CALL)
    with agentpref.Log(registry.home.path) as log, Router(registry, backend) as router:
        reply = Chat(log, router).reply(ASK, tools=[TOOL])
    assert reply.text == ""
    assert reply.message["tool_calls"][0]["function"]["name"] == "tides"
    assert runs(registry)[0].output == reply.message


def test_the_reasoning_of_earlier_turns_is_recorded_and_empty_calls_are_not(
    chat: Chat, registry: Registry
) -> None:
    said = {"role": "assistant", "content": "At 4.", "reasoning_content": "low is at 10"}
    chat.reply([*ASK, {**said, "tool_calls": []}, *ASK])
    chat.log.flush()
    assert runs(registry)[0].prompt.messages == (*ASK, said, *ASK)
    assert "tool_calls" not in runs(registry)[0].output


def test_an_answer_is_returned_when_it_cannot_be_recorded(chat: Chat, registry: Registry) -> None:
    chat.log.close()
    assert chat.reply(ASK).text == "base heard: When is high tide?"
    assert sum(chat.log.dropped.values()) == 1
    assert runs(registry) == []


def test_nothing_is_recorded_when_the_engine_fails(
    chat: Chat, backend: FakeBackend, registry: Registry
) -> None:
    backend.fail_generate.add("base")
    with pytest.raises(GenerationFailed):
        chat.reply(ASK)
    with pytest.raises(GenerationFailed):
        list(chat.stream(ASK))
    with pytest.raises(InvalidMessage):
        chat.reply([])
    with pytest.raises(ConfigError, match="temperature is -1"):
        chat.reply(ASK, temperature=-1)
    chat.log.flush()
    assert runs(registry) == []


@pytest.mark.parametrize("message", [3, {"rôle": "user"}, {"role": "user", "content": b"Hi"}])
def test_a_message_without_the_shape_of_one_is_refused_before_the_engine_answers(
    chat: Chat, registry: Registry, message: Any
) -> None:
    with pytest.raises(InvalidMessage, match="message 1"):
        chat.reply([*ASK, message])
    assert not chat.log.dropped
    assert runs(registry) == []


def test_a_log_of_another_namespace_or_home_is_refused(
    registry: Registry, backend: FakeBackend, tmp_path: Path
) -> None:
    with Router(registry, backend) as router:
        for home, namespace in ((registry.home.path, "other"), (tmp_path / "else", "default")):
            with (
                agentpref.Log(home, namespace=namespace) as log,
                pytest.raises(ConfigError, match="another home or namespace"),
            ):
                Chat(log, router)


def test_a_home_named_by_a_link_is_the_same_home(
    registry: Registry, backend: FakeBackend, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(registry.home.path)
    with agentpref.Log(tmp_path / "link") as log, Router(registry, backend) as router:
        assert Chat(log, router).reply(ASK).run_id


def test_answers_during_a_swap_are_recorded_under_the_revision_that_wrote_them(
    chat: Chat, registry: Registry, revision: str
) -> None:
    replies: list[ChatReply] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.001):  # a pause, so that the log's queue never fills up
            replies.append(chat.reply(ASK))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ("base", revision) * 5:
        chat.router.activate(name)
        seen = len(replies)
        while len(replies) < seen + 6:
            stop.wait(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    chat.log.flush()
    recorded = {run.run_id: run for run in runs(registry)}
    assert {reply.revision for reply in replies} == {"base", revision}
    for reply in replies:
        run = recorded[reply.run_id]
        assert run.revision == reply.revision
        assert run.output["content"] == f"{run.revision} heard: When is high tide?"


def test_an_unknown_option_is_refused_before_the_engine_is_asked(
    chat: Chat, backend: FakeBackend
) -> None:
    for ask in (chat.reply, lambda *a, **k: list(chat.stream(*a, **k))):
        with pytest.raises(ConfigError, match="'temprature' is no sampling setting"):
            ask(ASK, temprature=0.5)
        with pytest.raises(
            ConfigError, match=r"tags is a str of 5 characters; pass a list .* \['support'\]"
        ):
            ask(ASK, tags="tides")
    assert ("generate", "base") not in backend.calls


def test_arguments_of_the_chat_template_are_recorded_where_there_are_any(
    chat: Chat, registry: Registry
) -> None:
    arguments = {"enable_thinking": False}
    chat.reply(ASK, chat_template_kwargs=arguments)
    chat.reply(ASK)
    with pytest.raises(
        ConfigError, match="chat_template_kwargs is a str of 1 characters, but must be a mapping"
    ):
        chat.reply(ASK, chat_template_kwargs="x")
    chat.log.flush()
    asked, plain = sorted(runs(registry), key=lambda run: run.created_at)
    assert asked.params["chat_template_kwargs"] == arguments
    assert "chat_template_kwargs" not in plain.params
