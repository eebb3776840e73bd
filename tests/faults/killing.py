"""Ends a child process before one step of its work, as ``kill -9`` does.

A step is what the interpreter audits (opening, renaming, making, removing, locking), an ``fsync``,
a statement that SQLite is given, and each ten thousandth instruction that SQLite carries out, which
lies in the middle of a long statement. Of a statement that repeats, as for each of many rows, the
first, second, fourth, eighth … count: what lies between two of these is a transaction half done.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable

AUDITED = {
    "open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate",
    "os.listdir", "os.scandir", "fcntl.flock", "shutil.rmtree", "sqlite3.connect",
}  # fmt: skip
INSTRUCTIONS = 10_000
VALUE = re.compile(r"'[^']*'|[\d.]+")


def is_done(work: Callable[[], object], steps: int) -> bool:
    """Do the work in a child that kills itself after some steps; say whether it got to the end."""
    child = os.fork()
    if not child:
        kill_after(steps)
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child ended with {status}"
    return status == 0


def kill_after(steps: int) -> None:
    """Count the steps of this process from now on, and kill it when it has done so many."""
    left = steps
    repeated = Counter[str]()

    def step() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def audit(event: str, _: tuple[object, ...]) -> None:
        if event in AUDITED:
            step()

    def trace(statement: str) -> None:
        kind = VALUE.sub("", statement)
        repeated[kind] += 1
        if repeated[kind].bit_count() == 1:
            step()

    def connect(*arguments: object, real=sqlite3.connect, **settings: object) -> sqlite3.Connection:
        connection = real(*arguments, **settings)
        connection.set_trace_callback(trace)
        connection.set_progress_handler(step, INSTRUCTIONS)
        return connection

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        step()
        real(descriptor)

    os.fsync, sqlite3.connect = fsync, connect
    sys.addaudithook(audit)
