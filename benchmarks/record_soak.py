"""Many processes and threads that write to one home for a while: does all of it get there?

Each thread records conversations that grow, and judges, corrects and compares what it recorded;
each process tells what it was promised. Afterwards every run and every judgement must be in the
home, `verify` must find nothing, and no log may have dropped a run.

Run as `python -m benchmarks.record_soak`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentpref import Log
from agentpref.record.database import connect
from agentpref.record.home import Home
from agentpref.record.keeper import drain
from agentpref.record.store import Store
from benchmarks._report import at_least, at_most, print_report

PAUSE_SECONDS = 0.001
"""What a thread does between two turns of its conversation: hosts do not only log."""


@dataclass
class Told:
    """What one process was told."""

    runs: list[str] = field(default_factory=list)
    judgements: list[str] = field(default_factory=list)
    record_us: list[float] = field(default_factory=list)
    feedback_ms: list[float] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Write, look, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=4, help="in each process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Home.create(Path(folder) / "home")
        told = write(home, options.seconds, options.processes, options.threads)
        figures = look(home, told, options.seconds)
    for name, value in figures.items():
        print(f"{name:<24} {value:12.2f}")
    print_report(
        "record_soak",
        figures,
        [
            *(at_most(name, figures[name], 0) for name in ("lost", "dropped", "problems")),
            at_least("runs", figures["runs"], 1),
        ],
    )


def write(home: Home, seconds: float, processes: int, threads: int) -> list[Told]:
    """Let processes write until their time is over, and return what each was told."""
    connect(home).close()
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        work = [(home.path, seconds, threads)] * processes
        return pool.starmap(_process, work, chunksize=1)


def _process(home: Path, seconds: float, threads: int) -> Told:
    told = [Told() for _ in range(threads)]
    end = time.monotonic() + seconds
    with Log(home) as log:
        working = [threading.Thread(target=_work, args=(log, end, mine)) for mine in told]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
    return _together(told, log.dropped)


def _together(told: list[Told], dropped: dict[str, int]) -> Told:
    lists = ("runs", "judgements", "record_us", "feedback_ms")
    joined = {name: [one for each in told for one in getattr(each, name)] for name in lists}
    return Told(**joined, dropped=dropped)


def _work(log: Log, end: float, told: Told) -> None:
    turn = 0
    while time.monotonic() < end:
        said: list[dict[str, Any]] = [{"role": "user", "content": f"{id(told)} {turn} ".ljust(400)}]
        for _ in range(5):
            turn += 1
            runs = [
                _record(log, said, f"{id(told)} {turn} {way} ".ljust(400), told) for way in "ab"
            ]
            _judge(log, runs, turn, told)
            said += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
            time.sleep(PAUSE_SECONDS)


def _record(log: Log, said: list[dict[str, Any]], answer: str, told: Told) -> str:
    start = time.perf_counter()
    run = log.record(said, answer, thread_id=str(id(told)), user_id="u")
    told.record_us.append(1e6 * (time.perf_counter() - start))
    told.runs.append(run)
    return run


def _judge(log: Log, runs: list[str], turn: int, told: Told) -> None:
    start = time.perf_counter()
    if turn % 3 == 0:
        told.judgements.append(log.compare(*runs, winner="a"))
    elif turn % 3 == 1:
        told.judgements.append(log.feedback(runs[0], key="thumbs", score=turn % 2))
    else:
        told.judgements.append(log.correct(runs[1], f"{turn} better"))
    told.feedback_ms.append(1e3 * (time.perf_counter() - start))


def look(home: Home, told: list[Told], seconds: float) -> dict[str, float]:
    """Count what is in the home, and what of the promised is not."""
    drain(home)
    with closing(connect(home, readonly=True)) as connection:
        held = {
            key
            for table in ("run", "feedback", "comparison")
            for (key,) in connection.execute(f"SELECT {table}_id FROM {table}")
        }
        problems = len(Store(connection).verify())
    promised = [key for each in told for key in (*each.runs, *each.judgements)]
    runs = sum(len(each.runs) for each in told)
    judged = sum(len(each.judgements) for each in told)
    figures: dict[str, float] = {
        "runs": runs,
        "judgements": judged,
        "lost": len(set(promised) - held),
        "dropped": sum(sum(each.dropped.values()) for each in told),
        "problems": problems,
        "runs_per_s": round(runs / seconds),
        "judgements_per_s": round(judged / seconds),
    }
    figures |= _percentiles("record_us", [value for each in told for value in each.record_us])
    return figures | _percentiles("feedback_ms", [v for each in told for v in each.feedback_ms])


def _percentiles(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"{name}_p{share}": round(ordered[len(ordered) * share // 100], 2) for share in (50, 99)
    }


if __name__ == "__main__":
    main()
