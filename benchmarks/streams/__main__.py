"""Streams of nights, arm by arm: run, resume, and make the table and the plots.

    python -m benchmarks.streams                     all that has no row yet, then the report
    python -m benchmarks.streams --streams S1,S2 --arms naive,full,joint --seeds 0,1 --hours 2
    python -m benchmarks.streams --model FOLDER --streams S3-tagged --arms naive,full,joint
    python -m benchmarks.streams --set learning_rate=1e-3 --set loss.beta=0.3
    python -m benchmarks.streams report

A night that has a row is never lived again. One process works at a time, at a low priority. The
last line of the output is one JSON object with the promises that hold.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from agentpref.config import UpdateConfig
from benchmarks._report import print_report
from benchmarks.streams import catalogue, table
from benchmarks.streams.arms import ARMS, FROZEN
from benchmarks.streams.catalogue import Sizes
from benchmarks.streams.life import Plan, live_all
from benchmarks.streams.promises import targets
from benchmarks.streams.rows import Rows, say


def main() -> None:
    """Run what was asked for, and report on all rows that there are."""
    options = _options()
    if options.what == "run":
        _run(options)
    rows = list(Rows(options.rows))
    if not rows:
        raise SystemExit(f"error: {options.rows} has no rows; run some nights first")
    options.out.mkdir(parents=True, exist_ok=True)
    promises = targets(rows)
    page = table.document(rows, promises, _plots(options.out, rows))
    (options.out / "streams.md").write_text(page, encoding="utf-8")
    say(f"wrote {options.out / 'streams.md'}")
    print_report("streams", table.figures(rows), promises)


def _run(options: argparse.Namespace) -> None:
    from filelock import FileLock, Timeout

    from benchmarks.streams.measure import Meter

    os.nice(10)
    warnings.simplefilter("ignore", FutureWarning)  # of peft, at every update
    until = None if options.hours is None else time.monotonic() + 3600 * options.hours
    is_late: Callable[[], bool] = lambda: until is not None and time.monotonic() > until  # noqa: E731
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        with (
            FileLock(options.work / "lock", timeout=0),
            Meter(options.model, options.work) as meter,
        ):
            rows = Rows(options.rows)
            work = options.work
            if not live_all(
                _plans(options), meter, rows, work, nights=options.nights, is_late=is_late
            ):
                say("the time is up; the same command goes on")
    except Timeout as error:
        raise SystemExit(f"error: another process works in {options.work}; wait for it") from error


def _plans(options: argparse.Namespace) -> list[Plan]:
    """All lives that were asked for: seed after seed, so that an early end has some of each."""
    sizes = Sizes(options.new, options.proving, options.measured)
    return [
        Plan(options.model, stream, order, seed, arm, sizes, options.settings)
        for seed, order, stream, arm in product(
            options.seeds, options.orders, options.streams, [FROZEN, *options.arms]
        )
    ]


def _plots(out: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The plots, or none where matplotlib is not installed."""
    try:
        from benchmarks.streams import plots
    except ImportError:
        say("no plots: they need matplotlib; install it with: pip install matplotlib")
        return []
    return plots.draw(rows, out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = Sizes()
    add = parser.add_argument
    add("what", nargs="?", choices=("run", "report"), default="run")
    add("--streams", type=_several(catalogue.STREAMS), default=[*catalogue.STREAMS])
    add("--arms", type=_several(ARMS), default=[*ARMS], help=", ".join(ARMS))
    add("--orders", type=_several(catalogue.ORDERS), default=["forward"])
    add("--seeds", type=lambda text: [*map(int, text.split(","))], default=[0])
    add("--model", default="tiny", help="any that an update takes (default: tiny)")
    add("--nights", type=int, help="only so many nights of each stream")
    add("--hours", type=float, help="begin no night after so many hours")
    add("--new", type=int, default=sizes.new, help=f"judgements that train ({sizes.new})")
    add("--proving", type=int, default=sizes.proving, help=f"those that prove ({sizes.proving})")
    add("--measured", type=int, default=sizes.measured, help=f"never logged ({sizes.measured})")
    add("--set", dest="set", action="append", default=[], metavar="KEY=VALUE", help="for all arms")
    add("--rows", type=Path, default=Path("benchmarks/data/streams.jsonl"))
    add("--out", type=Path, default=Path("docs"), help="folder of the table and the plots")
    add("--work", type=Path, default=Path(".bench-streams"), help="folder of the homes")
    options = parser.parse_args()
    options.settings = _settings(options.set)
    return options


def _settings(given: list[str]) -> dict[str, Any]:
    """``loss.beta=0.3`` and the like as nested values, checked."""
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        *groups, key = name.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        try:
            place[key] = json.loads(value)
        except ValueError:
            place[key] = value
    UpdateConfig.from_mapping(found)
    return found


def _several(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()
