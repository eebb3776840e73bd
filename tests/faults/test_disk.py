"""A full or read-only disk: nothing acknowledged is lost, and the operator is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _may_mount() -> bool:
    """Whether this machine lets a process mount a file system that only it can see."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.guarantee("logging")
@pytest.mark.skipif(not _may_mount(), reason="needs unshare -rm with mounts (Linux)")
@pytest.mark.parametrize("script", ["full_disk.py", "readonly_home.py"])
def test_a_full_or_read_only_disk_loses_nothing_and_is_named(script: str, tmp_path: Path) -> None:
    command = ["unshare", "-rm", sys.executable, str(HERE / script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("ok"), done.stderr
