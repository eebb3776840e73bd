"""Our arm, a careful loop and TRL, tuned and stock, in turn, on every model and workload.

First the gate, on a few batches in float32; then TRL's best setting is searched for; then the arms
run interleaved, so that a machine that slows down slows all of them. Ratios are taken within a
round and the median is reported. Holds the sizes of all jobs and the promised numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.models.base import BUNDLED, find_base
from benchmarks._report import Target, at_least, at_most
from benchmarks.train import gate, jobs, runs
from benchmarks.train.runs import Ledger, Machine, Run, say

ARMS = ("ours", "careful", "tuned", "stock")


class Size(NamedTuple):
    """Pairs of the timed job and of its batches, and of the gate's job and its batches.

    A float32 sum near −2,500, as of 256 random tokens, is known to 1e-4 only. So the longer the
    answers, the larger the gate's batches must be for a mean margin to be known to that.
    """

    pairs: int
    batch: int
    gate_pairs: int
    gate_batch: int


SIZES: Mapping[str, Mapping[str, Size]] = {
    "nano": {workload: Size(8, 4, 16, 8) for workload in jobs.WORKLOADS},
    "small": {
        "64:256": Size(64, 16, 128, 64),
        "256:64": Size(64, 16, 24, 8),
        "1024:128": Size(24, 8, 32, 16),
        "2048:64": Size(16, 8, 16, 8),
        jobs.REAL: Size(24, 8, 32, 16),
    },
    "large": {
        "64:256": Size(16, 8, 64, 32),
        "256:64": Size(16, 8, 16, 8),
        "1024:128": Size(8, 4, 16, 8),
        "2048:64": Size(4, 2, 8, 4),
        jobs.REAL: Size(8, 4, 16, 8),
    },
    "0.5b": {
        "64:256": Size(512, 16, 64, 32),
        "256:64": Size(512, 16, 32, 16),
        "1024:128": Size(128, 16, 32, 16),
        "2048:64": Size(64, 16, 16, 8),
        jobs.REAL: Size(128, 16, 32, 16),
    },
    "1.5b": {
        "64:256": Size(256, 16, 64, 32),
        "256:64": Size(256, 16, 32, 16),
        "1024:128": Size(64, 16, 32, 16),
        "2048:64": Size(32, 16, 16, 8),
        jobs.REAL: Size(64, 16, 32, 16),
    },
}
NOMINAL_S: Mapping[str, Mapping[str, float]] = {
    "nano": {"ours": 5, "tuned": 7, "stock": 7},
    "small": {"ours": 12, "tuned": 35, "stock": 50},
    "large": {"ours": 30, "tuned": 90, "stock": 150},
    "0.5b": {"ours": 30, "tuned": 60, "stock": 80},
    "1.5b": {"ours": 40, "tuned": 90, "stock": 120},
}
"""Roughly what a run takes, for the estimate that is given before anything is known."""

_SHORT = "64:256"
_CPU_TARGETS = {"small": (2.5, 6.0), "large": (1.5, 4.0)}
_GPU_TARGETS = (1.0, 2.0)


@dataclass(slots=True)
class Bench:
    """What all measurements share: the machine, the folder for models and jobs, and the ledger."""

    machine: Machine
    work: Path
    ledger: Ledger
    rounds: int
    dtype: str = "auto"
    pairs: int | None = None
    stock_rounds: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def base(self, model: str) -> Path:
        """The folder of a model: the bundled one, or random weights, made where missing."""
        if model == BUNDLED:
            return find_base(BUNDLED)
        folder = self.work / "models" / model
        if not (folder / "model.safetensors").exists():
            say(f"making the model {model!r} ...")
            made = self.work / "models" / f"making-{model}"
            runs.run("benchmarks.train.shapes", [model, made], made, self.machine)
            made.rename(folder)
        return folder

    def job(self, kind: str, model: str, workload: str, pairs: int, batch: int) -> Path:
        """The folder of a job, written anew: the same arguments give the same job."""
        folder = self.work / "jobs" / f"{kind}-{model}-{workload.replace(':', '_')}"
        jobs.make_job(
            folder, self.base(model), model=model, workload=workload, pairs=pairs, batch_size=batch
        )
        return folder

    def size(self, model: str, workload: str) -> Size:
        """The size of a job, as the command line has it."""
        size = SIZES[model][workload]
        if self.pairs is None:
            return size
        return size._replace(pairs=self.pairs, batch=min(size.batch, self.pairs))

    def out(self, name: str) -> Path:
        """Where a run writes."""
        return self.work / "out" / name.replace(":", "_").replace("/", "-")

    def ours(self, name: str, job: Path, dtype: str) -> Run:
        """Run our arm, or know what it took."""
        out = self.out(name)
        arguments = [job, out, "--dtype", dtype]
        module = "benchmarks.train.ours"
        return self.ledger.once(name, lambda: runs.run(module, arguments, out, self.machine))

    def careful(self, name: str, job: Path, *arguments: object) -> Run:
        """Run the careful loop, or know what it took."""
        out, module = self.out(name), "benchmarks.train.careful"
        return self.ledger.once(
            name, lambda: runs.run(module, [job, out, *arguments], out, self.machine)
        )

    def theirs(self, name: str, job: Path, *arguments: object) -> Run:
        """Run TRL's arm, or know what it took."""
        out, module = self.out(name), "benchmarks.train.trl_arm"
        return self.ledger.once(
            name, lambda: runs.run(module, [job, out, *arguments], out, self.machine)
        )


def estimate(models: Sequence[str], workloads: Sequence[str], rounds: int) -> float:
    """Minutes that all of it will take, roughly; gate and search count as three rounds."""
    one = sum(sum(NOMINAL_S[model].values()) for model in models) * len(workloads)
    return one * (rounds + 3) / 60


