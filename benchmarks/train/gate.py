"""The gate before any claim: both arms must have come to the same result.

Compares what two arms wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

PER_STEP = 1e-4
WEIGHTS = 1e-3


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two arms are apart.

    ``loss``, ``margin``: the largest difference of any step; the margin is h, in nats, not
    multiplied by β. ``weights``: ‖a−b‖/‖b‖ over all LoRA tensors together. ``learned``: the same by
    what training changed, ‖a−b‖/‖b−init‖, which is stricter and for information.
    """

    loss: float
    margin: float
    weights: float
    learned: float
    steps: int

    @property
    def holds(self) -> bool:
        """Whether the arms are the same within the promised bounds (not so where one is NaN)."""
        return self.loss <= PER_STEP and self.margin <= PER_STEP and self.weights <= WEIGHTS

    def __str__(self) -> str:
        return (
            f"{'same' if self.holds else 'NOT THE SAME'} over {self.steps} steps: loss within "
            f"{self.loss:.1e}, margin within {self.margin:.1e}, LoRA weights within "
            f"{self.weights:.1e} ({self.learned:.1e} of what was learned)"
        )


def compare(
    ours: Path, theirs: Path, job: Path, results: Sequence[Mapping[str, Any]]
) -> Difference:
    """Compare the folders of two arms that did the same job, and the results they wrote.

    Raises:
        ValueError: the arms took different numbers of steps, or trained different tensors.
    """
    a, b = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs)
    )
    if a.keys() != b.keys():
        raise ValueError(f"only one arm has the LoRA tensors {sorted(a.keys() ^ b.keys())[:4]}")
    apart = _norm({name: a[name] - b[name] for name in b})
    init = load_file(job / "init.safetensors")
    return Difference(
        loss=_furthest(*(result["losses"] for result in results)),
        margin=_furthest(*(result["margins"] for result in results)),
        weights=apart / _norm(b),
        learned=apart / _norm({name: b[name] - init[name] for name in b}),
        steps=len(results[0]["losses"]),
    )


def _furthest(a: Sequence[float], b: Sequence[float]) -> float:
    """NaN where there is one: unlike ``max``, numpy does not pass over it."""
    return float(np.max([abs(x - y) for x, y in zip(a, b, strict=True)]))


def _norm(tensors: Mapping[str, Any]) -> float:
    squares = (float(np.square(tensor, dtype=np.float64).sum()) for tensor in tensors.values())
    return float(sum(squares) ** 0.5)
