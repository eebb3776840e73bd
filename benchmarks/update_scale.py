"""What an update costs on a large home: until it trains, and to say that there is nothing new.

Two homes have the same live revision and the same new judgements; one has 1,000 runs from before,
the other 500,000, with two judgements for every five runs, all of them learned. Each figure is
taken in a process of its own, three times, the homes in turn; the medians count. Seconds are those
of the processor, as the machine may be shared. Making the large home takes two minutes. Run as
`python -m benchmarks.update_scale`; `--runs` makes a smaller one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import agentpref
from agentpref.config import GateSettings, UpdateConfig
from agentpref.home import Home
from agentpref.learn.process import settling
from agentpref.prefer.catalog import Catalog
from agentpref.record.database import connect, transaction
from agentpref.record.messages import Linker, Node, RunRow, new_id, run_row
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.types import Comparison, Feedback, Prompt, Run
from benchmarks._report import Target, at_most, print_report

SMALL, LARGE = 1_000, 500_000
NEW = 200
REPEATS = 3
CONFIG = UpdateConfig(
    epochs=1,
    gate=GateSettings(
        max_old_pairs=200,
        kl_budget=1e3,
        distinct_floor=0.0,
        length_ratio=(1e-3, 1e3),
        retention_margin=1.0,
    ),
)
_AT_ONCE = 5_000
_FAST = ("PRAGMA synchronous = OFF", "PRAGMA foreign_keys = OFF", "PRAGMA cache_size = -1000000")


def main() -> None:
    """Make the homes, measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=LARGE)
    parser.add_argument("--folder", type=Path, help="where to write [default: a temporary folder]")
    parser.add_argument("--update", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.update:
        return print(json.dumps(update(options.update)))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        figures = measure(Path(scratch), options.runs)
    for name, value in figures.items():
        print(f"{name:<32} {value:12,.3f}")
    return print_report("update_scale", figures, targets(figures))


def targets(figures: Mapping[str, float]) -> list[Target]:
    """How much later and heavier an update of the large home may be."""
    return [
        at_most("first_step_later_s", figures["first_step_later_s"], 3),
        at_most("first_step_heavier_mb", figures["first_step_heavier_mb"], 150),
        at_most("nothing_new_later_s", figures["nothing_new_later_s"], 3),
        at_most("nothing_new_heavier_mb", figures["nothing_new_heavier_mb"], 150),
    ]


def measure(folder: Path, runs: int) -> dict[str, float]:
    """Take every figure, in seconds and megabytes."""
    homes = {"small": folder / "small", "large": folder / "large"}
    figures: dict[str, float] = {}
    for name, count in (("small", SMALL), ("large", runs)):
        figures |= {f"{name}_{k}": v for k, v in make(homes[name], count).items()}
    for what in ("first_step", "nothing_new"):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in homes}
        for number in range(REPEATS):
            for name, home in homes.items():
                if number == 0 and what == "first_step":
                    judge(home, NEW, seed=1)
                elif number == 0:
                    agentpref.update(home, model="tiny", config=CONFIG)
                found[name].append(_in_a_process(home))
        for unit, digits in (("s", 3), ("mb", 1)):
            small, large = (
                statistics.median(one[unit] for one in found[name]) for name in ("small", "large")
            )
            comparison = "later" if unit == "s" else "heavier"
            figures |= {
                f"{what}_small_{unit}": round(small, digits),
                f"{what}_large_{unit}": round(large, digits),
                f"{what}_{comparison}_{unit}": round(large - small, digits),
            }
    return figures


class _Enough(Exception):
    """Ends an update at its first step; it leaves everything as it was."""


def update(home: Path) -> dict[str, float]:
    """Update as the command does, to the first step, or until nothing is new: time and memory."""
    started = time.process_time()

    def note(stage: str, done: int, total: int) -> None:
        if stage == "train":
            raise _Enough

    with suppress(_Enough):
        agentpref.update(home, model="tiny", config=CONFIG, progress=settling(note))
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))  # rusage has the parent's
    return {"s": time.process_time() - started, "mb": int(peak.split()[1]) / 1000}


