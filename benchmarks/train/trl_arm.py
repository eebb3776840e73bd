"""TRL's arm: one job with its DPOTrainer, from process start to a saved adapter.

    python -m benchmarks.train.trl_arm JOB OUT --row stock|tuned [--dtype …] [--micro N]
    python -m benchmarks.train.trl_arm JOB OUT --sweep

*Stock* is what a user gets who sets only what the job says: defaults of DPOConfig for precision
(bf16 autocast), micro-batch (8), checkpointing (on) and reference (computed along the way). *Tuned*
is what an expert would set: reference computed once beforehand, no checkpointing, and the dtype and
micro-batch that a sweep over this very job found fastest.

Both are spared what they do beside the job: they are given token ids, tokenise nothing, log
nothing, write no checkpoints, and take the rows and the learning rates that the job lists.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.train import jobs
from benchmarks.train.shapes import SHAPES

DTYPES = ("float32", "autocast", "bfloat16")
"""Weights and arithmetic in float32; arithmetic in bf16 by autocast; weights in bf16 too."""

MICRO_BATCHES = (1, 2, 4, 8, 16)
_STOCK_MICRO = 8
_MIDDLE = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """How TRL is run: one of :data:`DTYPES`, pairs in one pass, and its two costly defaults."""

    dtype: str = "autocast"
    micro: int = _STOCK_MICRO
    precompute: bool = False
    checkpointing: bool = True

    def __str__(self) -> str:
        words = [self.dtype, f"micro-batch {self.micro}"]
        words.append("reference beforehand" if self.precompute else "reference along the way")
        words.append("checkpointing" if self.checkpointing else "no checkpointing")
        return ", ".join(words)


def stock(job: jobs.Job) -> Setting:
    """The defaults, with a micro-batch that divides the job's batch."""
    return Setting(micro=fitting(_STOCK_MICRO, job.batch_size))


def tuned(job: jobs.Job, dtype: str, micro: int) -> Setting:
    """An expert's choice."""
    return Setting(dtype, fitting(micro, job.batch_size), precompute=True, checkpointing=False)


def fitting(micro: int, batch_size: int) -> int:
    """The largest micro-batch up to ``micro`` that divides the batch."""
    return max(n for n in range(1, min(micro, batch_size) + 1) if batch_size % n == 0)


def run(folder: Path, out: Path, setting: Setting) -> dict[str, Any]:
    """Do the job; return loss and margin of each step, and where the time went after imports."""
    import peft  # noqa: F401

    _trl()
    from benchmarks.train.ours import gpu_peak

    started = time.perf_counter()
    job = jobs.load_job(folder)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(job, folder, setting, Path(scratch))
        ready = time.perf_counter()
        trainer.train()
        trainer.model.save_pretrained(out / "adapter")
    return {
        "losses": _per_step(trainer.losses, job, setting),
        "margins": _per_step(trainer.margins, job, setting),
        "load_s": ready - started,  # with the reference, where it is computed beforehand
        "work_s": time.perf_counter() - ready,
        "gpu_mb": gpu_peak(),
        "setting": str(setting),
    }


def make_trainer(job: jobs.Job, folder: Path, setting: Setting, scratch: Path) -> Any:
    """A DPOTrainer that is about to do the job."""
    rows = jobs.load_rows(folder)
    return trainer_for(
        job, [rows[i] for i in job.order], folder / "init.safetensors", setting, scratch
    )


