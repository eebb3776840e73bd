"""Reading a home as a notebook does: the time for 100,000 runs and 10,000 pairs, and the memory.

Each run has 0.6 kB of text, and one prompt in five a comparison. A fresh process reads them. The
figures are its processor time in seconds, and its largest size in MB, to compare with the first:
that after the imports and one run. Run as `python -m benchmarks.reading`, on Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import orjson

from agentpref.home import Home
from agentpref.record.database import connect, transaction
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.store import Store
from agentpref.types import Comparison, Run
from benchmarks._report import at_most, print_report

READ = """
import json, sys, time
import agentpref

def size():
    lines = open("/proc/self/status").read().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))  # rusage has the parent's
    return int(peak.split()[1]) / 1024

home, found = agentpref.Home.open(sys.argv[1]), {}
list(home.runs(limit=1)), list(home.pairs(limit=1))
found["start_mb"] = size()
for kind in ("runs", "pairs"):
    start = time.process_time()
    found[kind] = sum(1 for _ in getattr(home, kind)())
    found[kind + "_s"], found[kind + "_mb"] = time.process_time() - start, size()
print(json.dumps(found))
"""
BATCH = 5000


def main() -> None:
    """Make a home, read it, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000, help="how many runs")
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder) / "home", count)
        command = [sys.executable, "-c", READ, str(home.path)]
        done = subprocess.run(command, check=True, capture_output=True)
    figures = {name: round(value, 1) for name, value in orjson.loads(done.stdout).items()}
    for name, value in figures.items():
        print(f"{name:<10} {value:9.1f}")
    grown = figures["pairs_mb"] - figures["start_mb"]
    targets = [
        at_most("grown_mb", round(grown, 1), 20),
        at_most("runs_s", figures["runs_s"], 5e-5 * count),
    ]
    print_report("reading", figures, targets)


def make_home(folder: Path, count: int) -> Home:
    """Make a home of ``count`` runs, two answers to each prompt; one prompt in five is judged."""
    home = Home.create(folder)
    with closing(connect(home)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        store = Store(connection)
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            with transaction(connection):
                store.add_runs([run_row(_run(number)) for number in numbers])
                for n in numbers[::10]:
                    store.add_comparison(
                        Comparison(f"c{n}", 1.7e9 + n, f"r{n:08d}", f"r{n + 1:08d}", "a")
                    )
    return home


def _run(number: int) -> Run:
    asked = {"role": "user", "content": f"question {number // 2} {'word ' * 60}"}
    said = {"role": "assistant", "content": f"answer {number} {'text ' * 60}"}
    thread = f"t{number // 20}"
    prompt = prompt_of((asked,))
    return Run(f"r{number:08d}", "default", 1.7e9 + number, prompt, said, thread_id=thread)


if __name__ == "__main__":
    main()
