"""Thumbs in Chainlit's own routes, and in its SQLAlchemy data layer."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import logged, thumbs
from sessions import ROOT, fences

import agentpref
from agentpref.errors import ConfigError, UnknownRun
from agentpref.home import Home
from agentpref_adapters.remote import RemoteLog

# Where it is imported, Chainlit makes a folder of settings in the working directory, and warns.
os.environ.setdefault("CHAINLIT_APP_ROOT", tempfile.mkdtemp())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from chainlit.chat_context import chat_context
    from chainlit.config import config
    from chainlit.context import context, init_http_context
    from chainlit.data.base import BaseDataLayer
    from chainlit.data.sql_alchemy import SQLAlchemyDataLayer
    from chainlit.message import Message
    from chainlit.server import app as chainlit_app
    from chainlit.step import Step
    from chainlit.types import Feedback, Pagination, ThreadFilter
    from chainlit.user import User

    from agentpref_adapters.chainlit import bind, feedback_layer, turn

QUESTION = {"role": "user", "content": "Turn off the lamp in the hall."}

TABLES = """
CREATE TABLE users ("id" TEXT PRIMARY KEY, "identifier" TEXT, "metadata" TEXT, "createdAt" TEXT);
CREATE TABLE threads ("id" TEXT PRIMARY KEY, "createdAt" TEXT, "name" TEXT, "userId" TEXT,
    "userIdentifier" TEXT, "tags" TEXT, "metadata" TEXT);
CREATE TABLE steps ("id" TEXT PRIMARY KEY, "name" TEXT, "type" TEXT, "threadId" TEXT,
    "parentId" TEXT, "streaming" INTEGER, "waitForAnswer" INTEGER, "isError" INTEGER,
    "metadata" TEXT, "tags" TEXT, "input" TEXT, "output" TEXT, "createdAt" TEXT, "command" TEXT,
    "start" TEXT, "end" TEXT, "generation" TEXT, "showInput" TEXT, "language" TEXT, "indent" INT,
    "defaultOpen" INTEGER, "autoCollapse" INTEGER, "icon" TEXT, "modes" TEXT);
CREATE TABLE feedbacks ("id" TEXT PRIMARY KEY, "forId" TEXT, "threadId" TEXT, "value" INT,
    "comment" TEXT);
CREATE TABLE elements ("id" TEXT PRIMARY KEY, "threadId" TEXT, "type" TEXT, "url" TEXT,
    "chainlitKey" TEXT, "name" TEXT, "display" TEXT, "objectKey" TEXT, "size" TEXT, "page" INT,
    "language" TEXT, "forId" TEXT, "mime" TEXT, "props" TEXT, "autoPlay" INT, "playerConfig" TEXT);
"""
"""What Chainlit's documentation has people create, as SQLite writes it."""


@pytest.fixture
def log(home: Home) -> Iterator[agentpref.Log]:
    with agentpref.Log(home.path) as opened:
        yield opened


@pytest.fixture
def request_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., httpx.Response]:
    """Call ``request_of(layer, "PUT", {…})``: what Chainlit's route ``/feedback`` answers."""

    def ask(layer: BaseDataLayer, method: str, body: dict[str, Any]) -> httpx.Response:
        monkeypatch.setattr("chainlit.data._data_layer", layer)
        monkeypatch.setattr("chainlit.data._data_layer_initialized", True)

        async def send() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(chainlit_app), base_url="http://page"
            ) as client:
                return await client.request(method, "/feedback", json=body)

        return asyncio.run(send())

    return ask


def stored(tmp_path: Path) -> SQLAlchemyDataLayer:
    path = tmp_path / "chainlit.db"
    if not path.exists():
        with sqlite3.connect(path) as database:
            database.executescript(TABLES)
        database.close()
    return SQLAlchemyDataLayer(f"sqlite+aiosqlite:///{path}")


def test_the_routes_record_a_thumb_and_take_it_back_after_a_restart(
    log: agentpref.Log, home: Home, request_of: Callable[..., httpx.Response]
) -> None:
    turn_id = str(uuid4())
    run = log.record([QUESTION], "Done.", trace_id=turn_id)
    thumb = {"feedback": {"forId": turn_id, "value": 0}, "sessionId": "s"}
    put = request_of(feedback_layer(log), "PUT", thumb)
    assert put.status_code == 200
    assert [(row.run_id, row.score) for row in logged(home)[1]] == [(run, 0.0)]
    assert thumbs(home) == [False]
    named = {"feedbackId": put.json()["feedbackId"]}
    assert request_of(feedback_layer(log), "DELETE", named).status_code == 200
    assert thumbs(home) == []


def test_the_page_is_told_that_a_thumb_is_on_no_answer_of_the_log(
    log: agentpref.Log, home: Home, request_of: Callable[..., httpx.Response]
) -> None:
    thumb = {"feedback": {"forId": str(uuid4()), "value": 1}, "sessionId": "s"}
    answer = request_of(feedback_layer(log), "PUT", thumb)
    assert answer.status_code == 500
    assert "record it with trace_id=turn()" in answer.json()["detail"]
    assert logged(home) == ([], [])


