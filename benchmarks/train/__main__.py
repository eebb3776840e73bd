"""How fast and how small training is beside TRL's DPOTrainer, at the same result.

Run as ``python -m benchmarks.train`` (all workloads on both CPU models: more than an hour; the
estimate is printed first). It can be run in pieces and goes on where it was broken off:

    python -m benchmarks.train --work DIR --models small --workloads 256:64
    python -m benchmarks.train --work DIR --resume
    python -m benchmarks.train --work DIR --nights          seven nights of +200 pairs only
    python -m benchmarks.train --work DIR --arithmetic      share of the plain GEMM rate only
    python -m benchmarks.train --work DIR --gpu             0.5 B and 1.5 B models on a GPU

Three arms do the same job: ours, a careful loop over peft (``careful.py``), and TRL, tuned and
stock; all have the same allocator settings. For each model and workload a gate comes first: in
float32 all arms must give the same loss and margin at every step and the same LoRA weights, else
nothing is timed and the exit code is 1. The last line is one JSON object; progress goes to stderr.
TRL comes with the extra ``dev``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._report import Target, print_report
from benchmarks.train import arithmetic, jobs, nights, ours, shapes, speed
from benchmarks.train.runs import Ledger, Machine, say

_LIBRARIES = ("torch", "transformers", "peft", "trl")
_GPU_WORKLOADS = ("64:256", "1024:128", "2048:64")


def main() -> None:
    """Measure what was asked for, and end with the JSON object."""
    options = _options()
    if find_spec("trl") is None:
        sys.exit("error: TRL is not installed; it needs Python 3.11: pip install 'agentpref[dev]'")
    ledger = Ledger(options.work / "runs.jsonl", resume=options.resume)
    machine = Machine(options.threads, options.gpu)
    bench = speed.Bench(
        machine,
        options.work,
        ledger,
        options.runs,
        dtype=options.dtype,
        pairs=options.pairs,
        stock_rounds=options.stock_runs,
    )
    say(f"{options.threads} threads; models, jobs and finished runs are in {options.work}")
    if options.nights:
        figures = nights.measure(bench, len(nights.TRAITS))
        _end(options, figures, nights.targets(figures), True)
    elif options.arithmetic:
        figures = arithmetic.measure(bench, options.models, options.workloads)
        _end(options, figures, arithmetic.targets(figures), True)
    else:
        measured, same = race(bench, options.models, options.workloads)
        _end(options, measured, list(speed.targets(measured, gpu=options.gpu)), same)


def race(
    bench: speed.Bench, models: list[str], workloads: list[str]
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Gate and time every model and workload; say whether every gate held."""
    minutes = speed.estimate(models, workloads, bench.rounds)
    say(f"about {minutes:.0f} minutes on an idle machine, less what the ledger has")
    figures: dict[str, dict[str, Any]] = {}
    same = True
    for model in models:
        parameters = shapes.SHAPES[model].parameters()
        figures[model] = {}
        for workload in workloads:
            say(f"{model} ({parameters / 1e6:.1f} M parameters), {workload}")
            apart = dict(zip(("TRL", "careful"), speed.check(bench, model, workload), strict=True))
            for arm, difference in apart.items():
                say(f"  gate, {arm}: {difference}")
            holds = all(difference.holds for difference in apart.values())
            found: dict[str, Any] = {
                "gate": {"holds": holds, **{arm: asdict(one) for arm, one in apart.items()}}
            }
            if holds and bench.rounds:
                found |= speed.measure(bench, model, workload)
            same = same and holds
            figures[model][workload] = found
    print_table(figures)
    return figures, same


def print_table(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """What was measured, for people."""
    print(
        f"{'model':6} {'workload':9} {'pairs':>5} {'ours s':>7} {'CPU s':>7} {'loop s':>7} "
        f"{'tuned':>7} {'stock':>7} {'× loop':>7} {'× tuned':>7} {'× stock':>7} {'ours MB':>8} "
        f"{'tuned':>7} {'by tuned':>8}"
    )
    for model, by_workload in figures.items():
        for workload, f in by_workload.items():
            if "ours_s" not in f:
                said = "holds" if f["gate"]["holds"] else "does not hold: nothing is claimed"
                print(f"{model:6} {workload:9} the gate {said}")
                continue
            stock, than_stock = (
                f"{f[name]:.{digits}f}" if name in f else "-"
                for name, digits in (("stock_s", 1), ("faster_than_stock", 2))
            )
            print(
                f"{model:6} {workload:9} {f['pairs']:5} {f['ours_s']:7.1f} {f['ours_cpu_s']:7.1f} "
                f"{f['careful_s']:7.1f} {f['tuned_s']:7.1f} {stock:>7} "
                f"{f['faster_than_careful']:7.2f} {f['faster_than_tuned']:7.2f} {than_stock:>7} "
                f"{f['ours_mb']:8.0f} {f['tuned_mb']:7.0f} {f['memory_by_tuned']:8.2f}"
            )


def _end(
    options: argparse.Namespace, figures: Mapping[str, Any], targets: list[Target], same: bool
) -> None:
    measured = {
        "libraries": {name: version(name) for name in _LIBRARIES},
        "threads": options.threads,
        "parameters": {name: shapes.SHAPES[name].parameters() for name in options.models},
        **figures,
    }
    print_report("train", measured, targets)
    if not same:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--nights", action="store_true", help="measure a week of updates only")
    what.add_argument("--arithmetic", action="store_true", help="measure the matrix rate only")
    parser.add_argument("--models", type=_several(speed.SIZES), help="default: small,large")
    parser.add_argument("--workloads", type=_several(jobs.WORKLOADS), help="default: all")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: 5; 0: the gate only)")
    parser.add_argument("--stock-runs", type=int, help="rounds with stock TRL too (default: all)")
    parser.add_argument("--pairs", type=int, help="pairs of a timed job (default: by workload)")
    parser.add_argument("--dtype", choices=ours.DTYPES, default="auto", help="our arithmetic")
    parser.add_argument("--threads", type=int, default=_cores(), help="default: all cores")
    parser.add_argument("--gpu", action="store_true", help="0.5b and 1.5b models on the GPU")
    parser.add_argument("--work", type=Path, default=Path(".bench-train"), help="working folder")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished runs of the same code in --work"
    )
    options = parser.parse_args()
    options.models = options.models or (["0.5b", "1.5b"] if options.gpu else ["small", "large"])
    options.workloads = options.workloads or list(_GPU_WORKLOADS if options.gpu else jobs.WORKLOADS)
    return options


def _several(known: Any) -> Any:
    """An argument type: names out of ``known``, with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
