"""When `watch --every-pairs` updates: how many pairs it waits for, how long, and at what hours."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import typer

BUSY_SECONDS = 60.0
FIRST_SECONDS, LONGEST_SECONDS = 60.0, 3_600.0
MOST_TIMES = 8
"""Up to how many times as many pairs are waited for after updates that brought nothing."""

_WINDOW = re.compile(r"(\d\d?):(\d\d)-(\d\d?):(\d\d)", re.ASCII)
_BUSY = 75
_NOTHING_LEFT = (0, 3)
_IN_VAIN = (4, 5, 6, 7)


@dataclass(frozen=True)
class Window:
    """Hours of the day, in local time: from ``start`` to before ``end``, in minutes of the day.

    >>> night = Window.parse("22:00-06:00")
    >>> night.has(datetime(2026, 11, 29, 23, 30)), night.has(datetime(2026, 11, 29, 6, 0))
    (True, False)
    """

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``22:00-06:00``; ``BadParameter`` for anything else."""
        found = _WINDOW.fullmatch(text.strip())
        hours = [int(part) for part in found.groups()] if found else []
        is_time = bool(hours) and max(hours[0::2]) < 24 and max(hours[1::2]) < 60
        if not is_time or hours[:2] == hours[2:]:
            raise typer.BadParameter(
                f"{text!r} is no part of a day; give two different times such as 22:00-06:00",
                param_hint="--only",
            )
        return cls(60 * hours[0] + hours[1], 60 * hours[2] + hours[3])

    def has(self, moment: datetime) -> bool:
        """Whether a local time is within; the window may go over midnight."""
        minute = 60 * moment.hour + moment.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        start, end = (f"{m // 60:02}:{m % 60:02}" for m in (self.start, self.end))
        return f"{start}-{end}"


class Pace:
    """Decides from how earlier updates ended when the next one may begin.

    An update that failed or was busy is tried again after a rest, which doubles from a minute to an
    hour. After one that was refused or had too little evidence, the next one waits for twice as
    many new pairs, up to eight times as many: it would most often end alike.

    Args:
        pairs: how many new pairs an update waits for.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, pairs: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pairs, self._clock = pairs, clock
        self._times, self._failures, self._rests_until = 1, 0, float("-inf")
        self.resumes = False
        """Whether an update is due whatever came in: the last one did not come to its end."""

    @property
    def wanted(self) -> int:
        """How many new pairs the next update waits for."""
        return self._times * self._pairs

    @property
    def rests(self) -> bool:
        """Whether it is too soon to try again."""
        return self._clock() < self._rests_until

    def ended(self, code: int) -> str:
        """Take in the exit code of an update; returns what comes next, in words."""
        rest = 0.0
        if code == _BUSY:
            rest = BUSY_SECONDS
        elif code in _NOTHING_LEFT or code in _IN_VAIN:
            self._times = min(2 * self._times, MOST_TIMES) if code in _IN_VAIN else 1
            self._failures, self.resumes = 0, False
        else:
            rest = min(FIRST_SECONDS * 2**self._failures, LONGEST_SECONDS)
            self._failures, self.resumes = self._failures + 1, True
        self._rests_until = self._clock() + rest
        if rest:
            return f"the update exited {code}; tried again in {rest / 60:g} min"
        return f"the next update waits for {self.wanted:,} new pairs"
