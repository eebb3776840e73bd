"""What the log costs its host, beside the bare minimum and two peers; and what it writes.

- `record` on the calling thread, 1 kB of messages, at 2,000 runs a second, for a host that computes
  between its calls (`busy`) and one that sleeps (`idle`). Each contestant has a process of its own.
- Runs a second from the first `record` to the end of `flush`, against sqlite3.executemany of the
  same rows into the same tables, in transactions of the same sizes.
- Bytes on disk of 40-turn conversations, by the bytes of their distinct text.
- Durable feedback, against one INSERT of the same row and COMMIT.

Run as `python -m benchmarks.record`. LangSmith comes with the extra `langchain`, Langfuse with the
extra `bench`; a peer that is not installed is skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentpref import Log
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.messages import FEEDBACK_COLUMNS
from agentpref.record.writer import BATCH
from benchmarks._report import Target, at_least, at_most, print_report
from benchmarks._tracers import CONTESTANTS

RATE = 2_000
SYSTEM = {"role": "system", "content": "You are the assistant of a shop. " * 4}


def main() -> None:
    """Measure all, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--calls", type=int, default=4_000, help="calls timed in a round")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(time_calls(options.contestant, options.calls, idle=options.idle)))
        sys.stdout.flush()
        os._exit(0)  # a peer would wait until its queue is sent
    figures = hot_path(options.rounds, options.calls)
    figures |= throughput(options.rounds) | feedback(options.rounds)
    figures |= {"disk_per_text_1000": disk(1_000), "disk_per_text_300": disk(300)}
    for name, value in figures.items():
        print(f"{name:<28} {value:10.2f}")
    print_report("record", figures, targets(figures))


def targets(figures: dict[str, float]) -> list[Target]:
    """The figures that the log promises."""
    return [
        at_most("agentpref_busy_p50_us", figures["agentpref_busy_p50_us"], 5),
        at_most("agentpref_busy_p99_us", figures["agentpref_busy_p99_us"], 25),
        *(
            at_least(name, figures[name], 5)
            for name in ("langsmith_by_agentpref", "langfuse_by_agentpref")
            if name in figures
        ),
        at_least("throughput_by_raw", figures["throughput_by_raw"], 0.5),
        at_least("feedback_by_raw", figures["feedback_by_raw"], 0.8),
        at_most("disk_per_text_1000", figures["disk_per_text_1000"], 1.3),
    ]


def hot_path(rounds: int, calls: int) -> dict[str, float]:
    """Medians over rounds of each contestant's p50 and p99 in µs, and the ratios to ours."""
    there = [name for name in CONTESTANTS if name == "bare" or find_spec(name) is not None]
    for name in CONTESTANTS.keys() - there:
        print(f"{name} is not installed and is skipped: pip install 'agentpref[bench]'")
    seen: dict[str, list[float]] = {}
    for _ in range(rounds):
        for pace in ("busy", "idle"):
            for name in there:
                for what, value in _in_a_process(name, calls, pace).items():
                    seen.setdefault(f"{name}_{pace}_{what}_us", []).append(value)
    figures = {name: round(statistics.median(values), 2) for name, values in seen.items()}
    ours = figures["agentpref_busy_p50_us"]
    for name in there:
        figures[f"{name}_by_agentpref"] = round(figures[f"{name}_busy_p50_us"] / ours, 2)
    return figures


