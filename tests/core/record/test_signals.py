"""An exception out of a signal handler, at any moment: nothing is lost, and nothing hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

STORM = Path(__file__).with_name("signal_storm.py")


def test_a_storm_of_exceptions_out_of_signal_handlers_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(STORM), str(tmp_path / "home"), "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == 0
    assert found["missing"] <= found["dropped"], found
    assert found["strokes"] >= 2000
    assert found["acknowledged"] >= 200