def trainer_for(
    job: jobs.Job,
    rows: list[jobs.Ids],
    init: Path | None,
    setting: Setting,
    scratch: Path,
    *,
    prove: list[jobs.Ids] | None = None,
) -> Any:
    """A DPOTrainer over ``rows``, in that order, from the LoRA weights in a file.

    ``prove`` are rows to evaluate on.

    The adapter is made by TRL and filled afterwards: given a ready one, TRL would take the copy of
    it that it makes, and not the base, as the reference.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    trainer = _trainer_class()(
        model=job.base,
        args=_arguments(job, setting, scratch),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(prove) if prove else None,
        processing_class=AutoTokenizer.from_pretrained(job.base),
        peft_config=LoraConfig(
            r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.job = job
    if init is not None:
        set_peft_model_state_dict(trainer.model, load_file(init))
    return trainer


def _dataset(rows: list[jobs.Ids]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{f"{side}_ids": list(ids) for side, ids in row._asdict().items()} for row in rows]
    )


def _arguments(job: jobs.Job, setting: Setting, scratch: Path) -> Any:
    import torch

    return _trl().DPOConfig(
        output_dir=str(scratch),
        beta=job.beta,
        learning_rate=job.learning_rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        per_device_train_batch_size=setting.micro,
        per_device_eval_batch_size=setting.micro,
        gradient_accumulation_steps=job.batch_size // setting.micro,
        train_sampling_strategy="sequential",
        max_length=None,
        precompute_ref_log_probs=setting.precompute,
        gradient_checkpointing=setting.checkpointing,
        bf16=setting.dtype == "autocast",
        model_init_kwargs={"dtype": "bfloat16" if setting.dtype == "bfloat16" else "float32"},
        use_cpu=not torch.cuda.is_available(),
        seed=job.seed,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def _trl() -> Any:
    """The library, which has no types to be checked by."""
    trl = importlib.import_module("trl")
    importlib.import_module("trl.trainer.dpo_trainer")  # it loads its parts when they are named
    return trl


def _trainer_class() -> Any:
    from torch.optim.lr_scheduler import LambdaLR

    class JobTrainer(_trl().DPOTrainer):  # type: ignore[misc]
        """DPOTrainer that is given token ids and the job's learning rates, and notes its steps."""

        job: jobs.Job

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.losses: list[Any] = []
            self.margins: list[float] = []
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.job.rate_factor)
            return self.lr_scheduler

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.model.training:
                self.losses.append(loss.detach())
                self.margins.append(self._metrics["train"]["rewards/margins"][-1] / self.beta)
            return loss

    return JobTrainer


def _per_step(values: list[Any], job: jobs.Job, setting: Setting) -> list[float]:
    """Means over the equal micro-batches of each step."""
    size = job.batch_size // setting.micro
    numbers = [float(value) for value in values]
    return [sum(numbers[i : i + size]) / size for i in range(0, len(numbers), size)]


def sweep(folder: Path) -> dict[str, Any]:
    """Seconds of the job under each setting worth trying; first the dtype, then the micro-batch.

    One process does them all, after a run that only warms it up; time from a loaded library to a
    trained adapter counts, loading of the model and reference included. Where bfloat16 is emulated
    it is not tried: an AMD EPYC of 2021 multiplies it at a hundredth of float32's rate.
    """
    import torch

    from agentpref.models.base import native_bfloat16

    dtypes = DTYPES if native_bfloat16(gpu=torch.cuda.is_available()) else DTYPES[:1]
    job, rows = jobs.load_job(folder), jobs.load_rows(folder)
    sizes = {fitting(n, job.batch_size) for n in MICRO_BATCHES if _fits(job, rows, n)}
    middle = max(n for n in sizes if n <= _MIDDLE)
    _seconds(folder, tuned(job, "float32", middle))
    tried = {d: _seconds(folder, tuned(job, d, middle)) for d in dtypes}
    dtype = min(tried, key=lambda name: tried[name])
    by_micro = {n: _seconds(folder, tuned(job, dtype, n)) for n in sorted(sizes - {middle})}
    by_micro[middle] = tried[dtype]
    micro = min(by_micro, key=lambda n: by_micro[n])
    return {"dtype": dtype, "micro": micro, "dtypes_s": tried, "micros_s": by_micro}


def _fits(job: jobs.Job, rows: list[jobs.Ids], micro: int) -> bool:
    """Whether the activations of a pass fit this machine; on a GPU it is tried instead.

    About 16 hidden and 3 intermediate widths are kept for each token of a block. A CPU's process
    that asks for too much is killed, and the search with it.
    """
    import torch

    if micro == 1 or torch.cuda.is_available():
        return True
    shape = SHAPES[job.model]
    width = max(len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows)
    kept = 4 * (16 * shape.hidden + 3 * shape.intermediate)
    needed = 2 * min(micro, job.batch_size) * width * shape.layers * kept
    return needed < 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _seconds(folder: Path, setting: Setting) -> float:
    """How long the job takes; without end where memory does not suffice."""
    import torch

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            make_trainer(jobs.load_job(folder), folder, setting, Path(scratch)).train()
        except torch.OutOfMemoryError:
            return float("inf")
        finally:
            gc.collect()  # a trainer is full of cycles, and holds a model
            torch.cuda.empty_cache()
    return time.perf_counter() - started


def quiet() -> None:
    """No downloads, no progress bars, no telemetry."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")


def main() -> None:
    """Do one job, or find the setting it is best done with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--row", choices=("stock", "tuned"), default="tuned")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    job = jobs.load_job(options.job)
    choice = stock(job) if options.row == "stock" else tuned(job, options.dtype, options.micro)
    result = sweep(options.job) if options.sweep else run(options.job, options.out, choice)
    (options.out / "result.json").write_text(json.dumps({**asdict(choice), **result}), "utf-8")


if __name__ == "__main__":
    main()
