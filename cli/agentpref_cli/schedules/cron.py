"""A line for cron, and the script that it runs.

Cron mails what a job prints and has no log: so the script adds each night to a log, and prints only
what a person must look at. Its first lines are written here; ``night.sh`` is the rest.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import typer

from agentpref_cli.schedules import DELAY_MINUTES, GOOD_CODES, Job, Plan, Step, local_zone


def plan(job: Job) -> Plan:
    """The script, and the line for the crontab."""
    if job.at.zone is not None and job.at.zone != local_zone():
        raise typer.BadParameter(
            f"cron runs its jobs in the machine's time zone, {local_zone()}: leave out "
            f"{job.at.zone}, or use --as systemd",
            param_hint="--at",
        )
    script, log = _paths(job)
    return Plan(
        files={script: _script(job, log)},
        hints=[
            f"the line, for `crontab -e`: {line(job)}",
            f"every night at {job.at}, {local_zone()}, or up to {DELAY_MINUTES} minutes later",
            "cron does not make up for a night that the machine was off; systemd does",
            f"try it once: {shlex.quote(str(script))} --now",
            f"its log: {shlex.quote(str(log))}",
        ],
        install=[Step(["crontab", "-"], lambda: in_table(_table(), job))],
        remove=[Step(["crontab", "-"], lambda: without(_table(), job))],
        mode=0o700,
    )


def _paths(job: Job) -> tuple[Path, Path]:
    """Where the script and its log are: where this user's settings and states are."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return (
        Path(config) / "agentpref" / f"{job.name}.sh",
        Path(state) / "agentpref" / f"{job.name}.log",
    )


def line(job: Job) -> str:
    """The line of a crontab; there a percent sign is a line break unless it is escaped.

    Cron's own parsing knows no other escape, and hands the rest to the shell as it is.
    """
    command = shlex.quote(str(_paths(job)[0])).replace("%", "\\%")
    return f"{job.at.minute} {job.at.hour} * * * {command}"


def _script(job: Job, log: Path) -> str:
    body = (Path(__file__).parent / "night.sh").read_text(encoding="utf-8")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    head = [
        "#!/bin/sh",
        job.mark,
        f"log={shlex.quote(str(log))}",
        f"delay={60 * DELAY_MINUTES} # seconds, at most",
        *exports,
        f"run() {{ exec {shlex.join(job.words)}; }}",
    ]
    return "\n".join(head) + "\n" + body.replace("GOOD", " | ".join(map(str, (0, *GOOD_CODES))))


# The crontab


def _table() -> str:
    """This user's crontab; nothing if there is none, which makes `crontab -l` fail."""
    done = subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def in_table(table: str, job: Job) -> str:
    """A crontab with this job, in place of what it had of it."""
    return without(table, job) + f"{_marks(job)[0]}\n{line(job)}\n{_marks(job)[1]}\n"


def without(table: str, job: Job) -> str:
    """A crontab without this job; all other lines stay as they are."""
    begin, end = _marks(job)
    kept, inside = [], False
    for text in table.splitlines():
        inside = inside or text == begin
        if not inside:
            kept.append(text)
        inside = inside and text != end
    if inside:
        raise typer.BadParameter(
            f"the crontab has the line {begin!r} and no line {end!r} after it: mend it with "
            "`crontab -e`",
            param_hint="--as cron",
        )
    return "".join(f"{text}\n" for text in kept)


def _marks(job: Job) -> tuple[str, str]:
    return f"# {job.name}: begin (agentpref schedule)", f"# {job.name}: end (agentpref schedule)"
