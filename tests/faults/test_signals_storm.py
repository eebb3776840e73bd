"""Tens of thousands of exceptions out of signal handlers, at any moment of a log's life."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parent.parent / "core" / "record" / "signal_storm.py"
STROKES = 30_000


@pytest.mark.guarantee("record", f"{STROKES:,} interruptions")
def test_a_long_storm_of_exceptions_out_of_signal_handlers_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(STORM), str(tmp_path / "home"), str(STROKES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == 0
    assert found["missing"] <= found["dropped"], found
    assert found["strokes"] >= STROKES
