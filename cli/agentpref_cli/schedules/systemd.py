"""A service and a timer of systemd: of the system for root, else of this user.

The timer makes up for a night that the machine was off, systemd never starts a service that still
runs, and the journal is the log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from agentpref_cli.schedules import DELAY_MINUTES, GOOD_CODES, Job, Plan, Step, local_zone

_PLAIN_PATH = re.compile(r"[\w@%+=:,./ -]+")
_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))


def plan(job: Job) -> Plan:
    """The units, and how systemd takes them up."""
    unit = f"{job.name}.timer"
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    folder = Path("/etc/systemd/system") if job.of_system else Path(config) / "systemd/user"
    control = ["systemctl"] if job.of_system else ["systemctl", "--user"]
    journal = "journalctl" if job.of_system else "journalctl --user"
    shown = " ".join(control)
    zone = job.at.zone or f"the machine's time zone, {local_zone()}"
    hints = [
        f"every night at {job.at}, {zone}, or up to {DELAY_MINUTES} minutes later",
        f"try it once: {shown} start {job.name}.service",
        f"its log: {journal} -u {job.name}.service",
        f"when the next one is: {shown} list-timers {unit}",
    ]
    if not job.of_system:
        hints.append("it runs while you are logged in; for always: loginctl enable-linger")
    return Plan(
        files={
            folder / f"{job.name}.service": "\n".join(_service(job)) + "\n",
            folder / unit: "\n".join(_timer(job)) + "\n",
        },
        hints=hints,
        install=[Step([*control, "daemon-reload"]), Step([*control, "enable", "--now", unit])],
        remove=[Step([*control, "disable", "--now", unit])],
        after=[Step([*control, "daemon-reload"])],
    )


def _service(job: Job) -> Iterator[str]:
    yield job.mark
    yield "[Unit]"
    yield "Description=agentpref: learn from the feedback since the last update"
    yield "# Who is to be told when a night fails, e.g. a unit that sends mail:"
    yield "# OnFailure=mail-to-ops@%n.service"
    yield ""
    yield "[Service]"
    yield "Type=oneshot"
    if job.of_system:
        yield f"User={job.user}"
    for name, value in job.environment.items():
        yield f"Environment={quoted(f'{name}={value}')}"
    yield f"ExecStart={command_line(job.words)}"
    yield "# Nights that went well, though nothing new serves. 75 (busy) and others fail the unit."
    yield f"SuccessExitStatus={' '.join(map(str, GOOD_CODES))}"
    yield "# SIGTERM ends the update after the current step, and the next one resumes it."
    yield "KillMode=mixed"
    yield "TimeoutStopSec=5min"
    yield "Nice=10"
    if job.of_system:
        yield from _walls(job)


def _walls(job: Job) -> Iterator[str]:
    """What the service may not do; another program that is run after it may need more."""
    if job.notifies:
        yield "# --notify runs a program that may write and send mail: no walls around it."
        return
    written = [str(job.home), *(f"-{path}" for path in job.writes)]  # those may not be there yet
    yield "ProtectSystem=strict"
    yield f"ReadWritePaths={' '.join(map(quoted, written))}"
    paths = [job.home, *job.reads, *job.writes]
    if not any(path.is_relative_to(folder) for path in paths for folder in _TEMPORARY):
        yield "PrivateTmp=yes"
    yield "NoNewPrivileges=yes"


def _timer(job: Job) -> Iterator[str]:
    zone = f" {job.at.zone}" if job.at.zone else ""
    yield job.mark
    yield "[Unit]"
    yield "Description=agentpref: an update every night"
    yield ""
    yield "[Timer]"
    if not zone:
        yield "# In the time zone of the machine."
    yield f"OnCalendar=*-*-* {job.at}:00{zone}"
    yield f"RandomizedDelaySec={DELAY_MINUTES}min"
    yield "# A night that the machine slept through is made up for."
    yield "Persistent=true"
    yield ""
    yield "[Install]"
    yield "WantedBy=timers.target"


def command_line(words: list[str]) -> str:
    """Words as the value of ExecStart=, none of which is expanded.

    The colon turns off the expansion of ``$``. systemd refuses a program whose path has a quote or
    another special character; a shell does not, and hands on to it.
    """
    if not _PLAIN_PATH.fullmatch(words[0]):
        words = ["/bin/sh", "-c", 'exec "$0" "$@"', *words]
    return ":" + " ".join(quoted(word) for word in words)


def quoted(text: str) -> str:
    """A text as one word of a unit file.

    >>> quoted("/srv/100% $HOME"), quoted('say "hi"'), quoted("plain")
    ('"/srv/100%% $HOME"', '"say \\\\"hi\\\\""', 'plain')
    """
    text = text.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
