"""Our arm: one job, from process start to a saved adapter.

    python -m benchmarks.train.ours JOB OUT [--dtype auto|float32|bfloat16]

Writes ``OUT/adapter`` and ``OUT/result.json``. The phases in it are for information; what counts is
what the parent measures around the process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from agentpref.config import KLSettings, LoraSettings, LossSettings, Precision, UpdateConfig
from agentpref.learn.learner import Learner
from agentpref.learn.objective import StepResult
from agentpref.learn.process import settle
from agentpref.models.base import load_base
from benchmarks.train import jobs

DTYPES: tuple[Precision, ...] = ("auto", "float32", "bfloat16")


def learner_for(job: jobs.Job, folder: Path, dtype: Precision) -> Learner:
    """A learner that does what the job says and nothing else: no anchor, no KL, no noise."""
    config = UpdateConfig(
        seed=job.seed,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        epochs=1,
        max_length=4096,
        lora=LoraSettings(rank=job.rank, alpha=job.alpha),
        loss=LossSettings(beta=job.beta, nll=0.0, nll_on_corrections=0.0),
        kl=KLSettings(weight=0.0),
    )
    base = load_base(job.base, precision=dtype)
    learner = Learner(base, None, config, caches={}, progress=lambda stage, done, total: None)
    _start_from(learner, folder / "init.safetensors")
    return learner


def run(folder: Path, out: Path, dtype: Precision) -> dict[str, Any]:
    """Do the job; return loss and margin of each step, and where the time went after imports."""
    settle()
    started = time.perf_counter()
    job = jobs.load_job(folder)
    learner = learner_for(job, folder, dtype)
    rows = jobs.encoded(jobs.load_rows(folder))
    ready = time.perf_counter()
    steps: list[StepResult] = []
    learner.fit(rows, new=len(rows), observe=steps.append)
    learner.save(out / "adapter")
    return {
        "losses": [step.loss for step in steps],
        "margins": [step.margin for step in steps],
        "load_s": ready - started,
        "work_s": time.perf_counter() - ready,
        "gpu_mb": gpu_peak(),
        "setting": describe(learner, rows),
    }


def describe(learner: Learner, rows: Any) -> str:
    """What the learner chose for itself, and on what it ran, in words."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return f"{learner.base.precision}, {learner.route(rows).name} rows, {device}"


def gpu_peak() -> float:
    """Peak of what torch held on the GPU, in MB; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0


def _start_from(learner: Learner, file: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with learner.policy("candidate") as model:
        set_peft_model_state_dict(model, load_file(file), "candidate")


def main() -> None:
    """Do one job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.job, options.out, options.dtype)
    (options.out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
