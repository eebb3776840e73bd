"""Settling a process of our own: what is set apart, what is not touched, and what memory costs."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from agentpref.learn import process

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def outcome(code: str) -> str:
    """What a fresh interpreter prints, and all that it says as it ends."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() + done.stderr


def test_what_the_imports_make_is_set_apart_and_collection_goes_on() -> None:
    assert outcome("""
import gc, sys
from agentpref.learn.process import settle
settle()
frozen = gc.get_freeze_count()
print(frozen > 100_000, gc.isenabled(), "torch" in sys.modules, "peft" in sys.modules)
""") == "True True True True"  # fmt: skip


def test_nothing_is_collected_while_they_are_made() -> None:
    assert outcome("""
import gc
from agentpref.learn.process import settle
before = gc.get_stats()
settle()
print(before == gc.get_stats())
""") == "True"  # fmt: skip


@pytest.mark.parametrize("collected", ["enable", "disable"])
def test_where_an_import_fails_collection_is_as_it_was(collected) -> None:
    """Missing libraries are left to be named by what needs them; a broken one is heard of."""
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


@pytest.mark.skipif(not GLIBC, reason="only glibc's allocator is told anything")
def test_what_was_freed_is_not_faulted_in_anew() -> None:
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


def test_progress_settles_when_a_model_is_to_be_loaded_and_once(monkeypatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(process, "settle", lambda: told.append("settled"))
    progress = process.settling(lambda *stage: told.append(stage))
    for stage in (("read", 0, 1), (process.LOADING, 0, 1), (process.LOADING, 1, 1)):
        progress(*stage)
    process.settling(None)(process.LOADING, 0, 1)
    read, begun, done = ("read", 0, 1), (process.LOADING, 0, 1), (process.LOADING, 1, 1)
    assert told == [read, begun, "settled", done, "settled"]
