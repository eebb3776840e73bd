"""Eight processes of four threads log to one home for a minute: is everything there, and how fast?

Each thread records five answers to a prompt, gives one a thumb, and sometimes corrects one or
compares two. Judgements wait for the disk, so no queue fills up. Afterwards the benchmark looks for
every run that was recorded and every judgement that was acknowledged, and verifies the home. Run as
`python -m benchmarks.record_soak`; it exits 1 if anything is missing or wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from agentpref import Log
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.store import Store
from benchmarks._report import Target, at_least, at_most, print_report

PROCESSES, THREADS = 8, 4
ANSWERS = 5
KEYS = {"run": "run_id", "feedback": "feedback_id", "comparison": "comparison_id"}


Logged: TypeAlias = "defaultdict[str, list[str]]"
Spent: TypeAlias = "defaultdict[str, list[int]]"


@dataclass(slots=True)
class Told:
    """What one thread logged: ids by table, and nanoseconds by call."""

    ids: Logged = field(default_factory=lambda: defaultdict(list))
    spent: Spent = field(default_factory=lambda: defaultdict(list))

    def call(self, table: str, what: Callable[..., str], *given: Any, **named: Any) -> str:
        """Call a method of the log; note the id that it returned and the time it took."""
        start = time.perf_counter_ns()
        name = what(*given, **named)
        self.spent[what.__name__].append(time.perf_counter_ns() - start)
        self.ids[table].append(name)
        return name


def main() -> None:
    """Soak, check, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--folder", type=Path, help="where to write [default: a temporary folder]")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return print(json.dumps(work(options.worker, options.threads, options.seconds)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        home = Home.create(Path(folder) / "home")
        connect(home).close()
        reports = _soak(home, options.processes, options.threads, options.seconds)
        figures = _times(reports, options.seconds) | losses(home, reports)
    for name, value in figures.items():
        print(f"{name:<24} {value:14,.2f}")
    promised = targets(figures)
    print_report("record_soak", figures, promised)
    raise SystemExit(0 if all(target.holds for target in promised) else 1)


def targets(figures: dict[str, float]) -> list[Target]:
    """The promises: no error (a worker that fails ends the run), no loss, no problem."""
    nothing = ("lost_runs", "lost_judgements", "dropped", "problems")
    return [
        *(at_most(name, figures[name], 0) for name in nothing),
        at_least("judgements", figures["judgements"], 1),
    ]


def work(folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Log from some threads of this process until the time is over; return what was logged."""
    end = time.monotonic() + seconds
    with Log(folder) as log, ThreadPoolExecutor(threads) as crew:
        told = list(crew.map(lambda seed: _load(log, random.Random(seed), end), range(threads)))
        log.flush()
    ids: Logged = defaultdict(list)
    spent: Spent = defaultdict(list)
    for one in told:
        for table in one.ids:
            ids[table] += one.ids[table]
        for call in one.spent:
            spent[call] += one.spent[call]
    return {"ids": ids, "spent": spent, "dropped": sum(log.dropped.values())}


def _load(log: Log, rng: random.Random, end: float) -> Told:
    told = Told()
    while time.monotonic() < end:
        asked = [{"role": "user", "content": f"{rng.getrandbits(64):x} {'why? ' * 150}"}]
        answers = [f"{rng.getrandbits(64):x} {'because. ' * 20}" for _ in range(ANSWERS)]
        runs = [told.call("run", log.record, asked, answer) for answer in answers]
        told.call("feedback", log.feedback, rng.choice(runs), key="thumbs", score=1)
        if rng.random() < 0.2:
            told.call("feedback", log.correct, rng.choice(runs), "because it is so")
        if rng.random() < 0.2:
            told.call("comparison", log.compare, *rng.sample(runs, 2), winner="a")
    return told


def _soak(home: Home, processes: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.record_soak", "--worker", str(home.path)]
    command += ["--threads", str(threads), "--seconds", str(seconds)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a process failed; its error is above")
    return [json.loads(each) for each in said]


def _times(reports: Sequence[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Calls a second of all threads together, and microseconds of one call."""
    figures: dict[str, float] = {}
    for call in ("record", "feedback", "correct", "compare"):
        spent = sorted(took for report in reports for took in report["spent"].get(call, ()))
        figures[f"{call}_per_second"] = round(len(spent) / seconds, 1)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("worst", 1.0)):
            took = spent[min(len(spent) - 1, int(share * len(spent)))] if spent else 0
            figures[f"{call}_{name}_us"] = took / 1e3
    return figures


def losses(home: Home, reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Look for everything recorded and acknowledged, and verify the home."""
    with closing(connect(home, readonly=True)) as connection:
        lost = {}
        for table, key in KEYS.items():
            logged = {name for report in reports for name in report["ids"].get(table, ())}
            lost[table] = len(logged - {i for (i,) in connection.execute(_all(table, key))})
        found = Store(connection).stats()
        problems = examine(connection).problems
    return {
        "runs": found["runs"],
        "judgements": found["feedback"] + found["comparisons"],
        "lost_runs": lost["run"],
        "lost_judgements": lost["feedback"] + lost["comparison"],
        "dropped": sum(report["dropped"] for report in reports),
        "problems": len(problems),
    }


def _all(table: str, key: str) -> str:
    return f"SELECT {key} FROM {table}"


if __name__ == "__main__":
    main()
