"""What the tests of chat apps share: a browser, apps in their own processes, what was logged.

Each test clicks in the real framework, and then looks for the rows. A browser lives for one module:
while Playwright runs, the thread of the tests has an event loop, and can start no other.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.types import Feedback, Run

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))  # for sessions, which reads guides

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",  # which needs rights that root in a container has not
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120.0
"""Seconds until a page or a row is given up: far more than either takes on a busy machine."""

# Nothing that an app of the tests does leaves this machine.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    "STREAMLIT_SERVER_HEADLESS": "true",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests be told which browser to use."""
    parser.addoption("--chromium", help=f"the browser; by default the first of {', '.join(NAMES)}")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors where they are ours: the frameworks have some of their own."""
    for line in ("default", "error:::agentpref"):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    program = request.config.getoption("--chromium") or next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty tab, as of a person of its own."""
    with closing(browser.new_context()) as context:
        context.set_default_timeout(PATIENCE * 1000)
        yield context.new_page()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home."""
    return Home.create(tmp_path / "home")


def logged(home: Home, namespace: str = "default") -> tuple[list[Run], list[Feedback]]:
    """The runs and the feedback of a home, oldest first."""
    with closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        return list(store.runs(namespace)), list(store.feedback(namespace))


def thumbs(home: Home) -> list[bool]:
    """The lone thumbs that an update would see: those that count, and were not taken back."""
    with closing(connect(home, readonly=True)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.0).examples
    return [example.completions[0].label == 1 for example in found if example.lone]


@pytest.fixture
def wait_for(home: Home) -> Callable[..., list[Feedback]]:
    """Call ``wait_for(2)`` for the feedback of the home as soon as there are two rows of it."""

    def wait(count: int, namespace: str = "default") -> list[Feedback]:
        end = time.monotonic() + PATIENCE
        while len(rows := logged(home, namespace)[1]) < count and time.monotonic() < end:
            time.sleep(0.05)
        assert len(rows) == count
        return rows

    return wait


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start_app(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Call ``start_app("-m", "module", …, port=port)``: Python runs it until the test ends.

    Gives the app's address once it answers. ``environment`` is added to that of the tests.
    """
    started: list[subprocess.Popen[bytes]] = []
    written = tmp_path / "app.log"

    def start(*command: object, port: int, environment: dict[str, str] | None = None) -> str:
        with written.open("ab") as output:
            app = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env=os.environ | (environment or {}),
            )
        started.append(app)
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not _answers(address):
            assert app.poll() is None, written.read_text(encoding="utf-8")
            assert time.monotonic() < end, written.read_text(encoding="utf-8")
            time.sleep(0.1)
        return address

    yield start
    for app in started:
        app.terminate()
        try:
            app.wait(timeout=10)
        except subprocess.TimeoutExpired:
            app.kill()
            app.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code < 500
    except httpx.TransportError:
        return False
