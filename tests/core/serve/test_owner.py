"""The owner's thread: order, batches, and what becomes of those who wait."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from agentpref.errors import BackendClosed, ServingError
from agentpref.serve.owner import Owner


class Job:
    def __init__(self, key: str, number: int = 0) -> None:
        self.key = key
        self.number = number
        self.outcome: Future[int] = Future()

    def fail(self, error: ServingError) -> None:
        self.outcome.set_exception(error)


class Server:
    """Notes what the owner does; ``pause`` holds the owner until the block ends."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.threads: set[int] = set()
        self.owner = Owner(self.serve, max_batch=3)

    def serve(self, batch: list[Job]) -> None:
        self.threads.add(threading.get_ident())
        self.log.append([(job.key, job.number) for job in batch])
        for job in batch:
            job.outcome.set_result(job.number)

    def pause(self) -> threading.Event:
        entered, gate = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            gate.wait()

        threading.Thread(target=self.owner.call, args=(hold,)).start()
        entered.wait()
        return gate


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.owner.close()


def test_what_waits_for_the_same_key_is_served_together_oldest_first(server: Server) -> None:
    gate = server.pause()
    jobs = [Job(key, number) for number, key in enumerate("abacaa")]
    for job in jobs:
        server.owner.submit(job)
    gate.set()
    assert [job.outcome.result() for job in jobs] == list(range(6))
    assert server.log == [
        [("a", 0), ("a", 2), ("a", 4)],
        [("b", 1)],
        [("c", 3)],
        [("a", 5)],
    ]


def test_a_task_waits_for_the_jobs_before_it_and_precedes_those_after(server: Server) -> None:
    gate = server.pause()
    before, after = Job("a", 1), Job("a", 2)
    server.owner.submit(before)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(server.owner.call, lambda: server.log.append("task"))
        while len(server.owner._waiting) < 2:
            threading.Event().wait(0.001)
        server.owner.submit(after)
        gate.set()
        task.result()
    after.outcome.result()
    assert server.log == [[("a", 1)], "task", [("a", 2)]]


def test_everything_runs_on_one_thread(server: Server) -> None:
    for number in range(3):
        job = Job("a", number)
        server.owner.submit(job)
        job.outcome.result()
    server.threads.add(server.owner.call(threading.get_ident))
    assert len(server.threads) == 1
    assert threading.get_ident() not in server.threads


def test_a_task_gives_back_what_it_returns_and_raises(server: Server) -> None:
    assert server.owner.call(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        server.owner.call(lambda: 1 / 0)
    assert server.owner.call(lambda: 43) == 43, "the owner outlives it"


def test_closing_fails_what_waits_and_refuses_what_comes(server: Server) -> None:
    gate = server.pause()
    waiting = Job("a")
    server.owner.submit(waiting)
    with ThreadPoolExecutor(2) as pool:
        task = pool.submit(server.owner.call, lambda: 1)
        while len(server.owner._waiting) < 2:
            threading.Event().wait(0.001)
        closing = pool.submit(server.owner.close)
        while not server.owner._closed:
            threading.Event().wait(0.001)
        gate.set()
        closing.result()
        assert isinstance(waiting.outcome.exception(timeout=30), BackendClosed)
        assert isinstance(task.exception(timeout=30), BackendClosed)
    with pytest.raises(BackendClosed, match="make a new one"):
        server.owner.submit(Job("a"))
    with pytest.raises(BackendClosed):
        server.owner.call(lambda: 1)
    assert server.log == []


FORKED = """
import os
from agentpref.errors import BackendClosed
from agentpref.serve.owner import Owner

owner = Owner(lambda batch: None, max_batch=1)
owner.call(lambda: None)
child = os.fork()
if not child:
    try:
        owner.call(lambda: None)
    except BackendClosed:
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_is_told_instead_of_waiting_for_ever() -> None:
    command = [sys.executable, "-c", FORKED]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "7"
