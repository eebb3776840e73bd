"""Open WebUI's own server of ratings and functions, and our receiver, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from agentpref.home import Home

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))  # open_webui_ratings.py

PATIENCE = 60.0
"""Seconds until a server or a row is given up: far more than it takes on a busy machine."""

RECEIVER = """
import sys, agentpref, uvicorn
from agentpref_adapters.open_webui import receiver
log = agentpref.Log(sys.argv[1])
uvicorn.run(receiver(log, token="secret"), port=int(sys.argv[2]), log_level="warning")
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests be told where Open WebUI is."""
    parser.addoption(
        "--open-webui-python",
        default=".venv-open-webui/bin/python",
        help="the interpreter that has Open WebUI",
    )


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home."""
    return Home.create(tmp_path / "home")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Call ``start("python", "program.py", port=…)``; gives the address as soon as it answers."""
    running: list[subprocess.Popen[bytes]] = []
    written = tmp_path / "servers.log"

    def begin(*command: object, port: int) -> str:
        with written.open("ab") as output:
            server = subprocess.Popen(
                [*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=os.environ
            )
        running.append(server)
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not _answers(address):
            assert server.poll() is None, written.read_text(encoding="utf-8")
            assert time.monotonic() < end, written.read_text(encoding="utf-8")
            time.sleep(0.2)
        return address

    yield begin
    for server in running:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def open_webui(
    request: pytest.FixtureRequest, start: Callable[..., str], tmp_path: Path
) -> Iterator[httpx.Client]:
    """A client of Open WebUI's API."""
    python = Path(request.config.getoption("--open-webui-python"))
    if not python.exists():
        pytest.exit(f"{python} is not there; run: make test-open-webui", returncode=2)
    port = free_port()
    server = Path(__file__).with_name("server.py")
    address = start(python.absolute(), server, tmp_path / "open-webui", port, port=port)
    with httpx.Client(base_url=f"{address}/api/v1", trust_env=False, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def port() -> int:
    """The port of the receiver."""
    return free_port()


@pytest.fixture
def start_receiver(start: Callable[..., str], home: Home, port: int) -> Callable[[], str]:
    """Call it to start the receiver of the home."""
    return lambda: start(sys.executable, "-c", RECEIVER, home.path, port, port=port)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code < 500
    except httpx.TransportError:
        return False
