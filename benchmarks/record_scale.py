"""How a large home answers: counts, the pairs of a day, all pairs, a sampled check.

``large_home`` makes the home (two million rows: 700,000 runs, 50,000 judgements, 1.2 GB, half a
minute), which is removed afterwards. Each figure is taken in two fresh processes: ``cold``, after
the system was told to drop the file from its cache (the disk's own cache stays), and ``warm``,
right after that. Opening the database counts, imports do not. Of ``find_text`` and ``find_user``,
which read all runs, the processor's time is taken.

``writes`` fills a home of its own with 200,000 runs of two messages of 250 characters, 200 at a
time: processor time and bytes written for each run in the first and the last fifth, then bytes for
a run on its own, beside a row of the same text in a plain table (bytes on Linux only), then a fifth
more in a trace with a random id for each two runs.

Run as `python -m benchmarks.record_scale`; `--home FOLDER` makes the home there, or finds it, and
keeps it. `--writes` measures only the writes (half a minute).
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
from uuid import uuid4

from agentpref import Log
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.declared import undeclared
from agentpref.record.finding import Wanted
from agentpref.record.integrity import examine
from agentpref.record.messages import RunRow, new_id, prompt_of, run_row
from agentpref.record.spill import DurableWriter
from agentpref.record.store import Store
from agentpref.types import Run
from benchmarks import large_home
from benchmarks._report import Target, at_most, print_report

HELD_OUT = 0.2
SAMPLE = 1_000
JUDGEMENTS_TIMED = 100
SINGLES = 3_000  # some checkpoints fall among them
_IO = Path("/proc/self/io")


def main() -> None:
    """Make the home, measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_150_000)
    parser.add_argument("--folder", type=Path, help="where to write [default: a temporary folder]")
    parser.add_argument("--home", type=Path, help="a home to make, or to find, and to keep")
    parser.add_argument("--writes", action="store_true", help="measure only the writes")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return print(TASKS[options.task](Home.open(options.home)))
    with _place(None, options.folder) as folder:
        figures = writes(folder)
    if not options.writes:
        with _place(options.home, options.folder) as folder:
            figures |= _made(folder, options.rows) | measure(Home.open(folder))
    for name, value in figures.items():
        print(f"{name:<28} {value:14,.4f}")
    return print_report("record_scale", figures, targets(figures))


def targets(figures: Mapping[str, float]) -> list[Target]:
    """How long a person waits for an answer, and an app for its log."""
    limits = {
        "stats_warm_s": 1,
        "pairs_of_a_day_cold_s": 5,
        "pairs_of_a_day_warm_s": 1,
        "find_text_warm_s": 2,
        "find_user_warm_s": 1,
        "verify_sample_cold_s": 5,
        "open_log_cold_s": 0.5,
        "run_last_kb": 32,
        "single_kb": 74,
    }
    return [at_most(name, figures[name], most) for name, most in limits.items() if name in figures]


def writes(folder: Path, runs: int = 200_000) -> dict[str, float]:
    """Fill a new home; return µs and kB for each run, at first and at last, and by itself."""
    home = Home.create(folder)
    with closing(DurableWriter(home)) as writer:
        fifths = [_written(writer, start, runs // 5, 200) for start in range(0, runs, runs // 5)]
        single = _written(writer, runs, SINGLES, 1)
        traced = _written(writer, 2 * runs, runs // 5, 200, traced=True)
    with closing(connect(home)) as connection:
        connection.execute("CREATE TABLE plain (id TEXT PRIMARY KEY, at REAL, body TEXT)")
        before = _bytes_written()
        for n in range(SINGLES):
            connection.execute("INSERT INTO plain VALUES (?, ?, ?)", (new_id(), n, "x" * 560))
        plain = (_bytes_written() - before) / SINGLES / 1e3
    (first_us, first_kb), (last_us, last_kb) = fifths[0], fifths[-1]
    figures = {
        "run_first_us": first_us,
        "run_last_us": last_us,
        "run_last_by_first_us": last_us / first_us,
        "run_traced_us": traced[0],
        "single_us": single[0],
    }
    if _IO.exists():
        figures |= {"run_first_kb": first_kb, "run_last_kb": last_kb, "single_kb": single[1]}
        figures["run_traced_kb"] = traced[1]
        figures["plain_single_kb"] = plain
    return figures


def _written(
    writer: DurableWriter, start: int, runs: int, at_once: int, *, traced: bool = False
) -> tuple[float, float]:
    """Write runs; return the processor time (µs) and the bytes (kB) of each."""
    spent, before = 0.0, _bytes_written()
    for first in range(start, start + runs, at_once):
        traces = [str(uuid4()) if traced else None for _ in range(at_once // 2 + 1)]
        some = [_run(n, traces[n % at_once // 2]) for n in range(first, first + at_once)]
        begun = time.process_time()
        writer.write(some)
        spent += time.process_time() - begun
    return spent / runs * 1e6, (_bytes_written() - before) / runs / 1e3


def _run(n: int, trace_id: str | None) -> RunRow:
    prompt = prompt_of([{"role": "user", "content": f"question {n} ".ljust(250, "x")}])
    output = {"role": "assistant", "content": f"answer {n} ".ljust(250, "y")}
    return run_row(Run(new_id(), "default", time.time(), prompt, output, trace_id=trace_id))


def _bytes_written() -> int:
    """Count what this process has handed to ``write`` so far; 0 where the system does not."""
    if not _IO.exists():
        return 0
    return int(dict(line.split(": ") for line in _IO.read_text().splitlines())["wchar"])


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
        store = Store(connection)
        for name in store.namespaces():
            store.stats(name)
            undeclared(connection, name)
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


def _find_text(home: Home) -> float:
    """Look for a text that no run has, as `agentpref runs --text` does, in every namespace."""
    with _timed(time.process_time) as took, closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        for name in store.namespaces():
            assert not [*store.newest_runs(Wanted(name, text="nobody said this"), 20)]
    return took()


def _find_user(home: Home) -> float:
    """Look for the runs of a user who has none, as `agentpref runs --user` does."""
    with _timed(time.process_time) as took, closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        for name in store.namespaces():
            assert not [*store.newest_runs(Wanted(name, users=("nobody",)), 20)]
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
    "find_text": _find_text,
    "find_user": _find_user,
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
def _timed(clock: Callable[[], float] = time.perf_counter) -> Iterator[Callable[[], float]]:
    start = clock()
    end = start

    def took() -> float:
        return end - start

    yield took
    end = clock()


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
