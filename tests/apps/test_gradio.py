"""Clicks in a real Gradio chat, in Chromium, and looks for the rows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest
from conftest import free_port, logged
from sessions import ROOT, fences

import agentpref
from agentpref.errors import ConfigError
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.testing import FakeBackend
from agentpref_adapters._chats import NOT_KEPT
from agentpref_adapters.gradio import (
    CORRECTED,
    NOT_AN_ANSWER,
    ChatFeedback,
    chat_interface,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

EXAMPLE = ROOT / "examples" / "gradio_chat.py"


class Reader:
    """A person before a chat: what they do, each step until the page shows it."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def ask(self, question: str, answers: int) -> None:
        """Ask, and wait until as many answers as given are complete."""
        self.box.fill(question)
        self.box.press("Enter")
        self.wait(answers)

    def wait(self, answers: int) -> None:
        self.button("Like").nth(answers - 1).wait_for()
        writing = ".pending, .generating, [data-testid=stop-button]"
        self.page.wait_for_function("what => !document.querySelector(what)", arg=writing)

    @property
    def box(self) -> Locator:
        return self.page.locator("textarea").last

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=re.compile(f"^{name}d?$"))

    def click(self, name: str, nth: int = -1) -> None:
        self.button(name).nth(nth).click()

    def edit(self, nth: int, text: str) -> None:
        """Edit the message in place ``nth`` of all, questions too."""
        self.button("Edit").nth(nth).click()
        self.page.locator("textarea.edit-textarea").fill(text)
        self.page.get_by_role("button", name="Submit", exact=True).first.click()

    def box_has(self, text: str) -> None:
        self.page.wait_for_function(
            "t => [...document.querySelectorAll('textarea')].pop().value == t", arg=text
        )

    def is_cleared(self) -> None:
        self.page.wait_for_function("!document.querySelector('.message')")

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()


Counting = Callable[[str, Any], str]


@pytest.fixture
def counted() -> Counting:
    """Answers "answer 1", "answer 2", … whatever is asked; a stream asks the fake twice."""
    numbers = itertools.count(2)
    return lambda revision, request: f"answer {next(numbers) // 2}"


@pytest.fixture
def log(home: Home) -> Iterator[agentpref.Log]:
    with agentpref.Log(home.path) as log:
        yield log


@pytest.fixture
def chat(home: Home, log: agentpref.Log, counted: Counting) -> Iterator[agentpref.Chat]:
    registry = agentpref.Registry(home)
    with agentpref.Router(registry, FakeBackend(counted)) as router:
        yield agentpref.Chat(log, router, model="fake")


@contextmanager
def launched(demo: gr.Blocks, **options: Any) -> Iterator[str]:
    _, address, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, server_port=free_port(), **options
    )
    try:
        yield address
    finally:
        demo.close()


@pytest.fixture
def open_chat(page: Page) -> Iterator[Callable[..., Reader]]:
    """Call ``open_chat(demo)`` for a reader before it."""
    with contextmanagers() as enter:

        def start(demo: gr.Blocks, **options: Any) -> Reader:
            page.goto(enter(launched(demo, **options)))
            return Reader(page)

        yield start


