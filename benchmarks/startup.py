"""Start-up times: `import agentpref`, the first logged run, and `agentpref --help`.

Each figure is the median over fresh interpreters, in milliseconds. The import is what it adds to
an interpreter that does nothing; the first run is timed from a missing home folder until the run
is on disk; the help is the whole command. Run as `python -m benchmarks.startup`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._report import at_most, print_report

FIRST_RUN = """
import sys, time
import agentpref
start = time.perf_counter()
log = agentpref.Log(sys.argv[1])
log.record([{"role": "user", "content": "Hello?"}], "Hello.")
log.flush()
print(time.perf_counter() - start)
log.close()
"""


def main() -> None:
    """Measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21, help="fresh interpreters per figure")
    figures = measure(parser.parse_args().repeats)
    for name, value in figures.items():
        print(f"{name:<22} {value:7.1f}")
    print_report(
        "startup",
        figures,
        [
            at_most("import_ms", figures["import_ms"], 50),
            at_most("first_run_ms", figures["first_run_ms"], 100),
            at_most("help_ms", figures["help_ms"], 250),
        ],
    )


def measure(repeats: int) -> dict[str, float]:
    """Return the medians in milliseconds; the four are taken in turn, so that noise is shared."""
    probes: dict[str, Callable[[], float]] = {
        "interpreter_ms": lambda: _wall("-c", "pass"),
        "interpreter_import_ms": lambda: _wall("-c", "import agentpref"),
        "first_run_ms": _first_run,
        "help_ms": lambda: _wall("-m", "agentpref_cli", "--help"),
    }
    for probe in probes.values():
        probe()  # compiles the byte code and warms the file cache
    rounds = [{name: probe() for name, probe in probes.items()} for _ in range(repeats)]
    medians = {name: 1000 * statistics.median(r[name] for r in rounds) for name in probes}
    added = medians["interpreter_import_ms"] - medians["interpreter_ms"]
    return {name: round(value, 1) for name, value in {"import_ms": added, **medians}.items()}


def _wall(*arguments: str) -> float:
    start = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - start


def _first_run() -> float:
    with tempfile.TemporaryDirectory() as folder:
        return float(_run("-c", FIRST_RUN, str(Path(folder) / "home")))


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    main()
