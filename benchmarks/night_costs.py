"""What a night costs: memory, disk and minutes of one update, by the size of the model.

Models have random weights in the shapes of real ones (time and memory depend on the shape alone)
and the bundled model's tokenizer; a folder of your own can be given instead. A night is ``--new``
comparisons, prompts of about 125 tokens and answers of about 47, with the default settings but one
epoch: a fifth is held out, the rest is trained, and both policies are evaluated. It runs
``agentpref update`` in a process of its own, and reads its peak memory from the system (Linux).

Random weights hardly end their answers, so the gate's probes are as long as they may be; answers of
a trained model are shorter. Run as ``python -m benchmarks.night_costs --models large 0.5b``; the
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import agentpref
from agentpref.home import Home
from benchmarks._report import print_report
from benchmarks.train.shapes import SHAPES

PROMPT_WORDS, ANSWER_WORDS = 80, 30
_WORDS = [
    "the",
    "tide",
    "comes",
    "in",
    "twice",
    "a",
    "day",
    "and",
    "goes",
    "out",
    "while",
    "boats",
    "wait",
]


class Cost(NamedTuple):
    """What one update took."""

    seconds: float
    training_seconds: float
    peak_mb: float
    adapter_mb: float
    checkpoint_mb: float


def main() -> None:
    """Measure each model, print a line for it, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["large", "0.5b"], metavar="SHAPE|FOLDER")
    parser.add_argument("--new", type=int, default=300, help="comparisons of the night")
    options = parser.parse_args()
    figures = {}
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model" if model in SHAPES else Path(model)
            if model in SHAPES:
                command = [sys.executable, "-m", "benchmarks.train.shapes", model, str(place)]
                subprocess.run(command, check=True)
            cost = night(place, Path(folder) / "home", options.new)
            figures[model] = cost._asdict()
            print(f"{model}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures[model].items()))
    print_report("night_costs", figures, [])


def night(model: Path, folder: Path, new: int) -> Cost:
    """Fill a home with comparisons, and update once."""
    home = Home.create(folder)
    fill(home, new)
    command = [sys.executable, "-m", "agentpref_cli", "update", "--model", str(model)]
    command += [
        "--home",
        str(home.path),
        "--json",
        "--set",
        "epochs=1",
        "--set",
        "gate.cross_fit_below=0",
        "--no-promote",
    ]
    started, largest = time.perf_counter(), 0
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(command, stdout=printed)
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            time.sleep(0.2)
            largest = max(largest, _size(home.training))
        seconds, (_, status, used) = time.perf_counter() - started, ended
        printed.seek(0)
        report = json.load(printed)
    if report["verdict"] not in ("passed", "refused", "insufficient"):
        raise SystemExit(f"the update of {model} ended with {report['verdict']}, status {status}")
    training = report["training"]["seconds"]
    adapters = _size(home.adapters)
    return Cost(seconds, training, used.ru_maxrss / 1024, adapters / 1e6, largest / 1e6)


def fill(home: Home, new: int) -> None:
    """Log two answers to each prompt, and prefer one."""
    rng = random.Random(0)
    with agentpref.Log(home.path) as log:
        for _ in range(new):
            asked = [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=PROMPT_WORDS))}]
            a, b = (log.record(asked, " ".join(rng.choices(_WORDS, k=ANSWER_WORDS))) for _ in "ab")
            log.compare(a, b, winner="a")


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):  # nothing, if there is no such folder yet
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


if __name__ == "__main__":
    main()
