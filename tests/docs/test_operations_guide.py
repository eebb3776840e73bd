"""The recipes of the operator's guide: they are what the commands print, and do as they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sessions import ROOT, fences

from agentpref import Log
from agentpref_cli.commands.schedule import _words
from agentpref_cli.schedules import At, Job, systemd

GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
AGENTPREF = Path(sys.executable).with_name("agentpref")
LINES = [line for f in fences(GUIDE) if f.language == "crontab" for line in f.text.splitlines()]


def shown_job() -> Job:
    """What the guide's command says, as it is read on the machine of the guide."""
    home, model = Path("/srv/shop/.agentpref"), "/srv/models/qwen2.5-0.5b-instruct"
    return Job(
        "agentpref-update",
        ["/srv/shop/.venv/bin/agentpref"],
        _words(home, "default", model, None, 120, None),
        home,
        "default",
        At.parse("03:30"),
        user="www-data",
        of_system=True,
    )


def test_the_guide_shows_the_units_that_the_command_writes() -> None:
    files = systemd.plan(shown_job()).files
    shown = [fence.text for fence in fences(GUIDE) if fence.language == "ini"]
    assert shown == [f"# {path}\n{text}" for path, text in files.items()]


def as_cron_runs(line: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a crontab's line as cron does: in sh, with next to no environment."""
    command = line.split(maxsplit=5)[5].replace(r"\%", "%")
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", "SHELL": "/bin/sh"}
    if "PYTHONPATH" in os.environ:  # how this checkout is found, where it is not installed
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("line", LINES)
def test_the_lines_for_retention_and_backups_run_under_cron(tmp_path: Path, line: str) -> None:
    home = tmp_path / "home"
    with Log(home) as record:
        record.record([{"role": "user", "content": "Hello!"}], "Hi!")
    (tmp_path / "backups").mkdir()
    for shown, real in (
        ("/srv/shop/.venv/bin/agentpref", AGENTPREF),
        ("/srv/shop/.agentpref", home),
        ("/srv/backups", tmp_path / "backups"),
    ):
        line = line.replace(str(shown), str(real))
    done = as_cron_runs(line)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shutil.rmtree(home)
    done = as_cron_runs(line)
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), "which cron mails"


def test_the_guide_names_every_exit_code() -> None:
    table = GUIDE.partition("## Exit codes")[2].partition("## ")[0]
    codes = {
        int(code) for row in re.findall(r"(?m)^\| ([\d, ]+) \|", table) for code in row.split(",")
    }
    assert codes == {0, 1, 2, 3, 4, 5, 6, 7, 75, 126, 127, 130, 137, 143}


def test_the_commands_of_the_guide_print_schedules(tmp_path: Path) -> None:
    shell = [line for f in fences(GUIDE) if f.language == "sh" for line in f.text.splitlines()]
    lines = [line.partition(" |")[0] for line in shell if "agentpref schedule" in line]
    kinds = ("[Timer]", "#!/bin/sh", "kind: CronJob")
    assert len(lines) == len(kinds)
    with Log(tmp_path / "home"):
        pass
    for line, kind in zip(lines, kinds, strict=True):
        words = shlex.split(line.partition("agentpref schedule")[2].replace("--install", ""))
        real = {"/srv/shop/.agentpref": str(tmp_path / "home"), "/srv/models": str(tmp_path)}
        for shown, place in real.items():
            words = [word.replace(shown, place) for word in words]
        (tmp_path / "qwen2.5-0.5b-instruct").mkdir(exist_ok=True)
        command = [str(AGENTPREF), "schedule", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert kind in done.stdout
