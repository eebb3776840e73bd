"""A pipe in the place of a file of a home stops no command: nobody writes into it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import agentpref

COMMANDS = """
import sys
from typer.testing import CliRunner
from agentpref_cli.main import app
for home in sys.argv[1:]:
    forget = ["forget", "--user-id", "u", "--yes"]
    for words in (["doctor"], ["verify"], forget, ["backup", home + "-copy"]):
        done = CliRunner().invoke(app, [*words, "--home", home])
        assert done.exception is None or isinstance(done.exception, SystemExit), (home, words)
        print(words[0], done.exit_code)
"""


@pytest.mark.guarantee("logging", "doctor, verify, forget and backup; each of three files")
def test_a_pipe_in_place_of_a_file_of_a_home_stops_no_command(tmp_path: Path) -> None:
    homes = []
    for name in ("spill.jsonl", "user.keys", "refused.jsonl"):
        homes.append(tmp_path / name.partition(".")[0])
        with agentpref.Log(homes[-1]) as log:
            log.record([{"role": "user", "content": "hello"}], "hello", user_id="u")
        (homes[-1] / name).unlink(missing_ok=True)
        os.mkfifo(homes[-1] / name)
    call = [sys.executable, "-c", COMMANDS, *map(str, homes)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12
