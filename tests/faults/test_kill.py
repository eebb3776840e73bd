"""`kill -9` at any moment loses nothing that was acknowledged."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.record.database import connect, transaction

LOAD = Path(__file__).with_name("load.py")
KILLS = 200
CHECKED_EVERY = 20
PATIENCE = 60.0


@pytest.mark.guarantee("record", f"{KILLS} processes killed, with `kill -9`")
def test_two_hundred_kills_lose_nothing(
    tmp_path: Path, held: Callable[[Path], dict[str, set[str]]]
) -> None:
    """Half of the processes spill, because the database is locked, and then it is now and again."""
    home = Home.create(tmp_path / "home")
    rng = random.Random(0)
    promised: dict[str, set[str]] = {"feedback": set(), "comparison": set(), "ready": set()}
    for n in range(KILLS):
        with _in_the_way(home) if n % 2 else nullcontext() as spilled:
            promises, seconds = rng.randrange(8), rng.uniform(0, 0.25)
            for kind, name in _until_killed(home, spilled, promises, seconds):
                promised[kind].add(name)
        if n % CHECKED_EVERY == CHECKED_EVERY - 1:
            there = held(home.path)
            assert promised["feedback"] <= there["feedback"]
            assert promised["comparison"] <= there["comparison"]
    assert len(promised["ready"]) == KILLS
    assert len(promised["feedback"]) > KILLS


def _until_killed(
    home: Home, spilled: threading.Event | None, promises: int, seconds: float
) -> list[tuple[str, str]]:
    """Run the load until it has spilled, if it must, has promised something, and a while longer.

    Returns all its promises.
    """
    command = [sys.executable, str(LOAD), str(home.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(1 + promises)]  # the first: it is ready
    assert spilled is None or spilled.wait(PATIENCE), "nothing was spilled"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return [(kind, name) for kind, name in (line.decode().split() for line in said)]


@contextmanager
def _in_the_way(home: Home) -> Iterator[threading.Event]:
    """Lock the database until something was spilled, and half of the time from then on."""
    spilled, done = threading.Event(), threading.Event()

    def lock(connection: sqlite3.Connection) -> None:
        with closing(connection):
            with transaction(connection):
                before = _size(home.spill)
                while _size(home.spill) <= before and not done.wait(0.001):
                    pass
                spilled.set()
            while not done.wait(0.03):
                with transaction(connection):
                    time.sleep(0.03)

    thread = threading.Thread(target=lock, args=(connect(home),))
    thread.start()
    try:
        yield spilled
    finally:
        done.set()
        thread.join()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
