"""A process that does nothing but train: how it starts and ends, and what it does with memory.

Garbage collection and the allocator are the whole process's, and a host's are its own affair: only
our commands and the processes of a team call this, the library never. Knows nothing of what is
trained, nor what for.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from agentpref.types import Progress

LOADING = "load model"
"""The stage of an update in which the heavy imports come; with nothing new there is none."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30  # the values are C ints
_PAD_BYTES = 64 << 20


def settle() -> None:
    """Load what training needs, and take this process's collection and memory in hand for it.

    The imports make some 400,000 objects that live as long as the process. Collection would go
    through them again and again while they are made, and once more at the end to take them apart:
    so they are made without it, and then set apart from it. What is not installed is said where it
    is needed, as ever.
    """
    with _uncollected():
        _keep_freed_memory()
        _load()
        gc.freeze()


def settling(progress: Progress | None) -> Progress:
    """Let an update that is told of ``progress`` settle this process when it comes to load a model.

    Where nothing is new, it never does, and nothing heavy is loaded.
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
        return  # what loads the model says which one, and what to do


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect nothing within the block."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, which wants as much of it again.

    By default large blocks are mapped and unmapped one by one, and every page of them is faulted in
    and cleared anew, step after step. Other C libraries are left as they are.
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
