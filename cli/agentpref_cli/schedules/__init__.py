"""Schedules of a nightly update, for systemd, cron and Kubernetes.

Each kind is one module with a function ``plan(job)``. A plan is text and commands, and changes
nothing: the command `schedule` prints it, or carries it out.

Whatever stands in a path, a name or a setting reaches the update as it is, and nothing of it is
expanded on the way. Only control characters are refused, since a line of these files ends there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

GOOD_CODES = (3, 4, 5, 7)
"""Exit codes, beside 0, of nights that went well though nothing new serves."""

DELAY_MINUTES = 10
"""Over how many minutes the beginnings are spread, so that many homes do not begin at once."""

CARRIED = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "PYTHONPATH")
"""Variables of the environment that an update depends on, and that hold no secret."""

_AT = re.compile(r"(\d\d?):(\d\d)(?: +(\S+))?", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class At:
    """A time of day. ``zone`` is a name such as ``Europe/Berlin``; ``None`` is the machine's."""

    hour: int
    minute: int
    zone: str | None = None

    @classmethod
    def parse(cls, text: str) -> At:
        """Read ``03:00`` or ``03:00 Europe/Berlin``; ``BadParameter`` for anything else."""
        found = _AT.fullmatch(text.strip())
        if found is None or int(found[1]) > 23 or int(found[2]) > 59:
            raise typer.BadParameter(
                f"{text!r} is no time of day; give one such as 03:00, or '03:00 Europe/Berlin'",
                param_hint="--at",
            )
        if found[3] is not None:
            try:
                ZoneInfo(found[3])
            except (ZoneInfoNotFoundError, ValueError, OSError) as error:
                raise typer.BadParameter(
                    f"{found[3]!r} is no time zone that this machine knows; give a name such as "
                    "Europe/Berlin or Etc/UTC",
                    param_hint="--at",
                ) from error
        return cls(int(found[1]), int(found[2]), found[3])

    def __str__(self) -> str:
        return f"{self.hour:02}:{self.minute:02}"


def local_zone() -> str:
    """The name of this machine's time zone, or its abbreviation where no name is found."""
    link = os.environ.get("TZ", "").lstrip(":") or os.path.realpath("/etc/localtime")
    name = link.partition("zoneinfo/")[2] or link
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return time.tzname[0]
    return name


@dataclass(frozen=True)
class Job:
    """A nightly update: which, of which home, when, and what it needs.

    Attributes:
        name: of the unit, the script or the CronJob.
        command: the first words, which run agentpref.
        update: the words after ``update``, with ``--model`` among them.
        home: the folder of the home.
        namespace: whose update it is.
        at: when.
        reads: files and folders that the update reads beside the home: the model, the settings.
        writes: folders that it writes to beside the home: where models from a hub are kept.
        notifies: whether another program is run after the update.
        environment: variables that the update depends on.
        user: who owns the home, for units of the system.
        of_system: whether the machine runs it, and not this user's session.
        image: the container's image, for Kubernetes.
        claim: the claim of the volume that holds the home, for Kubernetes.
    """

    name: str
    command: Sequence[str]
    update: Sequence[str]
    home: Path
    namespace: str
    at: At
    reads: Sequence[Path] = ()
    writes: Sequence[Path] = ()
    notifies: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    of_system: bool = False
    image: str = ""
    claim: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise typer.BadParameter(
                f"{self.name!r} cannot name a unit, a file and a CronJob; use up to 52 of a-z, 0-9 "
                "and -",
                param_hint="--name",
            )
        texts = [*self.command, *self.update, str(self.home), *self.environment.values()]
        for text in texts:
            if not text.isprintable():
                raise typer.BadParameter(
                    f"{text!a} has a control character, which no line of a schedule can hold; "
                    "rename it",
                    param_hint="schedule",
                )

    @property
    def words(self) -> list[str]:
        """The whole command line."""
        return [*self.command, "update", *self.update]

    @property
    def mark(self) -> str:
        """The line by which a schedule is known again as ours, and as this home's."""
        return f"# made by `agentpref schedule` for {self.home}, namespace {self.namespace}"


class Step(NamedTuple):
    """A command, and what makes the text that it reads on its standard input."""

    words: Sequence[str]
    given: Callable[[], str] | None = None


@dataclass(frozen=True)
class Plan:
    """What a schedule consists of, and how it is installed and removed.

    Attributes:
        files: the text of each file that is written, by its path.
        hints: lines for people: when it runs, how to try it, where its log is.
        install: steps after the files were written.
        remove: steps before the files are removed.
        after: steps after they were removed.
        mode: of the files.
        manifest: what is applied instead of files, in text.
    """

    files: Mapping[Path, str]
    hints: Sequence[str]
    install: Sequence[Step]
    remove: Sequence[Step]
    after: Sequence[Step] = ()
    mode: int = 0o644
    manifest: str = ""