@contextmanager
def contextmanagers() -> Iterator[Callable[[Any], Any]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield stack.enter_context


def pairs(home: Home) -> list[tuple[Any, Any]]:
    """The answers of each pair, the chosen one first."""
    with closing(connect(home, readonly=True)) as connection:
        found = read_examples(Store(connection), "default", held_out=0).pairs
    return [tuple(one.message["content"] for one in pair.completions) for pair in found]


def test_a_thumb_reaches_its_run_and_one_taken_back_is_withdrawn(
    home, log, chat, open_chat, wait_for
) -> None:
    reader = open_chat(chat_interface(chat, system="Be brief."))
    reader.ask("hello", 1)
    reader.ask("and then?", 2)
    reader.click("Like", 0)
    wait_for(1)
    reader.click("Dislike", 0)
    wait_for(2)
    reader.click("Dislike", 0)
    said = wait_for(3)
    first, second = logged(home)[0]
    assert [(row.run_id, row.key, row.score) for row in said] == [
        (first.run_id, "thumbs", 1.0),
        (first.run_id, "thumbs", 0.0),
        (first.run_id, "retraction", None),
    ]
    assert [m["content"] for m in second.prompt.messages] == [
        "Be brief.", "hello", "answer 1", "and then?",
    ]  # fmt: skip
    assert first.thread_id == second.thread_id is not None
    reader.click("Like", 1)
    assert wait_for(4)[-1].run_id == second.run_id


def test_a_disliked_answer_and_a_liked_retry_make_a_pair(home, chat, open_chat, wait_for) -> None:
    reader = open_chat(chat_interface(chat))
    reader.ask("hello", 1)
    reader.click("Dislike")
    wait_for(1)
    reader.click("Retry")
    reader.sees("answer 2")
    again = wait_for(2)[-1]
    first, second = logged(home)[0]
    assert (again.run_id, again.key, again.score) == (first.run_id, "asked_again", 0.0)
    assert again.value == {"run_id": second.run_id}
    reader.wait(1)
    reader.click("Like")
    assert wait_for(3)[-1].run_id == second.run_id
    assert pairs(home) == [("answer 2", "answer 1")]


def test_a_liked_retry_alone_makes_a_pair_only_where_the_app_declares_it(
    home, log, chat, open_chat, wait_for
) -> None:
    reader = open_chat(chat_interface(chat))
    reader.ask("hello", 1)
    reader.click("Undo")
    reader.is_cleared()
    reader.box_has("hello")
    reader.box.press("Enter")
    reader.wait(1)
    wait_for(1)
    reader.click("Like")
    wait_for(2)
    assert pairs(home) == []
    log.declare("asked_again")
    assert pairs(home) == [("answer 2", "answer 1")]


def test_an_edited_answer_is_a_correction_and_the_chat_goes_on_from_it(
    home, log, chat, open_chat, wait_for
) -> None:
    reader = open_chat(chat_interface(chat))
    reader.ask("hello", 1)
    reader.ask("and then?", 2)
    reader.edit(1, "a better answer")
    corrected = wait_for(1)[-1]
    first, second = logged(home)[0]
    assert corrected.run_id == first.run_id
    assert corrected.correction == {"role": "assistant", "content": "a better answer"}
    assert pairs(home) == [("a better answer", "answer 1")]

    reader.click("Like", 1)  # the answer below is still found
    assert wait_for(2)[-1].run_id == second.run_id
    reader.click("Like", 0)
    reader.sees(CORRECTED)
    reader.ask("third", 3)
    assert log.flush()
    assert [m["content"] for m in logged(home)[0][-1].prompt.messages][1] == "a better answer"
    reader.sees("a better answer")

    reader.edit(1, "answer 1")
    assert wait_for(3)[-1].key == "retraction"
    assert pairs(home) == []


def test_an_edited_question_goes_back_to_the_text_box(home, log, chat, open_chat) -> None:
    reader = open_chat(chat_interface(chat))
    reader.ask("hello", 1)
    reader.edit(0, "hello again")
    reader.is_cleared()
    reader.box_has("hello again")
    reader.box.press("Enter")
    reader.wait(1)
    assert log.flush()
    runs, feedback = logged(home)
    assert [run.prompt.messages[-1]["content"] for run in runs] == ["hello", "hello again"]
    assert feedback == []


def test_two_people_who_get_the_same_answer_judge_a_run_each(
    home, log, browser: Browser, wait_for
) -> None:
    with (
        agentpref.Router(agentpref.Registry(home), FakeBackend()) as router,
        launched(
            chat_interface(agentpref.Chat(log, router)), auth=[("ana", "a"), ("bo", "b")]
        ) as url,
    ):
        readers = []
        for name in ("ana", "bo"):
            reader = Reader(browser.new_context().new_page())
            reader.page.goto(url)
            boxes = reader.page.locator("input")
            boxes.nth(0).fill(name)
            boxes.nth(1).fill(name[0])
            reader.page.get_by_role("button", name="Login").click()
            reader.ask("hello", 1)
            readers.append(reader)
        readers[0].click("Like")
        wait_for(1)
        readers[1].click("Dislike")
        said = wait_for(2)
        for reader in readers:
            reader.page.context.close()
    runs = logged(home)[0]
    assert [(row.run_id, row.score) for row in said] == [
        (runs[0].run_id, 1.0),
        (runs[1].run_id, 0.0),
    ]
    assert [row.user_id for row in said] == [run.user_id for run in runs]
    assert runs[0].user_id != runs[1].user_id


@pytest.fixture
def recorded(log: agentpref.Log):
    """An answer function of an app's own, which records its runs and shows a thought first."""
    feedback, numbers = ChatFeedback(log), itertools.count(1)

    def answer(message: str, history: list[Any]):
        if message == "not recorded":
            return "nothing"
        text = f"**own** answer {next(numbers)}"
        run = log.record([{"role": "user", "content": message}], text)
        feedback.note(run, [*history, message], text)
        if message == "example":  # Gradio caches no list of messages
            return text
        return [gr.ChatMessage("I wonder", metadata={"title": "Thinking"}), text]

    return feedback, answer


def test_an_app_of_its_own_notes_its_runs_and_thoughts_do_not_hide_the_answer(
    home, recorded, open_chat, wait_for, tmp_path
) -> None:
    feedback, answer = recorded
    demo = gr.ChatInterface(
        answer,
        flagging_mode="manual",
        flagging_options=["Like", "Dislike", "Spam"],
        flagging_dir=str(tmp_path / "flagged"),
    )
    feedback.connect(demo)
    reader = open_chat(demo)
    reader.ask("hello", 1)
    reader.ask("more", 2)
    reader.click("Like", 1)
    wait_for(1)
    reader.page.get_by_label("Feedback", exact=False).last.click()
    reader.page.get_by_text("Spam").last.click()
    said = wait_for(3)
    _, second = logged(home)[0]
    assert {row.run_id for row in said} == {second.run_id}
    assert [(row.key, row.value) for row in said] == [
        ("thumbs", None),
        ("retraction", {"key": "thumbs"}),
        ("flag", "Spam"),
    ]
    reader.ask("not recorded", 3)
    reader.click("Like", 2)
    reader.sees(NOT_AN_ANSWER)
    assert len(wait_for(3)) == 3


def test_a_chat_loaded_from_the_history_is_judged_by_its_own_runs(
    home, chat, open_chat, wait_for
) -> None:
    reader = open_chat(chat_interface(chat, save_history=True))
    reader.ask("hello", 1)
    saved = reader.page.get_by_role("row").filter(has_text="hello")
    saved.first.wait_for()
    reader.page.get_by_role("button", name="New chat").click()
    reader.is_cleared()
    reader.ask("hello", 1)
    reader.sees("answer 2")
    saved.nth(1).wait_for()
    saved.last.click()
    reader.sees("answer 1")
    reader.wait(1)
    reader.click("Like")
    said = wait_for(2)
    assert said[-1].run_id == logged(home)[0][0].run_id


def test_a_chatbot_in_blocks_of_its_own_is_connected_inside_them(
    home, log, open_chat, wait_for
) -> None:
    feedback = ChatFeedback(log)

    def answer(question: str, history: list[Any]):
        asked = [*history, {"role": "user", "content": question}]
        run = log.record([{"role": "user", "content": question}], "yes")
        feedback.note(run, asked, "yes")
        return [*asked, {"role": "assistant", "content": "yes"}]

    with gr.Blocks() as demo:
        chatbot = gr.Chatbot(editable="all")
        box = gr.Textbox()
        box.submit(answer, [box, chatbot], chatbot)
        feedback.connect(chatbot)
    reader = open_chat(demo)
    reader.ask("hello", 1)
    reader.click("Like")
    wait_for(1)
    reader.edit(1, "no")
    said = wait_for(2)
    [run] = logged(home)[0]
    assert [(row.run_id, row.key) for row in said] == [
        (run.run_id, "thumbs"),
        (run.run_id, "correction"),
    ]


def test_a_log_that_cannot_be_written_is_said_and_the_chat_goes_on(
    home, log, recorded, open_chat
) -> None:
    feedback, answer = recorded
    demo = gr.ChatInterface(answer)
    feedback.connect(demo)
    reader = open_chat(demo)
    reader.ask("hello", 1)
    log.close()
    reader.click("Like")
    reader.sees(NOT_KEPT)
    reader.ask("not recorded", 2)


def test_an_example_that_was_cached_before_any_session_can_be_judged(
    home, recorded, open_chat, wait_for, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where Gradio caches
    feedback, answer = recorded
    demo = gr.ChatInterface(answer, examples=["example"], cache_examples=True)
    feedback.connect(demo)
    reader = open_chat(demo)
    reader.page.get_by_text("example", exact=True).last.click()
    reader.wait(1)
    reader.click("Like")
    assert wait_for(1)[0].run_id == logged(home)[0][0].run_id


def test_the_oldest_answers_are_forgotten_first(monkeypatch) -> None:
    monkeypatch.setattr("agentpref_adapters.gradio.MAX_ANSWERS", 2)
    feedback = ChatFeedback(None)
    for name in ("a", "b", "c"):
        feedback.note(name, ["hello"], f"answer {name}", request=gr.Request(session_hash=name))
    shown = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]

    def found(name: str) -> bool:
        shown[1]["content"] = f"answer {name}"
        return feedback._judged(shown, 1, gr.Request(session_hash=name)) is not None

    assert [found(name) for name in ("a", "b", "c")] == [False, True, True]


def test_settings_that_would_lose_feedback_are_refused(chat) -> None:
    with pytest.raises(ConfigError, match="leave editable=True out"):
        chat_interface(chat, editable=True)
    with pytest.raises(ConfigError, match="takes no multimodal"):
        chat_interface(chat, multimodal=True)


def test_the_lines_of_the_guide_connect_a_chat(tmp_path, monkeypatch, open_chat, wait_for) -> None:
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    guide = (ROOT / "docs" / "chat-apps.md").read_text(encoding="utf-8")
    section = guide[guide.index("## Gradio") : guide.index("## Streamlit")]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    first, second = (fence.text for fence in fences(section) if fence.language == "python")
    exec(first.replace("./.agentpref", "home"), names)
    assert isinstance(names["demo"], gr.ChatInterface)
    exec(second, names)
    with names["log"], names["router"]:
        reader = open_chat(names["demo"])
        reader.ask("hello", 1)
        reader.click("Like")
        assert wait_for(1)[0].score == 1.0


def test_the_example_starts_with_one_command(home, page: Page, start_app, wait_for) -> None:
    port = free_port()
    page.goto(
        start_app(EXAMPLE, home.path, port=port, environment={"GRADIO_SERVER_PORT": str(port)})
    )
    reader = Reader(page)
    reader.ask("Turn off the lamp in the hall.", 1)
    reader.click("Like")
    said = wait_for(1)
    [run] = logged(home)[0]
    assert (said[0].run_id, said[0].score) == (run.run_id, 1.0)
    assert run.revision == "base"
    assert run.metadata["finish_reason"] in ("stop", "length")
