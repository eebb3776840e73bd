"""Processes, what they took, and a ledger of them from which a broken-off measurement goes on.

A run is a module of this repository with arguments, timed from its
start until it has exited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_KEPT_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}
"""What our process asks of the allocator for itself; all arms get it."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a process took, and what it wrote into ``result.json``."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """How much of the machine a process may use."""

    threads: int
    gpu: bool = False

    def environment(self) -> dict[str, str]:
        """The parent's environment, with the threads, and with the GPU only where asked for."""
        count = str(self.threads)
        chosen = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        chosen |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        chosen |= _KEPT_MEMORY
        if not self.gpu:
            chosen["CUDA_VISIBLE_DEVICES"] = ""
        return {**os.environ, **chosen}


def run(module: str, arguments: Sequence[object], out: Path, machine: Machine) -> Run:
    """Run ``python -m module arguments`` to its end; its output goes to ``out/log.txt``.

    The peak is that of resident memory, as the kernel counts it. The parent must be small, since
    the kernel counts what a child is before it becomes another program.

    Raises:
        RuntimeError: the process failed; the last lines of its output are in the message.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=machine.environment())
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (out / "log.txt").read_text(encoding="utf-8").splitlines()[-15:]
        words = "\n".join([f"{' '.join(command)} exited with {process.returncode}:", *tail])
        raise RuntimeError(words)
    scale = 1e6 if sys.platform == "darwin" else 1e3
    file = out / "result.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / scale, result)


class Ledger:
    """Finished runs by name, one JSON line each, so that no minute is measured twice."""

    def __init__(self, file: Path, *, resume: bool) -> None:
        self._file = file
        self._known: dict[str, Run] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            file.unlink(missing_ok=True)
        elif file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                name = entry.pop("name")
                self._known[name] = Run(**entry)

    def once(self, name: str, task: Callable[[], Run]) -> Run:
        """The run of this name, done now if it is not in the ledger."""
        if name not in self._known:
            self._known[name] = task()
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **asdict(self._known[name])}) + "\n")
        return self._known[name]


def say(text: str) -> None:
    """A line of progress, on stderr: the report alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
