"""The thread that runs the model: when jobs are admitted, and when they fail."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from agentpref.errors import BackendClosed, ServingError
from agentpref_adapters import transformers as module
from agentpref_adapters.transformers import ModelThread


class Job:
    """Takes some steps, and is then answered with its number."""

    def __init__(self, number: int, steps: int = 1) -> None:
        self.number = number
        self.steps = steps
        self.outcome: Future[int] = Future()

    def fail(self, error: ServingError) -> None:
        self.outcome.set_exception(error)


class Counter:
    """Counts jobs down; ``may_step`` blocks it before a step, where ``entered`` is set."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.log: list[list[int]] = []
        self.threads: set[int] = set()
        self.may_step = threading.Event()
        self.may_step.set()
        self.entered = threading.Event()

    @property
    def active(self) -> int:
        return len(self.jobs)

    @property
    def has_work(self) -> bool:
        return bool(self.jobs)

    def admit(self, jobs: list[Job]) -> None:
        self.threads.add(threading.get_ident())
        self.jobs += jobs

    def step(self) -> None:
        self.threads.add(threading.get_ident())
        if self.jobs:
            self.entered.set()
            self.may_step.wait()
            self.log.append([job.number for job in self.jobs])
        for job in self.jobs:
            job.steps -= 1
            if not job.steps:
                job.outcome.set_result(job.number)
        self.jobs = [job for job in self.jobs if job.steps]

    def abandon(self) -> list[Job]:
        jobs, self.jobs = self.jobs, []
        return jobs


@pytest.fixture
def engine() -> Counter:
    return Counter()


@pytest.fixture
def thread(engine: Counter) -> Iterator[ModelThread]:
    thread = ModelThread(engine, max_active=3)
    yield thread
    engine.may_step.set()
    thread.close()


@pytest.fixture
def hold(engine: Counter, thread: ModelThread) -> Callable[[], Job]:
    """Keep the engine in the first of two steps of a job, numbered -1."""

    def call() -> Job:
        engine.may_step.clear()
        job = Job(-1, steps=2)
        thread.submit(job)
        engine.entered.wait()
        return job

    return call


def test_a_new_job_is_admitted_between_two_steps_of_an_active_one(
    engine: Counter, thread: ModelThread, hold: Callable[[], Job]
) -> None:
    first, second = hold(), Job(2)
    thread.submit(second)
    engine.may_step.set()
    assert second.outcome.result() == 2
    assert first.outcome.result() == -1
    assert engine.log == [[-1], [-1, 2]]


def test_jobs_beyond_the_limit_wait_and_the_oldest_is_admitted_first(
    engine: Counter, thread: ModelThread, hold: Callable[[], Job]
) -> None:
    hold()
    jobs = [Job(number, steps=1 + number % 2) for number in range(5)]
    for job in jobs:
        thread.submit(job)
    assert len(thread.waiting) == 5
    engine.may_step.set()
    assert [job.outcome.result() for job in jobs] == list(range(5))
    assert engine.log == [[-1], [-1, 0, 1], [1, 2, 3], [3, 4]]
    assert len(thread.waiting) == 0


def test_the_engine_runs_on_one_thread(engine: Counter, thread: ModelThread) -> None:
    for number in range(3):
        job = Job(number)
        thread.submit(job)
        job.outcome.result()
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_closing_fails_waiting_jobs_finishes_active_ones_and_refuses_new_ones(
    engine: Counter, thread: ModelThread, hold: Callable[[], Job]
) -> None:
    active, waiting = hold(), Job(1)
    thread.submit(waiting)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(thread.close)
        assert isinstance(waiting.outcome.exception(timeout=30), BackendClosed)
        assert not active.outcome.done()
        with pytest.raises(BackendClosed, match="make a new one"):
            thread.submit(Job(2))
        engine.may_step.set()
        closing.result()
    assert active.outcome.result() == -1
    assert engine.log == [[-1], [-1]]
    with pytest.raises(BackendClosed):
        thread.require_open()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_raises_fails_all_jobs(
    engine: Counter,
    thread: ModelThread,
    hold: Callable[[], Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    active, waiting = hold(), Job(1)
    thread.submit(waiting)

    def broken(jobs: list[Job]) -> None:
        engine.jobs += jobs
        raise RuntimeError("no")

    monkeypatch.setattr(engine, "admit", broken)
    engine.may_step.set()
    for job in (active, waiting):
        assert isinstance(job.outcome.exception(timeout=30), BackendClosed)
    with pytest.raises(BackendClosed):
        thread.submit(Job(2))


FORKED = """
import os, signal
from agentpref.errors import BackendClosed
from agentpref_adapters import transformers as module
from agentpref_adapters.transformers import ModelThread

class Idle:
    active = 0
    has_work = False

    def admit(self, jobs):
        pass

    def step(self):
        pass

    def abandon(self):
        return []

thread = ModelThread(Idle(), max_active=1)
thread.require_open()
thread._arrived.acquire()  # as another thread may have, just then
child = os.fork()
if not child:
    signal.alarm(30)
    try:
        thread.submit(None)
    except BackendClosed:
        os._exit(7)
    os._exit(0)
thread._arrived.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_gets_an_error_instead_of_waiting() -> None:
    command = [sys.executable, "-c", FORKED]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "7"


def test_a_thread_without_work_gives_its_team_away_and_answers_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_away = threading.Event()
    by: list[int] = []

    def disband() -> None:
        by.append(threading.get_ident())
        given_away.set()

    monkeypatch.setattr(module, "disband", disband)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    counter = Counter()
    thread = ModelThread(counter, max_active=2)  # type: ignore[arg-type]
    for number in range(2):
        job = Job(number)
        thread.submit(job)  # type: ignore[arg-type]
        assert job.outcome.result(10) == number
        assert given_away.wait(10)
        given_away.clear()
    thread.close()
    assert {*by} == counter.threads
