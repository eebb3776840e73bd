"""Jobs: everything that two trainers must agree on, as a folder that both of them read.

``job.json`` holds the settings, ``rows.npz`` the token ids, ``init.safetensors`` the LoRA weights
to start from. Rows are drawn at random from the vocabulary; only their lengths mean something.
The order of the rows is that of our trainer's plan, and written down for both arms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agentpref.learn.encode import EncodedExample
from agentpref.learn.objective import TrainingRow
from agentpref.learn.schedule import plan_batches
from agentpref.types import Completion, Example, Prompt
from benchmarks.train import shapes

REAL = "real"
WORKLOADS = ("64:256", "256:64", "1024:128", "2048:64", REAL)
_LENGTHS = Path(__file__).parents[1] / "data" / "qa_lengths.json"
_SPECIAL = 8  # ids below are the tokenizer's special tokens
_WARMUP_SHARE = 0.1


class Ids(NamedTuple):
    """Token ids of one pair."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done. ``order`` lists the rows, batch after batch, as they are to be taken."""

    model: str
    base: str
    workload: str
    pairs: int
    batch_size: int
    learning_rate: float
    order: tuple[int, ...]
    beta: float = 0.1
    rank: int = 16
    alpha: int = 32
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps; there is one epoch and no ragged batch."""
        return self.pairs // self.batch_size

    def rate_factor(self, step: int) -> float:
        """Share of the learning rate in a step counted from 0: up over a tenth, then down to 0."""
        warmup = max(1, round(_WARMUP_SHARE * self.steps))
        return min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup))


def make_job(
    folder: Path,
    base: Path,
    *,
    model: str,
    workload: str,
    pairs: int,
    batch_size: int,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Job:
    """Draw a job and write its folder.

    Raises:
        ValueError: ``pairs`` is no multiple of ``batch_size``; a ragged last batch is weighted
            differently by different trainers.
    """
    if pairs % batch_size:
        raise ValueError(f"{pairs} pairs are no multiple of the batch size {batch_size}")
    shape, rng = shapes.SHAPES[model], np.random.default_rng(seed)
    rows = draw_rows(workload, pairs, shape.vocab, rng)
    rate = learning_rate or (1e-3 if shape.parameters() < 50_000_000 else 1e-4)
    order = planned_order(rows, batch_size, seed)
    job = Job(model, str(base), workload, pairs, batch_size, rate, order, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    _save_rows(folder / "rows.npz", rows)
    _save_init(folder / "init.safetensors", shape, job.rank, rng)
    return job


def load_job(folder: Path) -> Job:
    """Read the settings of a job."""
    settings = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return Job(**{**settings, "order": tuple(settings["order"])})


def draw_rows(workload: str, count: int, vocab: int, rng: np.random.Generator) -> list[Ids]:
    """Random token ids: of fixed lengths, or of lengths that a real set of questions has."""
    if workload == REAL:
        known = json.loads(_LENGTHS.read_text(encoding="utf-8"))
        lengths = [known[i] for i in rng.choice(len(known), count, replace=False)]
    else:
        prompt, completion = map(int, workload.split(":"))
        lengths = [[prompt, completion, completion]] * count
    return [
        Ids(*(tuple(rng.integers(_SPECIAL, vocab, n).tolist()) for n in row)) for row in lengths
    ]


def load_rows(folder: Path) -> list[Ids]:
    """Read the token ids of a job."""
    with np.load(folder / "rows.npz") as file:
        sides = [
            np.split(file[side], np.cumsum(file[f"{side}_lengths"])[:-1]) for side in Ids._fields
        ]
    return [Ids(*(tuple(ids.tolist()) for ids in row)) for row in zip(*sides, strict=True)]


def encoded(rows: Sequence[Ids]) -> list[EncodedExample]:
    """Rows as the learner takes them: certain labels, equal weights."""
    return [
        EncodedExample(_pair(number), ids.prompt, (ids.chosen, ids.rejected), (None, None))
        for number, ids in enumerate(rows)
    ]


def planned_order(rows: Sequence[Ids], batch_size: int, seed: int) -> tuple[int, ...]:
    """The order in which our trainer takes these rows in one epoch."""
    known = [TrainingRow(row, (0.0, 0.0)) for row in encoded(rows)]
    numbers = {id(row): number for number, row in enumerate(known)}
    batches = plan_batches(known, size=batch_size, epochs=1, seed=seed)
    return tuple(numbers[id(row)] for batch in batches for row in batch)


def _pair(number: int) -> Example:
    prompt = Prompt(str(number), ({"role": "user", "content": str(number)},))
    completions = (
        Completion({"role": "assistant", "content": "+"}, 1.0),
        Completion({"role": "assistant", "content": "-"}, 0.0),
    )
    return Example(
        str(number), "bench", float(number), prompt, completions, "comparison", noise=0.0
    )


def _save_rows(file: Path, rows: Sequence[Ids]) -> None:
    columns: dict[str, Any] = {}
    for side in Ids._fields:
        ids = [getattr(row, side) for row in rows]
        columns[side] = np.concatenate([np.asarray(part, np.int64) for part in ids])
        columns[f"{side}_lengths"] = np.asarray([len(part) for part in ids])
    np.savez(file, **columns)


def _save_init(file: Path, shape: shapes.Shape, rank: int, rng: np.random.Generator) -> None:
    """LoRA weights with a small B, so that margins differ from zero before the first step."""
    from safetensors.numpy import save_file

    tensors = {
        name: rng.normal(0, 0.01 if ".lora_B." in name else size[1] ** -0.5, size).astype("float32")
        for name, size in shapes.lora_shapes(shape, rank)
    }
    save_file(tensors, file)
