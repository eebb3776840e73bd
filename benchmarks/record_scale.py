"""How a large home answers: counts, the pairs of a day, all pairs, a sampled check.

``large_home`` makes the home (two million rows: 700,000 runs, 50,000 judgements, 1.2 GB, half a
minute), which is removed afterwards. Each figure is taken in two fresh processes: ``cold``, after
the system was told to drop the file from its cache (the disk's own cache stays), and ``warm``,
right after that. Opening the database counts, imports do not. Run as
`python -m benchmarks.record_scale`;
`--home FOLDER` makes the home there, or finds it, and keeps it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from agentpref import Log
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.store import Store
from benchmarks import large_home
from benchmarks._report import Target, at_most, print_report

HELD_OUT = 0.2
SAMPLE = 1_000
JUDGEMENTS_TIMED = 100


def main() -> None:
    """Make the home, measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_150_000)
    parser.add_argument("--folder", type=Path, help="where to write [default: a temporary folder]")
    parser.add_argument("--home", type=Path, help="a home to make, or to find, and to keep")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return print(TASKS[options.task](Home.open(options.home)))
    with _place(options.home, options.folder) as folder:
        figures = _made(folder, options.rows) | measure(Home.open(folder))
    for name, value in figures.items():
        print(f"{name:<28} {value:14,.4f}")
    return print_report("record_scale", figures, targets(figures))


def targets(figures: Mapping[str, float]) -> list[Target]:
    """How long a person waits for an answer, and an app for its log."""
    return [
        at_most("stats_warm_s", figures["stats_warm_s"], 1),
        at_most("pairs_of_a_day_cold_s", figures["pairs_of_a_day_cold_s"], 5),
        at_most("pairs_of_a_day_warm_s", figures["pairs_of_a_day_warm_s"], 1),
        at_most("verify_sample_cold_s", figures["verify_sample_cold_s"], 5),
        at_most("open_log_cold_s", figures["open_log_cold_s"], 0.5),
    ]


def measure(home: Home) -> dict[str, float]:
    """Take every figure in seconds, cold and then warm."""
    figures: dict[str, float] = {}
    for name in TASKS:
        _forget(home.database)
        figures[f"{name}_cold_s"] = _in_a_process(name, home)
        figures[f"{name}_warm_s"] = _in_a_process(name, home)
    return figures


def _made(folder: Path, rows: int) -> dict[str, float]:
    """Make the home if there is none; measure its size."""
    start = time.perf_counter()
    if not (folder / "agentpref.db").exists():
        large_home.make(folder, rows)
    took = time.perf_counter() - start
    home = Home.open(folder)
    with closing(connect(home, readonly=True)) as connection:
        found = Store(connection).stats()
        (messages,) = connection.execute("SELECT max(rowid) FROM message").fetchone()
    said = found["feedback"] + found["comparisons"]
    return {
        "make_s": took,
        "rows": messages + found["runs"] + said,
        "runs": found["runs"],
        "judgements": said,
        "gigabytes": home.database.stat().st_size / 1e9,
    }


def _stats(home: Home) -> float:
    with _timed() as took, closing(connect(home, readonly=True)) as connection:
        Store(connection).stats()
    return took()


def _day(home: Home) -> float:
    """Build the pairs of the newest 2,000 judgements' prompts, of all namespaces."""
    since = _newest(home, large_home.JUDGEMENTS_PER_DAY)
    with _timed() as took, closing(connect(home, readonly=True)) as connection:
        for name in Store(connection).namespaces():
            read_examples(Store(connection), name, held_out=HELD_OUT, since=since)
    return took()


def _all_pairs(home: Home) -> float:
    with _timed() as took, closing(connect(home, readonly=True)) as connection:
        for name in Store(connection).namespaces():
            read_examples(Store(connection), name, held_out=HELD_OUT)
    return took()


def _verify(home: Home) -> float:
    with _timed() as took, closing(connect(home, readonly=True)) as connection:
        problems = examine(connection, sample=SAMPLE).problems
    assert problems == [], problems
    return took()


def _open_log(home: Home) -> float:
    with _timed() as took:
        log = Log(home.path)
    log.close()
    return took()


def _record_one(home: Home) -> float:
    """Record one run, until it is on disk."""
    with Log(home.path) as log:
        with _timed() as took:
            log.record([{"role": "user", "content": f"at {time.time()}?"}], "Now.")
            log.flush()
        return took()


def _feedback_one(home: Home) -> float:
    """Give feedback, each on disk before the next; return the median time."""
    with Log(home.path) as log:
        run = log.record([{"role": "user", "content": f"at {time.time()}?"}], "Now.")
        log.flush()
        spent = []
        for _ in range(JUDGEMENTS_TIMED):
            with _timed() as took:
                log.feedback(run, key="thumbs", score=1)
            spent.append(took())
    return statistics.median(spent)


TASKS: Mapping[str, Callable[[Home], float]] = {
    "stats": _stats,
    "pairs_of_a_day": _day,
    "verify_sample": _verify,
    "open_log": _open_log,
    "record_one": _record_one,
    "feedback_one": _feedback_one,
    "all_pairs": _all_pairs,
}


def _newest(home: Home, count: int) -> float:
    """Return the time of the oldest of the newest ``count`` judgements."""
    query = """SELECT min(at) FROM (
        SELECT * FROM (SELECT created_at AS at FROM feedback ORDER BY at DESC LIMIT :count)
        UNION ALL
        SELECT * FROM (SELECT created_at AS at FROM comparison ORDER BY at DESC LIMIT :count)
        ORDER BY at DESC LIMIT :count)"""
    with closing(connect(home, readonly=True)) as connection:
        (at,) = connection.execute(query, {"count": count}).fetchone()
    return float(at)


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    start = time.perf_counter()
    end = start

    def took() -> float:
        return end - start

    yield took
    end = time.perf_counter()


@contextmanager
def _place(home: Path | None, folder: Path | None) -> Iterator[Path]:
    if home is not None:
        yield home
    else:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            yield Path(scratch) / "home"


def _in_a_process(task: str, home: Home) -> float:
    command = [sys.executable, "-m", "benchmarks.record_scale", "--home", str(home.path)]
    done = subprocess.run([*command, "--task", task], check=True, capture_output=True, text=True)
    return round(float(done.stdout), 5)


def _forget(file: Path) -> None:
    """Ask the system to drop a file from its cache, where it can."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