def check(bench: Bench, model: str, workload: str) -> tuple[gate.Difference, gate.Difference]:
    """Have all arms do a short job in float32, and compare TRL and the careful loop with ours."""
    size = SIZES[model][workload]
    job = bench.job("gate", model, workload, size.gate_pairs, size.gate_batch)
    names = [f"gate/{model}/{workload}/{size.gate_pairs}/{a}" for a in ("ours", "trl", "careful")]
    ours = bench.ours(names[0], job, "float32")
    theirs = bench.theirs(names[1], job, "--row", "tuned", "--dtype", "float32", "--micro", 1)
    loop = bench.careful(names[2], job, "--dtype", "float32", "--micro", 1)
    a, b, c = (bench.out(name) for name in names)
    return (
        gate.compare(a, b, job, [ours.result, theirs.result]),
        gate.compare(a, c, job, [ours.result, loop.result]),
    )


def best_setting(
    bench: Bench, model: str, workload: str, batch: int | None = None
) -> tuple[str, int]:
    """TRL's fastest dtype and micro-batch, searched for once on a job of one batch."""
    batch = batch or bench.size(model, workload).batch
    job = bench.job("sweep", model, workload, batch, batch)
    found = bench.theirs(f"sweep/{model}/{workload}/{batch}", job, "--sweep").result
    say(f"  TRL is tuned to {found['dtype']}, micro-batch {found['micro']}")
    return str(found["dtype"]), int(found["micro"])


def measure(bench: Bench, model: str, workload: str) -> dict[str, Any]:
    """Time the arms in turn; return medians and the medians of the ratios."""
    size = bench.size(model, workload)
    dtype, micro = best_setting(bench, model, workload)
    job = bench.job("timed", model, workload, size.pairs, size.batch)
    stem = f"speed/{model}/{workload}/{size.pairs}"
    rounds: list[dict[str, Run]] = []
    for number in range(bench.rounds):
        name = f"{stem}/{{}}/{number}".format
        took = {
            "ours": bench.ours(name("ours"), job, bench.dtype),
            "careful": bench.careful(name("careful"), job, "--dtype", bench.dtype),
            "tuned": bench.theirs(name("tuned"), job, "--dtype", dtype, "--micro", micro),
        }
        if bench.stock_rounds is None or number < bench.stock_rounds:
            took["stock"] = bench.theirs(name("stock"), job, "--row", "stock")
        rounds.append(took)
        left = sum(run.wall_s for run in took.values()) * (bench.rounds - number - 1) / 60
        words = ", ".join(_words(arm, took[arm]) for arm in took)
        say(f"  round {number + 1}: {words}; about {left:.0f} minutes left here")
    return {"pairs": size.pairs, "batch": size.batch, **summary(rounds, gpu=bench.machine.gpu)}


def _words(arm: str, took: Run) -> str:
    return f"{arm} {took.wall_s:.1f} s {took.peak_mb:.0f} MB"


def summary(rounds: Sequence[Mapping[str, Run]], *, gpu: bool) -> dict[str, Any]:
    """Medians over rounds. Ratios are theirs by ours for time, ours by theirs for memory.

    An arm that was not run in every round has the medians of those that it was run in.
    """
    figures: dict[str, Any] = {}
    for arm in ARMS:
        found = [took for took in rounds if arm in took]
        if not found:
            continue
        figures[f"{arm}_rounds"] = len(found)
        figures[f"{arm}_s"] = _median(took[arm].wall_s for took in found)
        figures[f"{arm}_cpu_s"] = _median(took[arm].cpu_s for took in found)
        figures[f"{arm}_work_s"] = _median(_work(took[arm]) for took in found)
        figures[f"{arm}_mb"] = _median(_memory(took[arm], gpu) for took in found)
        figures[f"{arm}_setting"] = found[0][arm].result["setting"]
        if arm != "ours":
            figures |= _ratios(arm, found, gpu)
    return figures


def _ratios(arm: str, rounds: Sequence[Mapping[str, Run]], gpu: bool) -> dict[str, float]:
    """Another arm beside ours, within each round."""
    times = [(took[arm], took["ours"]) for took in rounds]
    return {
        f"faster_than_{arm}": _median(a.wall_s / b.wall_s for a, b in times),
        f"cpu_less_than_{arm}": _median(a.cpu_s / max(1e-9, b.cpu_s) for a, b in times),
        f"work_faster_than_{arm}": _median(_work(a) / _work(b) for a, b in times),
        f"memory_by_{arm}": _median(_memory(b, gpu) / max(1.0, _memory(a, gpu)) for a, b in times),
    }


def _work(run: Run) -> float:
    """Seconds from the end of the imports to a saved adapter: loading, reference, training."""
    return float(run.result["load_s"] + run.result["work_s"])


def _memory(run: Run, gpu: bool) -> float:
    return float(run.result["gpu_mb"]) if gpu else run.peak_mb


def _median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 3)


def targets(
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]], *, gpu: bool
) -> Iterator[Target]:
    """The numbers that were promised, of what was measured."""
    for model, by_workload in figures.items():
        for workload, found in by_workload.items():
            limits = _GPU_TARGETS if gpu else _CPU_TARGETS.get(model)
            if limits is None or "faster_than_tuned" not in found:
                continue
            faster, name = limits[workload != _SHORT], f"{model} {workload}"
            yield at_least(f"{name} faster_than_tuned", found["faster_than_tuned"], faster)
            if not gpu:
                yield at_most(f"{name} memory_by_tuned", found["memory_by_tuned"], 0.5)
