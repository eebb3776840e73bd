"""Clicks thumbs in the page of examples/fastapi_chat.py, as ``uvicorn`` serves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import free_port, logged, thumbs

from agentpref.home import Home
from agentpref.record.deletion.forget import forget_run

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "Turn off the lamp in the hall."


def ask(start_app: Callable[..., str], page: Any, home: Home) -> None:
    """Ask the question in the page of the example, which logs in a home."""
    port = free_port()
    command = ("-m", "uvicorn", "fastapi_chat:app", "--app-dir", EXAMPLES, "--port", port)
    page.goto(start_app(*command, port=port, environment={"AGENTPREF_HOME": str(home.path)}))
    page.locator("#question").fill(QUESTION)
    page.keyboard.press("Enter")


def test_a_thumb_in_the_page_is_recorded_changed_and_taken_back(
    start_app: Callable[..., str], page: Any, home: Home, wait_for: Callable[..., list[Any]]
) -> None:
    ask(start_app, page, home)
    up, down = (page.locator("#answers button", has_text=sign) for sign in "👍👎")
    up.click()
    [liked] = wait_for(1)
    [run], _ = logged(home)
    assert run.prompt.messages == ({"role": "user", "content": QUESTION},)
    assert (liked.run_id, liked.key, liked.score) == (run.run_id, "thumbs", 1.0)
    assert up.get_attribute("class") == "given"

    down.click()
    assert [row.score for row in wait_for(2)] == [1.0, 0.0]
    assert thumbs(home) == [False]

    down.click()
    assert wait_for(3)[-1].key == "retraction"
    assert thumbs(home) == []


def test_a_thumb_that_could_not_be_kept_is_told_and_not_shown_as_given(
    start_app: Callable[..., str], page: Any, home: Home
) -> None:
    ask(start_app, page, home)
    thumb = page.locator("#answers button", has_text="👍")
    thumb.wait_for()
    [run], _ = logged(home)
    forget_run(home, run.run_id)
    with page.expect_event("dialog") as told:
        thumb.click()
    assert "/feedback" in told.value.message
    told.value.accept()
    assert thumb.get_attribute("class") in (None, "")
