"""How long until a serving process follows what another process has promoted.

The other process is a real one; both read the same monotonic clock of the machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

from agentpref.serve.router import Router

if TYPE_CHECKING:
    from benchmarks.swap.stage import Stage

PATIENCE = 30.0

_PROMOTER = """
import sys, time
from agentpref.serve.registry import Registry

registry = Registry(sys.argv[1])
for name in sys.stdin:
    registry.promote(name.strip())
    print(time.monotonic(), flush=True)
"""


def measure(stage: Stage, router: Router, times: int) -> list[float]:
    """Have another process promote some times; seconds until requests are admitted to it."""
    command = [sys.executable, "-c", _PROMOTER, str(stage.home.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as promoter:
        assert promoter.stdin is not None
        assert promoter.stdout is not None
        waits = []
        for number in range(times):
            name = stage.publish(number % len(stage.folders))
            time.sleep(0.37 * (number % 3))  # not always at the same moment of the watcher's round
            promoter.stdin.write(name + "\n")
            promoted = float(promoter.stdout.readline())
            waits.append(_followed(router, name) - promoted)
        promoter.stdin.close()
    return waits


def _followed(router: Router, name: str) -> float:
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        if router.serving.live == name:
            return time.monotonic()
        time.sleep(0.002)
    raise SystemExit(f"error: {name} was promoted elsewhere and not followed in {PATIENCE:g} s")
