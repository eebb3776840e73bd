"""Times as people write them on a command line: an age such as `1d`, or a date.

Pure: what time it is now, the caller says. A date without a zone is local, as it is shown.
"""

from __future__ import annotations

import math
import re

SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
"""The length of each unit that an age may have."""

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.ASCII)


def age(text: str) -> float | None:
    """Read an age such as ``90m`` or ``1.5d`` as seconds; None for what is none."""
    found = _AGE.fullmatch(text.strip())
    seconds = float(found[1]) * SECONDS[found[2]] if found else math.inf
    return seconds if math.isfinite(seconds) else None


def since(text: str, now: float) -> float:
    """Read a moment, as a date, a date with a time, or how long ago it was, as POSIX seconds.

    Raises:
        ValueError: it is none of them.
    """
    from datetime import datetime

    ago = age(text)
    if ago is not None:
        return now - ago
    return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip())).timestamp()
