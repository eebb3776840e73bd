"""Runs a command and ends it as soon as the process that started the guard is gone.

Run as a script: ``python -I -S _vllm_guard.py GRACE COMMAND...``, in a process group of its own.
Standard input is a pipe that the parent holds open and never writes to. Its end means that the
parent closed it or died, even by ``kill -9``. The guard then asks the command to end, kills it
after GRACE seconds, and kills what the command has started. It exits with the command's exit code.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

_POLL_SECONDS = 0.1
_TIDY_SECONDS = 0.5


def guard(grace: float, command: Sequence[str]) -> int:
    """Run a command until it ends or the parent is gone; return its exit code."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: None)  # SIG_IGN would pass to the command
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while server.poll() is None and not _parent_is_gone(_POLL_SECONDS):
        pass
    server.terminate()  # does nothing where it has ended
    with suppress(subprocess.TimeoutExpired):
        server.wait(grace)
    os.killpg(0, signal.SIGTERM)  # the command's own helpers
    time.sleep(_TIDY_SECONDS)
    if _parent_is_gone(0):
        os.killpg(0, signal.SIGKILL)  # this process included
    code = server.wait()
    return code if code >= 0 else 128 - code


def _parent_is_gone(seconds: float) -> bool:
    """Wait for the end of standard input, which is always readable from then on."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


if __name__ == "__main__":
    sys.exit(guard(float(sys.argv[1]), sys.argv[2:]))
