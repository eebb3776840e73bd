"""Another process of the same home, like an update: it publishes and promotes.

Both processes read the same monotonic clock of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.swap.stage import Stage

_WORK = """
import json, sys, time
from agentpref.serve.registry import Registry

registry = Registry(sys.argv[1])
base = json.loads(sys.argv[2])
for line in sys.stdin:
    command, what = line.rstrip("\\n").split(" ", 1)
    if command == "publish":
        what = registry.publish(what, parent=None, model=base, training={}).revision_id
    else:
        registry.promote(what)
    print(json.dumps([what, time.monotonic()]), flush=True)
"""


class Elsewhere(NamedTuple):
    """The other process."""

    stage: Stage
    process: subprocess.Popen[str]

    def publish(self, adapter: int) -> str:
        """Publish one of the stage's adapters as a new revision."""
        name = str(self._do("publish", self.stage.folders[adapter])[0])
        self.stage.note(name, adapter)
        return name

    def promote(self, name: str) -> float:
        """Make a revision live; return when that was done."""
        return float(self._do("promote", name)[1])

    def _do(self, command: str, what: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command} {what}\n")
        return json.loads(self.process.stdout.readline())


@contextmanager
def elsewhere(stage: Stage) -> Iterator[Elsewhere]:
    """Start the process; it ends with the block."""
    command = [sys.executable, "-c", _WORK, str(stage.home.path), json.dumps(dict(stage.identity))]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes) as process:
        yield Elsewhere(stage, process)
