"""Starting, awaiting and ending a server process, with a small server in the place of vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentpref.errors import EngineFailed
from agentpref_adapters._vllm_process import (
    VllmProcess,
    error_lines,
    free_port,
)
from agentpref_adapters._vllm_server import Server

STAND_IN = Path(__file__).with_name("stand_in_server.py")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """Call ``server("stubborn", grace_seconds=1)`` for a server; all are ended afterwards."""
    made: list[VllmProcess] = []

    def make(*how: str, **settings: float) -> VllmProcess:
        port = free_port("127.0.0.1")
        command = [sys.executable, str(STAND_IN), str(port), str(tmp_path), *how]
        url, log = f"http://127.0.0.1:{port}", tmp_path / "logs" / "server.log"
        limits = {"start_seconds": 60, "grace_seconds": 5} | settings
        made.append(VllmProcess(command, os.environ, url=url, log=log, **limits))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def answers(url: str) -> bool:
    with closing(Server(url, timeout=5)) as server:
        return server.is_ready()


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
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


def failure_of(server: VllmProcess) -> EngineFailed:
    limit = time.monotonic() + 60
    while (failure := server.failure()) is None and time.monotonic() < limit:
        time.sleep(0.05)
    assert failure is not None
    return failure


def test_a_started_server_answers_and_ends_with_its_helpers(server, tmp_path) -> None:
    one = server()
    with one:
        assert answers(one.url)
        assert one.failure() is None
        main, helper = pids(tmp_path)
        assert running(main)
        assert running(helper)
    assert not answers(one.url)
    assert not running(main)
    assert not running(helper)


def test_a_stopped_server_can_be_started_again_at_the_same_url(server, tmp_path) -> None:
    one = server()
    with one:
        first = pids(tmp_path)
    with one:
        assert answers(one.url)
        assert set(pids(tmp_path)).isdisjoint(first)


def test_the_log_holds_the_output_and_the_log_before_is_kept(server, tmp_path) -> None:
    one = server()
    one.log.parent.mkdir()
    one.log.write_text("the run before")
    with one:
        assert one.log.read_text().startswith("starting up")
        assert one.log.stat().st_mode & 0o077 == 0
    assert one.log.with_name("server.log.1").read_text() == "the run before"


def test_a_server_that_ignores_sigterm_is_killed(server, tmp_path) -> None:
    with server("stubborn", grace_seconds=0.2):
        started = pids(tmp_path)
    assert gone(*started)


def test_a_server_that_fails_to_start_is_an_error_that_quotes_its_log(server) -> None:
    one = server("fails")
    with pytest.raises(EngineFailed, match="exit code 1") as refusal:
        one.start()
    message = str(refusal.value)
    assert "ValueError: not enough memory for the weights | RuntimeError" in message
    assert "starting up" not in message
    assert message.endswith(f"read {one.log}, fix the cause, and start it again")


def test_a_server_that_is_not_ready_in_time_is_ended(server, tmp_path) -> None:
    one = server("silent", start_seconds=1)
    with pytest.raises(EngineFailed, match=r"did not answer at http://127.* within 1 s"):
        one.start()
    if (tmp_path / "pids").exists():  # where it came that far
        assert gone(*pids(tmp_path))


def test_a_program_that_does_not_exist_is_named(tmp_path) -> None:
    url, log = f"http://127.0.0.1:{free_port('127.0.0.1')}", tmp_path / "log"
    one = VllmProcess([str(tmp_path / "nothing")], {}, url=url, log=log)
    with pytest.raises(EngineFailed, match="nothing"):
        one.start()


def test_a_taken_port_is_refused_and_nothing_starts(server, tmp_path) -> None:
    with server() as one:
        two = VllmProcess(["true"], {}, url=one.url, log=tmp_path / "unused")
        with pytest.raises(EngineFailed, match="choose another port"):
            two.start()
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        two = VllmProcess(["true"], {}, url=url, log=tmp_path / "unused")
        with pytest.raises(EngineFailed, match="end the program that listens there"):
            two.start()
    assert not (tmp_path / "unused").exists()


def test_a_server_that_dies_is_reported_and_its_helpers_end(server, tmp_path) -> None:
    with server() as one:
        started = pids(tmp_path)
        with pytest.raises(OSError):  # noqa: PT011  # it answers no more
            urllib.request.urlopen(one.url + "/die", data=b"", timeout=60)
        assert "vLLM ended with exit code 9" in str(failure_of(one))
        assert gone(*started)
        assert not answers(one.url), "it is not started again"


def test_a_killed_guard_is_reported_and_the_server_ends_with_the_process(server, tmp_path) -> None:
    with server() as one:
        started = pids(tmp_path)
        psutil.Process(started[0]).parent().kill()
        assert "exit code -9" in str(failure_of(one))
    assert gone(*started)


def test_an_interrupt_while_the_server_starts_ends_it(server, tmp_path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        server("silent").start()
    assert gone(*pids(tmp_path))


PARENT = """
import os, signal, sys, threading, time
from pathlib import Path
from agentpref_adapters._vllm_process import VllmProcess
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which it would ignore where nohup runs the tests
port, folder = sys.argv[1:3]
command = [sys.executable, *sys.argv[3:], port, folder]
url, log = f"http://127.0.0.1:{port}", Path(folder, "log")
server = VllmProcess(command, os.environ, url=url, log=log)
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_server_ends_when_its_parent_process_is_killed(tmp_path, signum) -> None:
    """The thread that started the server has ended by then, which must not end the server."""
    port = str(free_port("127.0.0.1"))
    command = [sys.executable, "-c", PARENT, port, str(tmp_path), str(STAND_IN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"started\n"
        started = pids(tmp_path)
        assert all(map(running, started))
        parent.send_signal(signum)
    assert gone(*started)


def test_the_last_lines_are_quoted_where_none_names_an_error(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n\nthree \xff\nfour\n")
    assert error_lines(log) == ["two", "three \ufffd", "four"]
    assert error_lines(tmp_path / "nothing") == []


def test_of_many_errors_the_first_and_the_last_are_quoted(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{n} ValueError: {n}\n" for n in range(9)) + "bye\n")
    assert error_lines(log) == ["0 ValueError: 0", "7 ValueError: 7", "8 ValueError: 8"]
