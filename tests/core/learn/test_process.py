"""A settled process freezes what it imported, keeps freed memory, and gives way to others."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentpref.learn import process

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def outcome(code: str) -> str:
    """Standard output and error of a fresh interpreter that runs the code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() + done.stderr


def test_imported_objects_are_frozen_and_collection_stays_on() -> None:
    assert outcome("""
import gc, sys
from agentpref.learn.process import settle
settle()
frozen = gc.get_freeze_count()
print(frozen > 100_000, gc.isenabled(), "torch" in sys.modules, "peft" in sys.modules)
""") == "True True True True"  # fmt: skip


def test_nothing_is_collected_during_the_imports() -> None:
    assert outcome("""
import gc
from agentpref.learn.process import settle
before = gc.get_stats()
settle()
print(before == gc.get_stats())
""") == "True"  # fmt: skip


@pytest.mark.parametrize("collected", ["enable", "disable"])
def test_collection_is_as_before_if_an_import_fails(collected) -> None:
    """A missing library is ignored here; the error of a broken one is raised."""
    assert outcome(f"""
import gc, sys
from agentpref.learn.process import settle
gc.{collected}()
sys.modules["peft"] = None
settle()
print(gc.isenabled())
class Broken:
    def find_spec(self, name, *rest):
        if name == "peft":
            raise RuntimeError
del sys.modules["peft"]
sys.meta_path.insert(0, Broken())
try:
    settle()
except RuntimeError:
    print(gc.isenabled())
""").split() == [str(collected == "enable")] * 2  # fmt: skip


@pytest.mark.skipif(not GLIBC, reason="only glibc's allocator is changed")
def test_freed_memory_is_reused_without_page_faults() -> None:
    assert outcome("""
import resource
from agentpref.learn.process import settle
settle()
import torch
def faults():
    torch.zeros(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    warm = faults()
print(faults() - warm < 100)
""") == "True"  # fmt: skip


def test_progress_settles_the_process_once_when_a_model_is_loaded(monkeypatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(process, "settle", lambda: told.append("settled"))
    progress = process.settling(lambda *stage: told.append(stage))
    for stage in (("read", 0, 1), (process.LOADING, 0, 1), (process.LOADING, 1, 1)):
        progress(*stage)
    process.settling(None)(process.LOADING, 0, 1)
    read, begun, done = ("read", 0, 1), (process.LOADING, 0, 1), (process.LOADING, 1, 1)
    assert told == [read, begun, "settled", done, "settled"]


PRIORITIES = """
import os
from agentpref.learn.process import give_way
for nice in (0, 3, 2):
    give_way(nice)
    print(os.getpriority(os.PRIO_PROCESS, 0), end=" ")
try:
    # The file is empty where the process is in a group that is not automatic.
    print(open("/proc/self/autogroup").read().rpartition(" ")[2].strip() or "none")
except OSError:
    print("none")
"""


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="needs Unix")
@pytest.mark.parametrize("leads", [True, False])
def test_a_process_gives_way_and_with_it_its_session_if_it_leads_one(leads) -> None:
    """A priority that is lower already stays."""
    start = os.getpriority(os.PRIO_PROCESS, 0)
    found = subprocess.run(
        [sys.executable, "-c", PRIORITIES],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=leads,
    )
    *process, session = found.stdout.split()
    assert [int(nice) for nice in process] == [start, max(start, 3), max(start, 3)]
    group = Path("/proc/self/autogroup")
    ours = group.read_text().rpartition(" ")[2].strip() if group.exists() else ""
    assert session == ("3" if leads and group.exists() else ours or "none")