def make(folder: Path, runs: int) -> dict[str, float]:
    """Make a home whose live revision has learned two judgements for every five runs."""
    home = Home.create(folder)
    judge(folder, NEW, seed=0)
    report = agentpref.update(folder, model="tiny", config=CONFIG)
    assert report.revision is not None, report.reasons
    if report.verdict != "promoted":
        Registry(home).promote(report.revision)
    started = time.perf_counter()
    with closing(connect(home)) as connection:
        for setting in _FAST:
            connection.execute(setting)
        source = _prompts(runs // 5)
        while some := list(islice(source, _AT_ONCE)):
            _write(Store(connection), some)
        made = time.perf_counter() - started
        started = time.perf_counter()
        catalog = Catalog(connection, "default", held_out=CONFIG.held_out)
        catalog.refresh()
        listed = time.perf_counter() - started
        with transaction(connection):
            connection.executemany(
                "INSERT OR IGNORE INTO update_pair (update_id, pair_id, role) VALUES (?, ?, ?)",
                [
                    (report.update_id, one.example_id, "held_out" if one.held_out else "new")
                    for one in catalog.entries()
                ],
            )
        (said,) = connection.execute(
            "SELECT (SELECT count(*) FROM feedback) + (SELECT count(*) FROM comparison)"
        ).fetchone()
        (kept,) = connection.execute("SELECT count(*) FROM run").fetchone()
    return {"runs": kept, "judgements": said, "make_s": made, "first_listing_s": listed}


def judge(home: Path, count: int, *, seed: int) -> None:
    """Log comparisons of two answers each, which no update has seen."""
    with agentpref.Log(home) as log:
        for number in range(count):
            asked = [{"role": "user", "content": f"Question {number} of day {seed}?"}]
            good, bad = (log.record(asked, text) for text in ("Yes, it is.", "No, never."))
            log.compare(good, bad, winner="a")


Said = tuple[list[RunRow], "Feedback | Comparison"]


def _prompts(count: int) -> Iterator[list[Said]]:
    """Prompts with five runs for two judgements: a comparison, a thumb, and two without."""
    linker, at = Linker(), time.time() - 86_400.0
    for number in range(count):
        runs = [_run(linker, f"{number} {part}", at + number / count) for part in ("a", "b")]
        again = _answered(linker, runs[0], f"Another answer to {number}.")
        others = [_run(linker, f"{number} {part}", at) for part in ("c", "d")]
        compared = Comparison(
            new_id(), runs[0].created_at, runs[0].run_id, again.run_id, "b", user_id="u"
        )
        up = float(number % 2)
        thumb = Feedback(
            new_id(), runs[1].run_id, runs[1].created_at, "thumbs", up, scale=(0.0, 1.0)
        )
        yield [([runs[0], again, *others], compared), ([runs[1]], thumb)]


def _run(linker: Linker, name: str, at: float) -> RunRow:
    asked = linker.child(None, {"role": "user", "content": f"What of {name}? " + "word " * 20})
    answer = linker.child(asked.id, {"role": "assistant", "content": f"It is {name}. " * 3})
    return _row(asked, answer, at)


def _answered(linker: Linker, run: RunRow, text: str) -> RunRow:
    asked = run.nodes[0]
    return _row(
        asked, linker.child(asked.id, {"role": "assistant", "content": text}), run.created_at
    )


def _row(asked: Node, answer: Node, at: float) -> RunRow:
    run = Run(new_id(), "default", at, Prompt(asked.id, ()), {}, "some-model", "base")
    return run_row(run, (asked, answer))


def _write(store: Store, some: list[list[Said]]) -> None:
    with transaction(store._connection):
        store.add_runs([run for said in some for runs, _ in said for run in runs])
        for said in some:
            for _, judgement in said:
                if isinstance(judgement, Feedback):
                    store.add_feedback(judgement)
                else:
                    store.add_comparison(judgement)


def _in_a_process(home: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.update_scale", "--update", str(home)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