def test_a_layer_of_the_app_stores_what_it_stored_and_the_log_has_it_too(
    log: agentpref.Log, home: Home, tmp_path: Path
) -> None:
    async def story() -> None:
        layer = feedback_layer(log, stored(tmp_path))
        await layer.update_thread("t", name="lamps")
        run = log.record([QUESTION], "Done.", trace_id="turn")
        feedback_id = await layer.upsert_feedback(Feedback("turn", 1, threadId="t", comment="yes"))
        assert thumbs(home) == [True]
        await layer.upsert_feedback(Feedback("turn", 0, threadId="t", id=feedback_id))
        assert thumbs(home) == [False]
        assert [row.run_id for row in log.home.feedback()] == [run, run]
        rows = await layer.execute_sql("SELECT id, value FROM feedbacks", {})  # type: ignore[attr-defined]
        assert rows == [{"id": feedback_id, "value": 0}]
        assert await layer.delete_feedback(feedback_id)
        assert thumbs(home) == []
        await layer.close()

    asyncio.run(story())


def test_a_bound_message_is_judged_by_its_turn_also_after_a_restart(
    log: agentpref.Log, home: Home, tmp_path: Path
) -> None:
    async def story() -> None:
        init_http_context(thread_id="t")
        layer = feedback_layer(log, stored(tmp_path))
        await layer.update_thread("t", name="lamps")
        run = log.record([QUESTION], "Done.")
        async with Step(name="on_message", type="run") as step:
            message = Message("Done.")
            bind(message, run)
            await layer.create_step(step.to_dict())
            await layer.create_step(message.to_dict())
        await layer.upsert_feedback(Feedback(step.id, 1, threadId="t"))
        again = feedback_layer(log, stored(tmp_path))
        await again.upsert_feedback(Feedback(step.id, 0, threadId="t"))
        assert [(row.run_id, row.score) for row in log.home.feedback()] == [(run, 1), (run, 0)]
        assert thumbs(home) == [False]
        for opened in (layer, again):
            await opened.close()

    asyncio.run(story())


def test_a_thumb_that_only_the_app_knows_is_stored_and_said(
    log: agentpref.Log, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        layer = feedback_layer(log, stored(tmp_path))
        feedback_id = await layer.upsert_feedback(Feedback("welcome", 1))
        await layer.delete_feedback(feedback_id)
        await layer.close()

    with caplog.at_level(logging.WARNING, "agentpref"):
        asyncio.run(story())
    assert "step 'welcome'" in caplog.text
    assert "which is not in the log" in caplog.text
    assert [*log.home.feedback()] == []


def test_a_thumb_on_another_answer_stays_when_one_is_taken_back(
    log: agentpref.Log, home: Home
) -> None:
    async def story() -> None:
        layer = feedback_layer(log)
        for place in ("one", "two"):
            log.record([QUESTION], place, trace_id=place)
        first = await layer.upsert_feedback(Feedback("one", 1))
        await layer.upsert_feedback(Feedback("two", 1))
        await layer.delete_feedback(first)

    asyncio.run(story())
    assert thumbs(home) == [True]


def test_a_turn_is_the_step_that_a_thumb_names() -> None:
    async def story() -> None:
        init_http_context(thread_id="t")
        with pytest.raises(ConfigError, match="call it in on_message"):
            turn()
        async with Step(name="on_message", type="run") as step, Step(name="tool", type="tool"):
            assert turn() == step.id == context.current_run.id

    asyncio.run(story())


def test_without_a_layer_of_the_app_users_log_in_and_have_no_threads(log: agentpref.Log) -> None:
    async def story() -> None:
        layer = feedback_layer(log)
        user = await layer.create_user(User(identifier="ana", metadata={"role": "admin"}))
        assert (user.id, user.metadata) == ("ana", {"role": "admin"})
        assert await layer.get_user("ana") is None
        threads = await layer.list_threads(Pagination(first=10), ThreadFilter(userId="ana"))
        assert threads.to_dict()["data"] == []
        assert await layer.get_thread("t") is None
        with pytest.raises(UnknownRun):
            await layer.upsert_feedback(Feedback("no step", 1, threadId="t"))

    asyncio.run(story())


def test_a_layer_has_everything_that_chainlit_calls(log: agentpref.Log) -> None:
    layer = feedback_layer(log)
    methods = inspect.getmembers(BaseDataLayer, inspect.isfunction)
    assert {name for name, _ in methods if not callable(getattr(layer, name, None))} == set()


def test_a_log_whose_home_is_elsewhere_is_refused_before_anything_is_stored(
    tmp_path: Path,
) -> None:
    with (
        RemoteLog("http://127.0.0.1:9", "ap-key", outbox=tmp_path / "outbox") as remote,
        pytest.raises(ConfigError, match="where the home is"),
    ):
        feedback_layer(remote)


def test_the_lines_of_the_guide_connect_an_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "docs" / "chat-apps.md").read_text(encoding="utf-8")
    section = guide[guide.index("## Chainlit") : guide.index("## Open WebUI")]
    first, second = (fence.text for fence in fences(section) if fence.language == "python")
    monkeypatch.chdir(tmp_path)
    for name in ("data_layer", "on_message"):
        monkeypatch.setattr(config.code, name, None)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(first, names)

    async def story() -> None:
        init_http_context(thread_id="t")
        message = Message("hello", type="user_message")
        chat_context.add(message)  # as the page's socket does
        await config.code.on_message(message)
        names["log"].flush()
        [run] = names["log"].home.runs()
        await config.code.data_layer().upsert_feedback(Feedback(run.trace_id, 1))

    with names["log"] as log:
        asyncio.run(story())
        assert thumbs(log.home) == [True]
        exec(second, names)
        assert config.code.data_layer().engine.url.database == "chat.db"
