"""How long a click on the review page waits, in a home of half a million runs.

    python -m benchmarks.review

A person answers pairs one after the other, and reads each for a while. Measured is what the page
waits for: logging the answer, and the next question. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from agentpref import Log
from agentpref.home import Home
from agentpref_adapters.review.desk import Desks
from benchmarks import large_home
from benchmarks._report import at_most, print_report

ROWS = 1_560_000  # of all tables, for 500,000 runs
UNDECIDED = 1_500


def main() -> None:
    """Measure in a home that is made for it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--reading", type=float, default=0.3, help="seconds that a pair is read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "home", options.rows, options.pairs, options.reading)
    print_report(
        "review",
        found,
        [
            at_most("a click, mean without the first, seconds", found["mean"], 0.05),
            at_most("a click, longest without the first, seconds", found["longest"], 0.05),
        ],
    )


def measure(folder: Path, rows: int, pairs: int, reading: float) -> dict[str, Any]:
    """Seconds that a click waits; the first one opens the home and chooses the first questions."""
    large_home.make(folder, rows, lambda said: None)
    with Log(folder) as log:
        for number in range(UNDECIDED):
            asked = [{"role": "user", "content": f"What of {number}?"}]
            for text in ("Just that.", "Well, that is a long story."):
                log.record(asked, f"{text} {number}", tags=["chat"])
    waited = []
    with Desks(Home.open(folder)) as desks:
        for _ in range(pairs):
            begun = time.perf_counter()
            question = desks.at("ana", lambda desk: desk.question())
            assert question is not None
            name = question.id
            desks.at("ana", lambda desk: desk.answer(name, "a", None))  # noqa: B023
            waited.append(time.perf_counter() - begun)
            time.sleep(reading)
    first, *later = waited
    return {
        "pairs": pairs,
        "first": first,
        "mean": fmean(later),
        "median": median(later),
        "longest": max(later),
    }


if __name__ == "__main__":
    main()
