"""Measures how much of the rate of a plain GEMM our training step reaches.

Counts the multiplications and additions that a step needs from the model's shape and the rows'
lengths. Padding, recomputation and everything but matrix products count as waste. The GEMMs for
comparison have the shapes of the model's own layers and the width of one pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.config import Precision
from benchmarks._report import Target, at_least
from benchmarks.train import jobs, runs
from benchmarks.train.runs import say
from benchmarks.train.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from benchmarks.train.speed import Bench

_STEPS = 4
_REPEATS = 7


def measure(bench: Bench, models: Sequence[str], workloads: Sequence[str]) -> dict[str, Any]:
    """Share of the GEMM rate by model and workload, with the rates in Gflop/s."""
    figures: dict[str, Any] = {}
    for model in models:
        for workload in workloads:
            batch = bench.size(model, workload).batch
            job = bench.job("arithmetic", model, workload, _STEPS * batch, batch)
            name = f"arithmetic/{model}/{workload}/{bench.dtype}"
            out = bench.out(name)
            arguments = [job, out, "--dtype", bench.dtype]
            found = bench.ledger.once(
                name,
                lambda a=arguments, o=out: runs.run(__name__, a, o, bench.machine),  # type: ignore[misc]
            ).result
            say(f"{model} {workload}: {found['share']:.2f} of {found['gemm_gflops']:.0f} Gflop/s")
            figures.setdefault(model, {})[workload] = found
    return {"arithmetic": figures}


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """At least half of the GEMM rate, for every model and workload."""
    return [
        at_least(f"{model} {workload} share_of_gemm", found["share"], 0.5)
        for model, by_workload in figures["arithmetic"].items()
        for workload, found in by_workload.items()
    ]


def step_flops(shape: Shape, rows: Sequence[jobs.Ids], rank: int, *, shared: bool) -> float:
    """Floating-point operations of forward and backward passes over ``rows`` with LoRA.

    With frozen weights the backward pass has one product for each of the forward pass, for the
    activations. The q, k and v of the first block need none, because nothing before them is
    trained.
    """
    tokens = sum(_tokens(row, shared) for row in rows)
    answers = sum(map(_answers, rows))
    linear = sum(i * o for i, o in shape.linears().values())
    first = sum(shape.linears()[n][0] * (shape.linears()[n][1] + rank) for n in _FIRST)
    lora = rank * sum(i + o for i, o in shape.linears().values())
    looks = sum(_looks(row, shared) for row in rows)
    return (
        2 * tokens * (2 * shape.layers * linear - first)
        + 6 * tokens * shape.layers * lora
        + 4 * answers * shape.vocab * shape.hidden
        + 12 * looks * shape.layers * shape.heads * shape.head_dim
    )


_FIRST = ("q_proj", "k_proj", "v_proj")


def _answers(row: jobs.Ids) -> int:
    return sum(map(len, row[1:]))


def _tokens(row: jobs.Ids, shared: bool) -> int:
    return (1 if shared else len(row[1:])) * len(row.prompt) + _answers(row)


def _looks(row: jobs.Ids, shared: bool) -> float:
    """Count pairs of a position and one that it attends to, itself included."""
    prompt, completions = len(row.prompt), row[1:]
    own = prompt * (prompt + 1) / 2 * (1 if shared else len(completions))
    return own + sum(n * prompt + n * (n + 1) / 2 for n in map(len, completions))


def gemm_rate(shape: Shape, width: int, answers: int, dtype: Any, device: Any) -> float:
    """Flop/s of the model's own products, forward and for the activations' gradients.

    ``width`` tokens go through every block, and ``answers`` through the one output layer.
    """
    flops = seconds = 0.0
    counted = [(size, width, shape.layers) for size in shape.linears().values()]
    for (inputs, outputs), tokens, times in [*counted, ((shape.hidden, shape.vocab), answers, 1)]:
        seconds += times * sum(_gemm_seconds(inputs, outputs, tokens, dtype, device))
        flops += times * 4 * inputs * outputs * tokens
    return flops / seconds


def _gemm_seconds(
    inputs: int, outputs: int, tokens: int, dtype: Any, device: Any
) -> Iterator[float]:
    import torch

    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    gradient = torch.randn(tokens, outputs, dtype=dtype, device=device)
    yield _fastest(lambda: torch.nn.functional.linear(x, weight))
    yield _fastest(lambda: gradient @ weight)


def _fastest(call: Callable[[], object]) -> float:
    import torch

    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def run(folder: Path, dtype: Precision) -> dict[str, float]:
    """Time the steps of a job, and GEMMs before and after it, of which the faster ones count."""
    from agentpref.learn.memory import tokens_per_pass
    from benchmarks.train import ours

    job = jobs.load_job(folder)
    shape, rows = SHAPES[job.model], jobs.load_rows(folder)
    learner = ours.learner_for(job, folder, dtype)
    encoded = jobs.encoded(rows)
    shared = learner.route(encoded).name == "shared"
    share = job.batch_size / job.pairs
    most = tokens_per_pass(learner.base.model)
    width = min(most, round(share * sum(_tokens(row, shared) for row in rows)))
    answers = round(share * sum(map(_answers, rows)))
    model = learner.base.model

    def rate() -> float:
        return gemm_rate(shape, width, min(answers, width), model.dtype, model.device)

    before = rate()
    ends: list[float] = []
    learner.fit(encoded, new=len(rows), observe=lambda step: ends.append(time.perf_counter()))
    took = statistics.median(b - a for a, b in itertools.pairwise(ends))
    achieved = step_flops(shape, rows, job.rank, shared=shared) * share / took
    gemm = max(before, rate())
    return {
        "step_s": round(took, 4),
        "gflops": round(achieved / 1e9, 1),
        "gemm_gflops": round(gemm / 1e9, 1),
        "share": round(achieved / gemm, 3),
    }


def main() -> None:
    """Measure one job: a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(run(options.job, options.dtype)), "utf-8")


if __name__ == "__main__":
    main()
