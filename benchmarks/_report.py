"""The one JSON line that every benchmark ends with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A number that was promised, and whether it holds."""

    name: str
    value: float
    target: str
    holds: bool


def at_most(name: str, value: float, limit: float) -> Target:
    """A target that holds where ``value`` is ``limit`` or less."""
    return Target(name, value, f"<= {limit:g}", value <= limit)


def at_least(name: str, value: float, limit: float) -> Target:
    """A target that holds where ``value`` is ``limit`` or more."""
    return Target(name, value, f">= {limit:g}", value >= limit)


def print_report(benchmark: str, figures: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Print the last line of a benchmark's output: one JSON object."""
    report = {
        "benchmark": benchmark,
        "machine": machine(),
        "figures": figures,
        "targets": [asdict(target) for target in targets],
    }
    print(json.dumps(report, ensure_ascii=False))


def machine() -> str:
    """Say what the numbers were measured on: processor, usable cores, system and Python."""
    cores = f"{len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else ""
    python = f"Python {platform.python_version()}"
    parts = [_processor(), cores, platform.system(), python]
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
