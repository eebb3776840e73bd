"""Supervision, tried on a small server that does what it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from agentpref.errors import EngineFailed
from agentpref_adapters._server_process import (
    Patience,
    ServerProcess,
    answers,
    free_port,
    require_free,
    telling_lines,
)

STAND_IN = Path(__file__).with_name("stand_in_server.py")
SHORT = Patience(start=60, grace=5, lasting=3600, deaths=3, pause=0.01)


@pytest.fixture
def server(tmp_path: Path):
    """Call ``server("brief", patience=…)`` for a supervised stand-in; all are ended afterwards."""
    made: list[ServerProcess] = []

    def make(*how: str, patience: Patience = SHORT, tell=lambda event: None) -> ServerProcess:
        port = free_port("127.0.0.1")
        command = [sys.executable, str(STAND_IN), str(port), str(tmp_path), *how]
        url, log = f"http://127.0.0.1:{port}", tmp_path / "logs" / "server.log"
        one = ServerProcess(command, os.environ, url=url, log=log, patience=patience, tell=tell)
        made.append(one)
        return one

    yield make
    for one in made:
        one.stop()


def running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody waited for has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def gone(*processes: int) -> bool:
    """Wait for processes to end, for as long as a slow machine may need."""
    limit = time.monotonic() + 60
    while any(map(running, processes)) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(map(running, processes))


def die(server: ServerProcess) -> None:
    with pytest.raises(OSError):  # noqa: PT011  # it answers no more
        urllib.request.urlopen(server.url + "/die", data=b"", timeout=60)


def test_it_answers_once_started_and_nothing_of_it_is_left_afterwards(server, tmp_path) -> None:
    one = server()
    with one:
        assert answers(one.url)
        main, helper = pids(tmp_path)
        assert running(main)
        assert running(helper)
    assert not answers(one.url)
    assert not running(main)
    assert not running(helper), "a helper must not outlive its server"


def test_what_it_writes_is_in_the_log_and_the_log_before_is_kept(server, tmp_path) -> None:
    one = server()
    one.log.parent.mkdir()
    one.log.write_text("the run before")
    with one:
        assert one.log.read_text().startswith("starting up")
        assert one.log.stat().st_mode & 0o077 == 0
    assert one.log.with_name("server.log.1").read_text() == "the run before"


def test_a_request_to_end_that_is_ignored_is_not_repeated(server, tmp_path) -> None:
    one = server("stubborn", patience=Patience(grace=0.2))
    with one:
        held = pids(tmp_path)
    assert gone(*held)


def test_one_that_fails_is_not_started_again_and_its_log_is_quoted(server, tmp_path) -> None:
    one = server("fails")
    with pytest.raises(EngineFailed, match="exit code 1") as refusal:
        one.start()
    assert one.starts == 1
    words = str(refusal.value)
    assert "ValueError: not enough memory for the weights | RuntimeError" in words
    assert "starting up" not in words
    assert words.endswith(f"read {one.log}, repair that, and start it again")


def test_one_that_never_answers_is_ended_when_patience_is(server, tmp_path) -> None:
    one = server("silent", patience=Patience(start=1, grace=5))
    with pytest.raises(EngineFailed, match=r"did not answer at http://127.* within 1 s"):
        one.start()
    if (tmp_path / "pids").exists():  # where it came that far
        assert gone(*pids(tmp_path))


def test_a_program_that_is_not_there_is_said(tmp_path) -> None:
    url, log = f"http://127.0.0.1:{free_port('127.0.0.1')}", tmp_path / "log"
    one = ServerProcess([str(tmp_path / "nothing")], {}, url=url, log=log)
    with pytest.raises(EngineFailed, match="nothing"):
        one.start()


def test_whoever_has_the_port_is_not_mistaken_for_the_server(server) -> None:
    with server() as one, pytest.raises(EngineFailed, match="choose another port"):
        require_free(one.url)
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        two = ServerProcess(["true"], {}, url=url, log=Path("unused"))
        with pytest.raises(EngineFailed, match="end what listens there"):
            two.start()
        assert two.starts == 0


def test_one_that_dies_is_started_again(server, tmp_path) -> None:
    events = []
    ready = threading.Semaphore(0)

    def tell(event) -> None:
        events.append(event)
        if event.what == "ready":
            ready.release()

    one = server(tell=tell)
    with one:
        assert ready.acquire(timeout=60)
        first = pids(tmp_path)
        die(one)
        assert ready.acquire(timeout=60)
        assert answers(one.url)
        assert not any(map(running, first)), "the helper of the dead one was ended too"
    assert [event.what for event in events] == ["ready", "died", "ready"]
    assert "died (exit code 9)" in events[1].words
    assert one.failure is None
    assert one.starts == 2


def test_one_that_dies_again_and_again_is_given_up(server) -> None:
    given_up = threading.Event()
    events = []

    def tell(event) -> None:
        events.append(event.what)
        if event.what == "gave_up":
            given_up.set()

    one = server("brief", tell=tell)
    one.start()
    assert given_up.wait(60)
    assert events == ["ready", "died", "ready", "died", "ready", "gave_up"]
    assert "died (exit code 7)" in str(one.failure)
    assert "(3 times in a row)" in str(one.failure)


def test_deaths_after_a_long_life_are_not_added_up(server) -> None:
    calls = threading.Semaphore(0)
    one = server(
        "brief",
        patience=Patience(lasting=-1, deaths=2, pause=0.01),
        tell=lambda event: calls.release(),
    )
    with one:
        for _ in range(6):
            assert calls.acquire(timeout=60)
        assert one.failure is None


def test_stopping_one_that_is_still_starting(server, tmp_path) -> None:
    one = server("silent")
    threading.Thread(target=lambda: (_until(tmp_path / "pids"), one.stop())).start()
    one.start()  # returns, since nobody waits for it any more
    assert gone(*pids(tmp_path))


def _until(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


KEEPER = """
import os, sys, time
from pathlib import Path
from agentpref_adapters._server_process import ServerProcess
port, folder = sys.argv[1:3]
command = [sys.executable, *sys.argv[3:], port, folder]
log = Path(folder, "log")
ServerProcess(command, os.environ, url=f"http://127.0.0.1:{port}", log=log).start()
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_no_server_outlives_the_process_that_keeps_it(tmp_path, signum) -> None:
    port = str(free_port("127.0.0.1"))
    command = [sys.executable, "-c", KEEPER, port, str(tmp_path), str(STAND_IN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout.readline() == b"started\n"
        held = pids(tmp_path)
        assert all(map(running, held))
        keeper.send_signal(signum)
    assert gone(*held)


def test_a_killed_guard_takes_the_server_with_it_and_another_is_started(server, tmp_path) -> None:
    ready = threading.Semaphore(0)
    one = server(tell=lambda event: event.what == "ready" and ready.release())
    with one:
        assert ready.acquire(timeout=60)
        held = pids(tmp_path)
        psutil.Process(held[0]).parent().kill()
        assert ready.acquire(timeout=60)
        assert gone(*held)


def test_the_last_lines_are_quoted_where_none_names_an_error(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n\nthree \xff\nfour\n")
    assert telling_lines(log) == ["two", "three \ufffd", "four"]
    assert telling_lines(tmp_path / "nothing") == []


def test_of_many_errors_the_first_and_the_last_are_quoted(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{n} ValueError: {n}\n" for n in range(9)) + "bye\n")
    assert telling_lines(log) == ["0 ValueError: 0", "7 ValueError: 7", "8 ValueError: 8"]
