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


OPENING = """
import signal, sys
import agentpref

def late(*_):
    raise TimeoutError("the app's own")

signal.signal(signal.SIGALRM, late)
agentpref.Log(sys.argv[1]).close()
late_ones = 0
for n in range(200):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00003 * (n + 1))
        log = agentpref.Log(sys.argv[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
        log.close()
    except TimeoutError:
        late_ones += 1
print(late_ones)
"""


def test_a_time_out_of_the_app_passes_through_the_opening_of_a_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
