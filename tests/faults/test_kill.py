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
from contextlib import closing, contextmanager
from pathlib import Path

from agentpref.home import Home
from agentpref.record.database import connect, transaction

LOAD = Path(__file__).with_name("load.py")
KILLS = 200
CHECKED_EVERY = 20


def test_two_hundred_kills_lose_nothing(
    tmp_path: Path, held: Callable[[Path], dict[str, set[str]]]
) -> None:
    """Half of the processes meet a database that is locked half of the time, and so spill."""
    home = tmp_path / "home"
    rng = random.Random(0)
    promised: dict[str, set[str]] = {"feedback": set(), "comparison": set(), "ready": set()}
    spilled = 0
    for n in range(KILLS):
        with _in_the_way(home) if n % 2 and n > 1 else _nothing():
            for kind, name in _until_killed(home, seconds=rng.uniform(0, 0.25)):
                promised[kind].add(name)
        spilled += (home / "spill.jsonl").exists()
        if n % CHECKED_EVERY == CHECKED_EVERY - 1:
            there = held(home)
            assert promised["feedback"] <= there["feedback"]
            assert promised["comparison"] <= there["comparison"]
    assert len(promised["ready"]) == KILLS
    assert len(promised["feedback"]) > KILLS
    assert spilled > KILLS // 20  # else this has not tried what it is for


def _until_killed(home: Path, seconds: float) -> list[tuple[str, str]]:
    """Run the load for a while after it is ready, kill it, and return what it was promised."""
    process = subprocess.Popen([sys.executable, str(LOAD), str(home)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return [(kind, name) for kind, name in (line.decode().split() for line in said)]


@contextmanager
def _in_the_way(home: Path) -> Iterator[None]:
    """Hold the database's write lock half of the time."""
    done = threading.Event()

    def lock(connection: sqlite3.Connection) -> None:
        with closing(connection):
            while not done.wait(0.03):
                with transaction(connection):
                    time.sleep(0.03)

    thread = threading.Thread(target=lock, args=(connect(Home.open(home)),))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
