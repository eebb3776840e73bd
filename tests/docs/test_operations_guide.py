"""The recipes of the operator's guide: they are the files of examples/, and they do as they say."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sessions import ROOT, fences

from agentpref import Log

GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples"
SERVICE, TIMER = (EXAMPLES / "systemd" / f"agentpref-update.{end}" for end in ("service", "timer"))
NIGHTLY = EXAMPLES / "cron" / "agentpref-nightly.sh"
AGENTPREF = Path(sys.executable).with_name("agentpref")
LINES = [line for f in fences(GUIDE) if f.language == "crontab" for line in f.text.splitlines()]


@pytest.mark.parametrize("file", [SERVICE, TIMER, NIGHTLY], ids=lambda path: path.name)
def test_the_guide_shows_the_files_of_the_examples(file: Path) -> None:
    assert file.read_text(encoding="utf-8") in [fence.text for fence in fences(GUIDE)]


def as_cron_runs(line: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a crontab's line as cron does: in sh, with next to no environment."""
    command = line.split(maxsplit=5)[5].replace(r"\%", "%")
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", "SHELL": "/bin/sh"}
    if "PYTHONPATH" in os.environ:  # how this checkout is found, where it is not installed
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def installed(tmp_path: Path):
    """Install the job as the guide says, for a home and a command."""

    def install(command: object, home: object = "/nowhere", model: str = "tiny"):
        log, job = tmp_path / "agentpref-update.log", tmp_path / "agentpref-nightly.sh"
        text = NIGHTLY.read_text(encoding="utf-8")
        for name, value in (("agentpref", command), ("home", home), ("model", model), ("log", log)):
            text = re.sub(rf"(?m)^{name}=\S+", f"{name}={value}", text)
        job.write_text(text, encoding="utf-8")
        job.chmod(0o755)
        return job, log

    return install


@pytest.fixture
def nightly(installed):
    """Install the job, and run it as cron does."""

    def call(*wanted: object, **also: object):
        job, log = installed(*wanted, **also)
        line = next(line for line in LINES if "nightly" in line)
        done = as_cron_runs(line.replace("/srv/shop/agentpref-nightly.sh", str(job)))
        return done, log.read_text(encoding="utf-8")

    return call


def exiting(folder: Path, code: int) -> Path:
    command = folder / "stand-in"
    command.write_text(f"#!/bin/sh\necho said by the command\nexit {code}\n", encoding="utf-8")
    command.chmod(0o755)
    return command


@pytest.mark.parametrize("code", [0, 3, 4, 5, 7])
def test_a_night_that_went_well_is_logged_and_mails_nothing(nightly, tmp_path, code) -> None:
    done, log = nightly(exiting(tmp_path, code))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "said by the command" in log
    assert f"exit code {code}: " in log


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "failed"), (2, "bad usage"), (6, "none of the new feedback"), (75, "busy"),
     (130, "signal"), (137, "killed"), (143, "signal"), (134, "failed")],
)  # fmt: skip
def test_a_night_that_failed_is_mailed_with_what_was_said(nightly, tmp_path, code, words) -> None:
    done, log = nightly(exiting(tmp_path, code))
    assert done.returncode == code
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"agentpref update: exit code {code}: ")
    assert words in first
    assert first in log
    assert "said by the command" in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_stops_the_job_stops_the_update_and_the_log_has_it(installed, tmp_path, signum) -> None:
    """The stand-in ends in its own time, as an update does that finishes its step."""
    command, started = tmp_path / "stand-in", tmp_path / "started"
    command.write_text(
        f"#!/bin/sh\ntrap 'sleep .3; echo ended by a signal; exit 143' TERM\ntouch {started}\n"
        "while :; do sleep .05; done\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    job = tmp_path / "agentpref-nightly.sh"

    job, log = installed(command)

    def as_cron_starts() -> None:
        """A shell cannot catch what it was started to ignore, and these tests may run in nohup."""
        signal.signal(signum, signal.SIG_DFL)

    with subprocess.Popen([job], stdout=subprocess.PIPE, preexec_fn=as_cron_starts) as running:
        while not started.exists():
            time.sleep(0.02)
        running.send_signal(signum)
        running.communicate()
    assert running.returncode == 143
    assert log.read_text(encoding="utf-8").splitlines()[1:] == [
        "ended by a signal",
        "agentpref update: exit code 143: ended by a signal; the next update resumes it",
    ]


def test_a_mail_has_what_was_said_in_its_own_night_alone(nightly, tmp_path) -> None:
    nightly(exiting(tmp_path, 0))
    done, log = nightly(exiting(tmp_path, 1))
    assert log.count("said by the command") == 2
    assert done.stdout.count("said by the command") == 1
    assert "exit code 0" not in done.stdout


def test_a_command_that_is_not_there_is_mailed(nightly, tmp_path) -> None:
    """Before, `|| case $? in …` took 127 for an update that found nothing."""
    done, _ = nightly(tmp_path / "not-installed")
    assert done.returncode == 127
    assert "not-installed cannot be run" in done.stdout


def test_a_log_that_cannot_be_written_is_mailed(nightly, tmp_path) -> None:
    (tmp_path / "agentpref-update.log").mkdir()
    with pytest.raises(IsADirectoryError):
        nightly(exiting(tmp_path, 0))
    done = as_cron_runs(f"30 3 * * * {tmp_path}/agentpref-nightly.sh")
    assert done.returncode == 1
    assert "agentpref-update.log" in done.stderr


def test_the_real_command_runs_under_cron(nightly, tmp_path) -> None:
    home = tmp_path / "home"
    done, log = nightly(AGENTPREF, home)
    assert done.returncode == 1
    assert "is not an agentpref home" in done.stdout
    with Log(home) as record:
        record.record([{"role": "user", "content": "Hello!"}], "Hi!")
    done, log = nightly(AGENTPREF, home)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "exit code 3: nothing new" in log


@pytest.mark.parametrize("line", [line for line in LINES if "nightly" not in line])
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


def test_the_units_have_the_keys_that_an_operator_needs() -> None:
    service, timer = configparser.ConfigParser(), configparser.ConfigParser()
    service.optionxform = timer.optionxform = str  # type: ignore[assignment,method-assign]
    service.read(SERVICE)
    timer.read(TIMER)
    unit = service["Service"]
    assert unit["SuccessExitStatus"].split() == ["3", "4", "5", "7"], "0 is; 6 and 75 are not"
    assert unit["ExecStart"].startswith("/"), "an absolute path"
    assert unit["ReadWritePaths"] in unit["ExecStart"]
    assert {"User", "Nice", "Type"} <= {*unit}
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for file in (SERVICE, TIMER):
        text = file.read_text(encoding="utf-8")
        text = text.replace("/srv/shop/.venv/bin/agentpref", str(AGENTPREF))
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    units = [str(tmp_path / file.name) for file in (SERVICE, TIMER)]
    command = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_guide_names_every_exit_code() -> None:
    table = GUIDE.partition("## Exit codes")[2].partition("## ")[0]
    codes = {
        int(code) for row in re.findall(r"(?m)^\| ([\d, ]+) \|", table) for code in row.split(",")
    }
    assert codes == {0, 1, 2, 3, 4, 5, 6, 7, 75, 126, 127, 130, 137, 143}
