"""Processes that end, are killed, fork, and write to one home at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.home import Home
from agentpref.record.log import Log
from agentpref.record.spill import drain
from agentpref.types import Comparison, Feedback, Run

RunsIn: TypeAlias = "Callable[[Home], list[Run]]"
JudgedIn: TypeAlias = "Callable[[Home], tuple[list[Feedback], list[Comparison]]]"


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(code: str, *arguments: object) -> str:
    with start(code, *arguments) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


def test_importing_the_log_stays_light() -> None:
    heavy = {"sqlite_utils", "numpy", "torch", "logging", "multiprocessing", "asyncio"}
    code = f"import sys, agentpref.record.log; print(sorted({heavy} & set(sys.modules)))"
    assert finish(code).strip() == "[]"


def test_queued_runs_are_written_when_the_interpreter_exits(
    tmp_path: Path, runs_in: RunsIn
) -> None:
    code = """
import sys
from agentpref.record.log import Log
log = Log(sys.argv[1])
for n in range(50):
    log.record([{"role": "user", "content": "hi"}], str(n))
"""
    finish(code, tmp_path / "home")
    assert len(runs_in(Home.open(tmp_path / "home"))) == 50


def test_kill_loses_no_acknowledged_feedback(tmp_path: Path, judged_in: JudgedIn) -> None:
    code = """
import sys, threading
from agentpref.record.log import Log
log = Log(sys.argv[1])
def work():
    while True:
        asked = [{"role": "user", "content": "hi"}]
        a, b = log.record(asked, "a"), log.record(asked, "b")
        told = [log.feedback(a, key="k", score=1), log.correct(b, "c")]
        told.append(log.compare(a, b, winner="a"))
        sys.stdout.write(" ".join(told) + "\\n")
        sys.stdout.flush()
for _ in range(3):
    threading.Thread(target=work).start()
"""
    with start(code, tmp_path / "home") as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(20)]
        process.kill()
        told += process.stdout.readlines()
    acknowledged = {name for line in told if line.endswith("\n") for name in line.split()}
    feedback, comparisons = judged_in(Home.open(tmp_path / "home"))
    known = {each.feedback_id for each in feedback} | {each.comparison_id for each in comparisons}
    assert len(acknowledged) >= 60
    assert acknowledged <= known
    with Log(tmp_path / "home") as log:
        assert log.verify() == []


def test_two_processes_write_to_one_home(
    tmp_path: Path, runs_in: RunsIn, judged_in: JudgedIn
) -> None:
    code = """
import sys
from agentpref.record.log import Log
with Log(sys.argv[1]) as log:
    for n in range(60):
        run = log.record([{"role": "user", "content": "hi"}], sys.argv[2] + str(n))
        if n % 6 == 0:
            log.feedback(run, key="k", score=n, source="code")
    assert log.dropped == {}
"""
    with start(code, tmp_path / "home", "a") as one, start(code, tmp_path / "home", "b") as other:
        assert one.wait(60) == other.wait(60) == 0
    home = Home.open(tmp_path / "home")
    assert len(runs_in(home)) == 120
    assert len(judged_in(home)[0]) == 20


FORKING = """
import os, sys
from agentpref.record.log import Log
log = Log(sys.argv[1])
asked = [{"role": "user", "content": "hi"}]
shared = log.record(asked, "parent")
child = os.fork()
if child == 0:
    mine = log.record(asked, "child")
    log.feedback(mine, key="child", score=1)
    log.record(asked, "child at exit")
    sys.exit()
log.feedback(shared, key="parent", score=1)
assert os.waitpid(child, 0)[1] == 0
log.record(asked, "parent after")
log.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_logs_for_itself(
    tmp_path: Path, runs_in: RunsIn, judged_in: JudgedIn
) -> None:
    finish(FORKING, tmp_path / "home")
    home = Home.open(tmp_path / "home")
    outputs = sorted(run.output["content"] for run in runs_in(home))
    assert outputs == ["child", "child at exit", "parent", "parent after"]
    assert sorted(said.key for said in judged_in(home)[0]) == ["child", "parent"]


OUTLIVING = """
import os, sys
from agentpref.record.log import Log
log = Log(sys.argv[1])
asked = [{"role": "user", "content": "hi"}]
log.record(asked, "parent")
log.flush()
ready, closed = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    log.feedback(log.record(asked, "before"), key="before", score=1)
    os.write(ready[1], b".")
    os.read(closed[0], 1)
    log.feedback(log.record(asked, "after"), key="after", score=1)
    os._exit(0)
os.read(ready[0], 1)
log.close()
os.write(closed[1], b".")
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_may_log_after_its_parent_closed(
    tmp_path: Path, judged_in: JudgedIn
) -> None:
    """An inherited connection would let the parent delete the file that the child writes to."""
    finish(OUTLIVING, tmp_path / "home")
    assert [said.key for said in judged_in(Home.open(tmp_path / "home"))[0]] == ["before", "after"]


POOLED = """
import multiprocessing, sys
from agentpref.record.log import Log
log = Log(sys.argv[1])
def work(name):
    for n in range(5):
        log.record([{"role": "user", "content": "hi"}], f"{name} {n}")
