"""Open WebUI's own server of ratings and functions, and our receiver, in processes of their own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from agentpref.home import Home

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))  # open_webui_ratings.py

PATIENCE = 150.0
"""Seconds until a server or a row is given up: far more than it takes on a busy machine."""

FUNCTION = Path(__file__).parents[2] / "examples" / "open_webui_function.py"

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


@contextmanager
def served(*command: object, port: int, written: Path) -> Iterator[str]:
    """Run a server until the end of the block; gives its address as soon as it answers."""
    with written.open("ab") as output:
        server = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not _answers(address):
            assert server.poll() is None, written.read_text(encoding="utf-8")
            assert time.monotonic() < end, written.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="session")
def one_open_webui(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of Open WebUI's API, which has the function as an admin pastes it."""
    python = Path(request.config.getoption("--open-webui-python"))
    if not python.exists():
        pytest.exit(f"{python} is not there; run: make test-open-webui", returncode=2)
    port, folder = free_port(), tmp_path_factory.mktemp("open-webui")
    command = (python.absolute(), Path(__file__).with_name("server.py"), folder / "data", port)
    with served(*command, port=port, written=folder / "log") as address:
        base = f"{address}/api/v1"
        with httpx.Client(base_url=base, trust_env=False, timeout=PATIENCE) as client:
            pasted = client.post(
                "/functions/create",
                json={
                    "id": "agentpref",
                    "name": "agentpref feedback",
                    "content": FUNCTION.read_text(encoding="utf-8"),
                    "meta": {"description": "Sends ratings"},
                },
            )
            assert pasted.status_code == 200, pasted.text
            assert pasted.json()["type"] == "event"
            assert pasted.json()["meta"]["manifest"]["required_open_webui_version"] == "0.12.0"
            assert client.post("/functions/id/agentpref/toggle").json()["is_active"]
            yield client


@pytest.fixture
def port() -> int:
    """The port of the receiver."""
    return free_port()


@pytest.fixture
def open_webui(one_open_webui: httpx.Client, port: int) -> httpx.Client:
    """The same, without ratings, and with the function set to send them to the receiver."""
    client = one_open_webui
    valves = {"receiver": f"http://127.0.0.1:{port}/feedback", "token": "secret"}
    client.delete("/evaluations/feedbacks/all").raise_for_status()
    client.post("/functions/id/agentpref/valves/update", json=valves).raise_for_status()
    return client


@pytest.fixture
def start_receiver(home: Home, port: int, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Call it to start the receiver of the home."""
    with ExitStack() as until_the_end:
        command = (sys.executable, "-c", RECEIVER, home.path, port)
        written = tmp_path / "receiver.log"
        yield lambda: until_the_end.enter_context(served(*command, port=port, written=written))


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
