"""Stands between a process that may be killed and the server that it started.

Run as a script, by a bare interpreter: ``python -I -S _process_guard.py PARENT GRACE COMMAND...``.
It starts the command in its own process group, passes a request to end on to it, and ends the
whole group when PARENT is gone, which a ``kill -9`` of the parent gives nobody else a chance to.
Exits as the command did. Knows nothing of servers, and imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_POLL_SECONDS = 0.1
_TIDY_SECONDS = 1.0


def guard(parent: int, grace: float, command: Sequence[str]) -> int:
    """Run a command to its end, or end it after ``grace`` seconds at the latest."""
    asked: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A function and not SIG_IGN, which the command would inherit.
        signal.signal(signum, lambda signum, frame: asked.append(signum))
    server = subprocess.Popen(command)
    while server.poll() is None and not asked and os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    code = server.poll()
    if code is None:
        code = _end(server, grace)
    if os.getppid() != parent:
        time.sleep(_TIDY_SECONDS)  # what the command's own helpers need to clear up
        os.killpg(0, signal.SIGKILL)  # this process included
    return code if code >= 0 else 128 - code


def _end(server: subprocess.Popen[bytes], grace: float) -> int:
    server.terminate()
    try:
        return server.wait(grace)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
