"""Handles signals, memory, imports and priority of a process that trains.

Ctrl-C and SIGTERM stop training between two steps: to break a step off would leave weights and
optimizer moments half changed. All of this affects the whole process, so only updates, our commands
and the processes of a team use it; the library leaves a host's process as it is.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agentpref.models import threads
from agentpref.types import Progress

LOADING = "load model"
"""The stage of an update that does the heavy imports; without new data an update has none."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30  # the values are C ints
_PAD_BYTES = 64 << 20


class Interrupts:
    """Catches signals. ``signum`` is the last one that came, or ``None``.

    Where signals do not reach an update, as in a thread of a program, :meth:`ask` does what one
    would do: at the next report of progress, or at the next step of training.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def ask(self, signum: int) -> None:
        """Ask for an end, from any thread."""
        self.signum = signum

    def reporting(self, progress: Progress | None) -> Progress:
        """Wrap ``progress`` so that it ends the work once somebody has asked for that.

        Within a block that is :meth:`deferred` it does not: who is in there looks for itself.
        """

        def report(stage: str, done: int, total: int) -> None:
            if progress is not None:
                progress(stage, done, total)
            if self.asked and not self._deferred:
                raise KeyboardInterrupt

        return report

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM within the block, if they have Python's default handlers.

        A host's own handlers stay. Outside of the main thread this changes nothing.
        """
        defaults: dict[int, Any] = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: signal.SIG_DFL,
        }
        replaced: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            replaced = {s: d for s, d in defaults.items() if signal.getsignal(s) == d}
        try:
            for signum in replaced:
                signal.signal(signum, self._on_signal)
            yield
        finally:
            for signum, default in replaced.items():
                signal.signal(signum, default)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note the first signal within the block, and raise it at the end of the block.

        Raises:
            KeyboardInterrupt: at the end after one signal, at once on a second one.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            raise KeyboardInterrupt

    def _on_signal(self, signum: int, frame: object) -> None:
        first, self.signum = self.signum is None, signum
        if not (first and self._deferred):
            raise KeyboardInterrupt


def give_way(nice: int) -> None:
    """Lower this process's priority to ``nice`` (1 to 19), unless it is as low already; 0 does not.

    Linux may weigh sessions against each other, and niceness within each only (``autogroup``). So
    where this process leads its session, as a job of cron does, the session is lowered, too.
    """
    if not nice or not hasattr(os, "setpriority"):
        return
    with suppress(OSError):  # the priority may be lowered always, but not in every sandbox
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
    if os.getsid(0) == os.getpid():
        with suppress(OSError, ValueError):  # another system, or a kernel without it
            group = Path("/proc/self/autogroup")
            now = int(group.read_text(encoding="ascii").rpartition(" ")[2])
            group.write_text(str(max(nice, now)), encoding="ascii")


def settle() -> None:
    """Import what training needs, and set up garbage collection and memory for it.

    The imports create about 400,000 objects that live as long as the process. The collector would
    scan them again and again during the imports, and once more at exit. So collection is off during
    the imports, and the objects are frozen afterwards. A package that is not installed is reported
    later, where it is needed.
    """
    threads.prepare()
    collected = gc.isenabled()
    gc.disable()
    try:
        _keep_freed_memory()
        with suppress(ImportError):  # loading the model reports which package is missing
            import peft  # noqa: F401
            import torch  # noqa: F401
            from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
        gc.freeze()
    finally:
        if collected:
            gc.enable()


def settling(progress: Progress | None) -> Progress:
    """Wrap ``progress`` so that the process settles when an update starts to load a model.

    An update without new data never gets there, and imports nothing heavy.
    """

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)
        if (stage, done) == (LOADING, 0):
            settle()

    return report


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which needs the same amount again.

    By default glibc maps and unmaps large blocks one by one, and the kernel clears every page of
    them again in each step. Other C libraries stay as they are.
    """
    if sys.platform != "linux":
        return
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TOP_PAD, _PAD_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
