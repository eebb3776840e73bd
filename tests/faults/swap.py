"""Swaps in processes that are killed at every step: `python swap.py HOME`.

HOME has two revisions, the first of them live. For each step of a swap to the other one, as the
interpreter sees it (a line of the serving modules, or a call of the system that it audits), a child
is forked off that opens a router, swaps, and kills itself right before that step. After each, a
router must open and serve the old or the new revision; then the old one is made live again. Prints
how many steps there were.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import agentpref.serve
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.pins import find_pins
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import FakeBackend

ASK = GenerationRequest(messages=({"role": "user", "content": "hi"},))
SERVING = str(Path(agentpref.serve.__file__).parent)
STEPPED = {"router.py", "registry.py", "status.py", "pins.py"}
AUDITED = ("open", "os.", "fcntl.", "sqlite3.", "shutil.")


class Steps:
    """Counts the steps of this thread, and kills the process before a certain one."""

    def __init__(self, fatal: int) -> None:
        self.count = 0
        self.fatal = fatal

    def step(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        file = Path(frame.f_code.co_filename)
        if file.name in STEPPED and str(file.parent) == SERVING:
            if event == "line":
                self.step()
            return self.trace
        return None

    def audit(self, event: str, _: Any) -> None:
        if event.startswith(AUDITED):
            self.step()


def swap(registry: Registry, name: str, fatal: int) -> int:
    """Open a router and swap, killed before a step; give the number of steps there are."""
    with Router(registry, FakeBackend()) as router:
        steps = Steps(fatal)
        sys.addaudithook(steps.audit)
        sys.settrace(steps.trace)
        router.activate(name)
        sys.settrace(None)
        return steps.count


def forked(work: Callable[[], int]) -> tuple[int, int]:
    """Do something in a child; how it ended, and what it gave."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, str(work()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(told or 0)


def check(registry: Registry, old: str, new: str) -> str:
    """The registry is sound, nobody holds anything, and a router serves one of the two."""
    assert {pin.alive for pin in find_pins(registry.home.pins)} <= {False}
    with closing(connect(registry.home, readonly=True)) as connection:
        assert examine(connection).problems == []
    live = registry.state().live
    assert live in (old, new), live
    backend = FakeBackend()
    with Router(registry, backend) as router:
        assert router.generate(ASK).revision == live
        assert backend.list_loaded() == (live,)
        router.activate(new)
        router.activate(old)
        assert router.generate(ASK).revision == old
    return str(live)


def main(folder: Path) -> None:
    """Kill a swap before each of its steps."""
    registry = Registry(Home.open(folder))
    old, new = (revision.revision_id for revision in registry.list())
    ended, steps = forked(lambda: swap(registry, new, fatal=0))
    assert (ended, registry.state().live) == (0, new)
    registry.promote(old)
    found = []
    for fatal in range(1, steps + 1):
        ended, _ = forked(lambda: swap(registry, new, fatal))  # noqa: B023
        assert ended == -signal.SIGKILL, (fatal, ended)
        found.append(check(registry, old, new))
    assert found == sorted(found), "once it is live it stays so"
    assert set(found) == {old, new}
    print(steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