def _in_a_process(name: str, calls: int, pace: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.record", "--contestant", name]
    command += ["--calls", str(calls), *(["--idle"] if pace == "idle" else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def time_calls(name: str, calls: int, *, idle: bool) -> dict[str, float]:
    """Trace ``calls`` model calls at :data:`RATE`; return p50 and p99 of one call in µs."""
    with tempfile.TemporaryDirectory() as folder:
        trace, end = CONTESTANTS[name](Path(folder))
        spent = []
        due = time.perf_counter()
        for n in range(calls + 500):
            messages, answer = _asked(n, 1_000), "y" * 250
            due += 1 / RATE
            _wait_until(due, idle=idle)
            start = time.perf_counter_ns()
            trace(messages, answer)
            spent.append(time.perf_counter_ns() - start)
        end()
    spent = sorted(spent[500:])
    return {"p50": spent[len(spent) // 2] / 1e3, "p99": spent[len(spent) * 99 // 100] / 1e3}


def _asked(n: int, size: int) -> list[dict[str, Any]]:
    """A system prompt and a question; with an answer of 250, ``size`` bytes of text."""
    left = size - 250 - len(SYSTEM["content"])
    return [SYSTEM, {"role": "user", "content": f"{n:08d} ".ljust(left, "x")}]


def _wait_until(due: float, *, idle: bool) -> None:
    while (left := due - time.perf_counter()) > 0:
        if idle:
            time.sleep(left)


def throughput(rounds: int, runs: int = 20_000) -> dict[str, float]:
    """Durable runs a second of the log, and the median of its ratios to the raw rate."""
    ours, ratios = [], []
    for n in range(rounds):
        with _home() as home:
            seconds = _log_runs(home, runs, seed=n)
            raw = _insert_raw(home)
        ours.append(runs / seconds)
        ratios.append(raw / seconds)
    return {
        "throughput_runs_per_s": round(statistics.median(ours)),
        "throughput_by_raw": round(statistics.median(ratios), 3),
    }


def _log_runs(home: Home, runs: int, seed: int) -> float:
    with Log(home.path, queue_size=runs) as log:
        log.record(_asked(-1, 1_000), "warm")
        log.flush()
        asked = [_asked(seed * runs + n, 1_000) for n in range(runs)]
        start = time.perf_counter()
        for n, messages in enumerate(asked):
            log.record(messages, f"{n} ".ljust(250, "y"), model="m", thread_id="t", user_id="u")
        log.flush()
        seconds = time.perf_counter() - start
        assert log.dropped == {}, log.dropped
    return seconds


def _insert_raw(home: Home) -> float:
    """Write the rows of a home into a new one by executemany; return the seconds."""
    with closing(connect(home)) as source:
        messages = source.execute("SELECT * FROM message ORDER BY rowid").fetchall()
        runs = source.execute("SELECT * FROM run ORDER BY rowid").fetchall()
    with _home() as target, closing(connect(target)) as connection:
        batches = -(-len(runs) // BATCH)
        parts = zip(_parts(messages, batches), _parts(runs, batches), strict=True)
        start = time.perf_counter()
        connection.execute("PRAGMA foreign_keys = OFF")
        for part in parts:
            connection.execute("BEGIN IMMEDIATE")
            for table, rows in zip(("message", "run"), part, strict=True):
                marks = ", ".join("?" * len(rows[0]))
                connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
            connection.execute("COMMIT")
        return time.perf_counter() - start


def _parts(rows: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = -(-len(rows) // count)
    return [rows[n * size : (n + 1) * size] for n in range(count)]


def feedback(rounds: int, calls: int = 300) -> dict[str, float]:
    """Durable judgements a second, and the median of their ratios to raw commits."""
    ours, ratios = [], []
    for _ in range(rounds):
        with _home() as home, _home() as other:
            seconds = _judge(home, calls)
            raw = _commit_raw(home, other, calls)
        ours.append(calls / seconds)
        ratios.append(raw / seconds)
    return {
        "feedback_per_s": round(statistics.median(ours)),
        "feedback_by_raw": round(statistics.median(ratios), 3),
    }


def _judge(home: Home, calls: int) -> float:
    with Log(home.path) as log:
        run = log.record(_asked(0, 1_000), "yes")
        log.flush()
        return _timed(calls, lambda: log.feedback(run, key="thumbs", score=1))


def _timed(calls: int, call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _commit_raw(home: Home, other: Home, calls: int) -> float:
    with closing(connect(home)) as source:
        rows = iter(source.execute("SELECT * FROM feedback").fetchall())
    with closing(connect(other)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        marks = ", ".join("?" * (len(FEEDBACK_COLUMNS) + 1))  # and its seal

        def commit() -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"INSERT INTO feedback VALUES ({marks})", next(rows))
            connection.execute("COMMIT")

        return _timed(calls, commit)


def disk(size: int, conversations: int = 100, turns: int = 40) -> float:
    """Bytes of a closed home's database by the bytes of its distinct text."""
    text = 0
    with _home() as home:
        with Log(home.path) as log:
            for c in range(conversations):
                said: list[dict[str, Any]] = []
                for t in range(turns):
                    question, reply = (f"{c} {t} {w} ".ljust(size, w) for w in "qa")
                    said.append({"role": "user", "content": question})
                    log.record(said, reply, model="m", thread_id=f"thread-{c}", user_id="u")
                    said.append({"role": "assistant", "content": reply})
                    text += len(question) + len(reply)
                log.flush()
        files = [file for file in home.path.iterdir() if file.name.startswith("agentpref.db")]
        return round(sum(file.stat().st_size for file in files) / text, 3)


@contextmanager
def _home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as folder:
        home = Home.create(Path(folder) / "home")
        connect(home).close()
        yield home


if __name__ == "__main__":
    main()
