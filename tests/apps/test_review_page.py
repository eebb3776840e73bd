"""A person compares answers on the review page by keyboard alone, in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentpref.home import Home
from agentpref.record.log import Log

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def home(tmp_path: Path) -> Home:
    with Log(tmp_path / "home") as log:
        for number in range(25):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            for text in (f"Yes, {number}.", "<script>document.title = 'run'</script> *No.*"):
                log.record(asked, text)
    return Home.open(tmp_path / "home")


@pytest.fixture
def address(home: Home) -> Iterator[str]:
    """Where ana's page is."""
    yield from served(home, "--annotator", "ana")


@pytest.fixture
def owners_address(home: Home) -> Iterator[str]:
    """Where the page of an owner is."""
    yield from served(home, "--owner", "olga")


def served(home: Home, *who: str) -> Iterator[str]:
    command = [sys.executable, "-m", "agentpref_cli", "review", "--home", str(home.path)]
    command += ["--port", "0", *who]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http\S+", process.stdout.readline())
        assert found is not None
        yield found[0]
        process.terminate()


def test_twenty_pairs_are_labelled_by_keyboard(home: Home, page: Page, address: str) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    for number in range(20):
        page.keyboard.press("12tb"[number % 4])
        page.locator(".progress", has_text=f" {number + 1} answered").wait_for()
    page.keyboard.press("u")
    page.locator(".progress", has_text=" 19 answered").wait_for()
    page.locator("#comment").fill("it answers 1 and 2")  # keys that are typed click nothing
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.locator(".progress", has_text=" 20 answered").wait_for()
    rows = [*home.comparisons()]
    assert len(rows) == 21  # one was taken back, and stays as history
    assert Counter(row.comment for row in rows)["it answers 1 and 2"] == 1
    assert "run" not in page.title()
    assert said == []  # no script was blocked, because none was there


@pytest.mark.parametrize("width", [1200, 390])
def test_no_page_has_what_axe_objects_to(
    home: Home, page: Page, owners_address: str, width: int
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 800})
    page.goto(owners_address)
    base = owners_address.partition("/login")[0]
    run = next(iter(home.runs())).run_id
    for path in ("/", "/runs", f"/runs/{run}", "/updates", "/revisions", "/people"):
        page.goto(base + path)
        found = Axe().run(page).response["violations"]
        assert [(path, one["id"]) for one in found] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), path
