"""Clicks thumbs in the page of examples/chainlit_chat.py, as ``chainlit run`` serves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import free_port, logged, thumbs

from agentpref.home import Home

EXAMPLE = Path(__file__).parents[2] / "examples" / "chainlit_chat.py"
QUESTION = "Turn off the lamp in the hall."


def test_a_thumb_in_the_page_is_recorded_changed_and_taken_back(
    start_app: Callable[..., str],
    page: Any,
    home: Home,
    tmp_path: Path,
    wait_for: Callable[..., list[Any]],
) -> None:
    port = free_port()
    command = ("-m", "chainlit", "run", EXAMPLE, "--headless", "--port", port)
    where = {"AGENTPREF_HOME": str(home.path), "CHAINLIT_APP_ROOT": str(tmp_path)}
    page.goto(start_app(*command, port=port, environment=where))
    page.locator("#chat-input").press_sequentially(QUESTION)
    page.keyboard.press("Enter")
    page.locator("button.positive-feedback-off").last.click()
    page.get_by_placeholder("Your feedback").fill("just right")
    page.get_by_text("Submit feedback").click()
    [up] = wait_for(1)
    [run], _ = logged(home)
    assert run.prompt.messages == ({"role": "user", "content": QUESTION},)
    assert (up.run_id, up.key, up.score, up.comment) == (run.run_id, "thumbs", 1.0, "just right")

    page.locator("button.negative-feedback-off").last.click()
    page.get_by_text("Submit feedback").click()
    assert [row.score for row in wait_for(2)] == [1.0, 0.0]
    assert thumbs(home) == [False]

    page.locator("button.negative-feedback-on").last.click()
    assert wait_for(3)[-1].key == "retraction"
    assert thumbs(home) == []
