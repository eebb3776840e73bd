"""Settings for a process that only trains: imports, garbage collection and freed memory.

These settings affect the whole process. Only our commands and the processes of a team use them; the
library leaves a host's process as it is.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from agentpref.types import Progress

LOADING = "load model"
"""The stage of an update that does the heavy imports; without new data an update has none."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30  # the values are C ints
_PAD_BYTES = 64 << 20


def settle() -> None:
    """Import what training needs, and set up garbage collection and memory for it.

    The imports create about 400,000 objects that live as long as the process. The collector would
    scan them again and again during the imports, and once more at exit. So collection is off during
    the imports, and the objects are frozen afterwards. A package that is not installed is reported
    later, where it is needed.
    """
    with _uncollected():
        _keep_freed_memory()
        _load()
        gc.freeze()


def settling(progress: Progress | None) -> Progress:
    """Wrap ``progress`` so that the process settles when an update starts to load a model.

    An update without new data never gets there, and imports nothing heavy.
    """

    def told(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)
        if (stage, done) == (LOADING, 0):
            settle()

    return told


def _load() -> None:
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    except ImportError:
        return  # loading the model reports which package is missing, and the cure


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turn garbage collection off within the block."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, which needs the same amount again.

    By default glibc maps and unmaps large blocks one by one, and the kernel clears every page of
    them again in each step. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_TOP_PAD, _PAD_BYTES)
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
