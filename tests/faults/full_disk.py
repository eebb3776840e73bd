"""A home on a file system of one megabyte, filled to the brim and freed again.

Run in a mount namespace of its own: `unshare -rm python full_disk.py FOLDER`. Prints "ok".
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from agentpref.errors import NotKept
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.store import Store

ASKED = [{"role": "user", "content": "2 + 2?"}]
PATIENCE = 60.0


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """Lay a file system of some size over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(file: Path, *, but: int) -> None:
    """Take all the room there is, but for some bytes."""
    with open(file, "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            filler.truncate(filler.tell() - but)


def feedback_until_full(log: Log, run: str) -> tuple[set[str], str]:
    """Judge until it cannot be kept; return what was promised, and the words of the refusal."""
    promised: set[str] = set()

    def judge_for_ever() -> None:
        while True:
            promised.add(log.feedback(run, key="thumbs", score=1, comment="x" * 500))

    with pytest.raises(NotKept) as refusal:
        judge_for_ever()
    return promised, str(refusal.value)


def refusals(log: Log, run: str, *, seconds: float, count: int) -> list[float]:
    """Log and judge on the full disk, for so long and so often; return how long each refusal took.

    The disk is tried again every second, so a warning at each attempt would show.
    """
    end, took = time.monotonic() + seconds, list[float]()
    while len(took) < count or time.monotonic() < end:
        log.record(ASKED, "while full")
        start = time.monotonic()
        with pytest.raises(NotKept):
            log.thumbs(run, up=True)
        took.append(time.monotonic() - start)
        time.sleep(0.01)
    return took


def thumbs_once_it_is_kept(log: Log, run: str) -> str:
    """Judge until that is kept: what was in trouble is tried again after a second."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(NotKept):
            return log.thumbs(run, up=False)
        time.sleep(0.05)
    raise AssertionError("it never takes feedback again")


READING = ("adapters list", "stats", "pairs", "verify", "export")


def agentpref(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line on a home."""
    words = [sys.executable, "-m", "agentpref_cli", *command.split(), "--home", str(home)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def doctor_finds(home: Path) -> set[str]:
    """The rows that fail in the doctor's table."""
    done = agentpref("doctor --json", home)
    assert done.returncode in (0, 1), done.stderr
    return {row["name"] for row in json.loads(done.stdout)["checks"] if not row["passed"]}


def main(folder: Path) -> None:
    """Log before, while and after there is room."""
    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agentpref").addHandler(handler)
    with mounted(folder, "3m"):  # an empty home takes .6 MB of it, its log of changes included
        with closing(Log(folder / "home")) as log:
            first = log.record(ASKED, "4")
            log.flush()
            fill(folder / "filler", but=200_000)
            promised, refusal = feedback_until_full(log, first)
            waiting = [log.record(ASKED, f"while full {n} " + "y" * 500) for n in range(100)]
            assert log.flush() is False
            assert "free space" in refusal, refusal
            took = refusals(log, first, seconds=3, count=100)
            assert statistics.median(took) < 0.1, "it waits for nothing"
            assert len(words) <= 2, words  # the database, and soon after it the file beside it
            assert "runs wait in memory" in words[-1], words
            assert all("free space" in word for word in words), words
            begun = len(words)
            for command in READING:
                done = agentpref(command, folder / "home")
                assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            assert doctor_finds(folder / "home") == {"disk"}
            os.remove(folder / "filler")
            promised.add(thumbs_once_it_is_kept(log, waiting[0]))
            assert log.flush()
            assert log.dropped == {}
            assert len(words) == begun + 1, words
            assert "takes runs and feedback again" in words[-1], words
        with closing(connect(Home.open(folder / "home"))) as connection:
            store = Store(connection)
            assert {run.run_id for run in store.runs("default")} >= {first, *waiting}
            assert {said.feedback_id for said in store.feedback("default")} == promised
            assert examine(connection).problems == []
        # A closed home lacks the files that its readers share, and now there is no room for them.
        fill(folder / "filler", but=0)
        for command in READING:
            done = agentpref(command, folder / "home")
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert doctor_finds(folder / "home") == {"disk"}
    assert len(promised) >= 3
    print("ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