if __name__ == "__main__":
    log.record([{"role": "user", "content": "hi"}], "first")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(name,)) for name in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_multiprocessing_write_before_they_end(tmp_path: Path, runs_in: RunsIn) -> None:
    finish(POOLED, tmp_path / "home")
    assert len(runs_in(Home.open(tmp_path / "home"))) == 16


TERMINATED = """
import os, signal, sys, time
from agentpref.record.log import Log
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
log = Log(sys.argv[1])
log.record([{"role": "user", "content": "hi"}], "last")
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_process_that_exits_at_sigterm_writes_its_last_runs(
    tmp_path: Path, runs_in: RunsIn
) -> None:
    finish(TERMINATED, tmp_path / "home")
    assert len(runs_in(Home.open(tmp_path / "home"))) == 1


IN_A_POOL = """
import multiprocessing, sys
from agentpref.record.log import Log
log = Log(sys.argv[1])
def work(name):
    log.record([{"role": "user", "content": "hi"}], str(name))
    if sys.argv[2] == "flush":
        log.flush()
if __name__ == "__main__":
    pool = multiprocessing.get_context("fork").Pool(2)
    pool.map(work, range(6))
    if sys.argv[2] == "close":
        pool.close()
    else:
        pool.terminate()
    pool.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["close", "flush"])
def test_workers_of_a_pool_write_when_it_is_closed_or_they_flush(
    how: str, tmp_path: Path, runs_in: RunsIn
) -> None:
    finish(IN_A_POOL, tmp_path / "home", how)
    assert len(runs_in(Home.open(tmp_path / "home"))) == 6


INTERRUPTED = """
import os, random, signal, sys, threading
from agentpref.record.log import Log

class Late(Exception):
    pass

def late(*_):
    raise Late

log = Log(sys.argv[1])
parent = os.getpid()
asked = [{"role": "user", "content": "hi"}]
sys.unraisablehook = lambda unraisable: None
signal.signal(signal.SIGALRM, late)
rng, told = random.Random(0), []
for n in range(int(sys.argv[2])):
    run = log.record(asked, str(n), run_id=f"parent-{n}")
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 4e-3))
        child = os.fork()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        if os.getpid() != parent:  # the exception is the parent's alone
            os._exit(1)
        continue  # the child, if there is one, goes on
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        log.thumbs(log.record(asked, f"child-{n}", run_id=f"child-{n}"), up=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child of fork {n} ended with {status}"
    thread = threading.Thread(target=lambda: told.append(log.thumbs(run, up=True)))
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), f"the parent hangs after fork {n}"
assert log.flush(20)
assert log.dropped == {}, log.dropped
log.close()
while True:
    try:
        assert os.wait()[1] == 0, "a child that nobody waited for ended with an error"
    except ChildProcessError:
        break
print(len(told))
"""


@pytest.mark.guarantee("record", "signal handlers that raise during 200 forks")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_exception_of_a_signal_handler_during_a_fork_loses_and_stops_nothing(
    tmp_path: Path, runs_in: RunsIn, judged_in: JudgedIn
) -> None:
    told = int(finish(INTERRUPTED, tmp_path / "home", 200))
    home = Home.open(tmp_path / "home")
    drain(home)
    names = {run.run_id for run in runs_in(home)}
    assert {f"parent-{n}" for n in range(200)} <= names
    children = sum(name.startswith("child-") for name in names)
    assert 20 < told <= children <= 200
    assert len(judged_in(home)[0]) == told + children


FORKED_IN_A_WRITE = """
import os, sys
from agentpref.record import forks
from agentpref.record.log import Log
log = Log(sys.argv[1])
asked = [{"role": "user", "content": "hi"}]
shared = log.record(asked, "parent")
log.flush()
sys.unraisablehook = lambda unraisable: None
forks.ATTEMPTS = 0  # as if exceptions had ended all of them
child = os.fork()
if child == 0:
    log.thumbs(log.record(asked, "child"), up=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert os.path.exists(os.path.join(sys.argv[1], "spill.jsonl"))
log.thumbs(shared, up=True)
log.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_inherits_an_open_database_gives_all_to_the_spill(
    tmp_path: Path, runs_in: RunsIn, judged_in: JudgedIn
) -> None:
    finish(FORKED_IN_A_WRITE, tmp_path / "home")
    home = Home.open(tmp_path / "home")
    assert sorted(run.output["content"] for run in runs_in(home)) == ["child", "parent"]
    assert len(judged_in(home)[0]) == 2


REDACTING = """
import os, sys, threading
from agentpref.record.log import Log
held, asks = threading.Lock(), threading.Event()

def redact(text):
    asks.set()
    with held:
        return text

log = Log(sys.argv[1], redact=redact)
with held:
    log.record([{"role": "user", "content": "hi"}], "parent")
    asks.wait()
    child = os.fork()
    if child == 0:
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
log.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_wait_for_the_redactor(tmp_path: Path, runs_in: RunsIn) -> None:
    finish(REDACTING, tmp_path / "home")
    assert len(runs_in(Home.open(tmp_path / "home"))) == 1
