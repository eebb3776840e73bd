"""Clicks in Streamlit's pages, with its own driver and once in Chromium, and looks for the rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from conftest import PATIENCE, free_port, logged
from sessions import ROOT, fences
from streamlit.testing.v1 import AppTest

import agentpref
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.testing import FakeBackend
from agentpref_adapters._chats import NOT_KEPT

if TYPE_CHECKING:
    from playwright.sync_api import Page

EXAMPLE = ROOT / "examples" / "streamlit_chat.py"


@pytest.fixture
def log(home: Home) -> Iterator[agentpref.Log]:
    with agentpref.Log(home.path) as log:
        yield log


@pytest.fixture
def chat(home: Home, log: agentpref.Log) -> Iterator[agentpref.Chat]:
    """Answers "answer 1", "answer 2", … whatever is asked; a stream asks the fake twice."""
    numbers = itertools.count(2)
    fake = FakeBackend(lambda revision, request: f"answer {next(numbers) // 2}")
    with agentpref.Router(agentpref.Registry(home), fake) as router:
        yield agentpref.Chat(log, router, model="fake")


@pytest.fixture
def open_page(chat: agentpref.Chat) -> Callable[..., AppTest]:
    """Call it for the page of a new reader."""

    def page(chat) -> None:
        from agentpref_adapters.streamlit import chat_page

        chat_page(chat, system="Be brief.")

    def start(**user: str) -> AppTest:
        app = AppTest.from_function(page, args=(chat,), default_timeout=PATIENCE)
        app.user = user
        return app.run()

    return start


def ask(app: AppTest, question: str) -> None:
    app.chat_input[0].set_value(question).run()
    assert not app.exception


def shown(app: AppTest) -> list[str]:
    return [message.markdown[0].value for message in app.chat_message]


def pairs(home: Home) -> list[tuple[Any, Any]]:
    """The answers of each pair, the chosen one first."""
    with closing(connect(home, readonly=True)) as connection:
        found = read_examples(Store(connection), "default", held_out=0).pairs
    return [tuple(one.message["content"] for one in pair.completions) for pair in found]


def test_a_thumb_reaches_its_run_and_one_taken_back_is_withdrawn(home, open_page, log) -> None:
    app = open_page(email="ana@example.org")
    ask(app, "hello")
    ask(app, "and then?")
    assert shown(app) == ["hello", "answer 1", "and then?", "answer 2"]
    for value in (0, 1, None):
        app.feedback[0].set_value(value).run()
    app.feedback[1].set_value(0).run()
    (first, second), said = logged(home)
    assert [(row.run_id, row.key, row.score) for row in said] == [
        (first.run_id, "thumbs", 0.0),
        (first.run_id, "thumbs", 1.0),
        (first.run_id, "retraction", None),
        (second.run_id, "thumbs", 0.0),
    ]
    assert {row.user_id for row in said} == {first.user_id} != {None}
    assert [m["content"] for m in second.prompt.messages] == [
        "Be brief.", "hello", "answer 1", "and then?",
    ]  # fmt: skip
    assert first.thread_id == second.thread_id is not None


def test_a_disliked_answer_and_a_liked_retry_make_a_pair(home, open_page) -> None:
    app = open_page()
    ask(app, "hello")
    app.feedback[0].set_value(0).run()
    app.button(key="agentpref-retry").click().run()
    assert shown(app) == ["hello", "answer 2"]
    assert app.feedback[0].value is None
    app.feedback[0].set_value(1).run()
    (first, second), (_, again, liked) = logged(home)
    assert (again.run_id, again.key, again.score) == (first.run_id, "asked_again", 0.0)
    assert again.value == {"run_id": second.run_id}
    assert liked.run_id == second.run_id
    assert pairs(home) == [("answer 2", "answer 1")]


def save(app: AppTest, text: str) -> None:
    app.text_area[0].set_value(text)
    next(button for button in app.button if button.label == "Save").click().run()
    assert not app.exception


def test_an_edited_answer_is_a_correction_and_the_chat_goes_on_from_it(
    home, open_page, log
) -> None:
    app = open_page()
    ask(app, "hello")
    save(app, "a better answer")
    [run], [corrected] = logged(home)
    assert (corrected.run_id, corrected.correction["content"]) == (run.run_id, "a better answer")
    assert shown(app) == ["hello", "a better answer"]
    assert app.feedback[0].proto.disabled
    ask(app, "and then?")
    assert log.flush()
    assert logged(home)[0][-1].prompt.messages[2]["content"] == "a better answer"
    assert pairs(home) == [("a better answer", "answer 1")]

    save(app, "answer 1")
    assert logged(home)[1][-1].key == "retraction"
    assert pairs(home) == []
    assert not app.feedback[0].proto.disabled


def test_two_people_judge_a_run_each(home, open_page) -> None:
    ana, bo = open_page(sub="1"), open_page(sub="2")
    ask(ana, "hello")
    ask(bo, "hello")
    ana.feedback[0].set_value(1).run()
    bo.feedback[0].set_value(0).run()
    runs, said = logged(home)
    assert [(row.run_id, row.score) for row in said] == [
        (runs[0].run_id, 1.0),
        (runs[1].run_id, 0.0),
    ]
    assert runs[0].thread_id != runs[1].thread_id
    assert len({row.user_id for row in said}) == 2


def test_an_app_of_its_own_shows_the_bar_below_what_has_a_run(home, log) -> None:
    def page(log, run) -> None:
        import streamlit as st

        from agentpref_adapters.streamlit import feedback_bar

        answers = [{"content": "not recorded"}, {"content": "yes", "run_id": run}]
        for message in st.session_state.setdefault("messages", answers):
            st.markdown(message["content"])
            feedback_bar(log, message, edit=False, user_id="u1")

    run = log.record([{"role": "user", "content": "hello"}], "yes")
    app = AppTest.from_function(page, args=(log, run), default_timeout=PATIENCE).run()
    assert (len(app.feedback), len(app.text_area)) == (1, 0)
    app.feedback[0].set_value(1).run()
    [said] = logged(home)[1]
    assert (said.run_id, said.score) == (run, 1.0)


def test_a_log_that_cannot_be_written_is_said_and_the_page_goes_on(log, open_page) -> None:
    app = open_page()
    ask(app, "hello")
    log.close()
    app.feedback[0].set_value(1).run()
    assert [toast.value for toast in app.toast] == [NOT_KEPT]
    ask(app, "and then?")
    assert shown(app)[-1] == "answer 2"


def test_the_lines_of_the_guide_make_a_page_and_a_bar(home, log, monkeypatch) -> None:
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    guide = (ROOT / "docs" / "chat-apps.md").read_text(encoding="utf-8")
    section = guide[guide.index("## Streamlit") :].split("\n## ")[0]
    page, bar = (fence.text for fence in fences(section) if fence.language == "python")

    app = AppTest.from_string(
        page.replace("./.agentpref", str(home.path)), default_timeout=PATIENCE
    ).run()
    ask(app, "Turn off the lamp in the hall.")
    app.feedback[0].set_value(1).run()
    [run], [said] = logged(home)
    assert (said.run_id, said.score) == (run.run_id, 1.0)

    mine = "import streamlit as st\nlog = st.session_state.log\n"
    app = AppTest.from_string(mine + bar, default_timeout=PATIENCE)
    app.session_state["log"] = log
    app.session_state["messages"] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes", "run_id": run.run_id},
    ]
    app.run()
    assert not app.exception
    app.feedback[0].set_value(0).run()
    assert [row.score for row in logged(home)[1]] == [1.0, 0.0]


def test_the_example_starts_with_one_command(home, page: Page, start_app, wait_for) -> None:
    port = free_port()
    command = ("-m", "streamlit", "run", EXAMPLE, "--server.port", port, "--", home.path)
    page.goto(start_app(*command, port=port))
    box = page.locator("textarea")
    box.fill("Turn off the lamp in the hall.")
    box.press("Enter")
    up, down = (page.get_by_label(f"Thumbs {side}", exact=True) for side in ("up", "down"))
    up.click()
    assert wait_for(1)[0].score == 1.0
    up.click()
    wait_for(2)
    down.click()
    said = wait_for(3)
    [run] = logged(home)[0]
    assert [(row.run_id, row.key, row.score) for row in said] == [
        (run.run_id, "thumbs", 1.0),
        (run.run_id, "retraction", None),
        (run.run_id, "thumbs", 0.0),
    ]
    assert run.revision == "base"
