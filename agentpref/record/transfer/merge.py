"""Several homes united into one: every run, and all that was said of it, exactly once by id.

Every batch that is written is a transaction, so that a merge may be interrupted anywhere and done
again. The keys come first, then the tombstones, then the rows that these let in. What a host has
learned (updates, revisions, what serves) stays with it: weights are not united by copying them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from agentpref.errors import ConfigError
from agentpref.home import Home, StrPath
from agentpref.record.database import connect, translated
from agentpref.record.deletion import tombstones
from agentpref.record.deletion.forget import Forgotten
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.transfer.foreign import Foreign, opened
from agentpref.record.transfer.merger import Merger, Outcome
from agentpref.types import Progress

CACHE_KILOBYTES = 65_536
"""Memory for the pages of the database that grows: ids of messages fall anywhere in their index."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of one other home.

    ``rows`` counts what became of its rows; ``keys`` is how many keys of its users' names are new
    here; ``tombstones`` is how many users had been forgotten there and not here, and ``forgot``
    what was then removed here.
    """

    home: str
    rows: Outcome
    keys: int = 0
    tombstones: int = 0
    forgot: Forgotten | None = None

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values: what ``--json`` prints."""
        named = [refusal._asdict() for refusal in self.rows.named]
        return {
            "home": self.home,
            **asdict(self.rows),
            "named": named,
            "keys": self.keys,
            "tombstones": self.tombstones,
            "forgot": None if self.forgot is None else self.forgot.to_mapping(),
        }


def merge(
    home: Home | StrPath | None,
    others: Iterable[Home | StrPath],
    *,
    progress: Progress | None = None,
) -> list[Merged]:
    """Bring into a home what others logged.

    Each other home is brought to this version's schema, and what waits in its spill into its
    database, as its own log would do; nothing else in it changes. What was forgotten in one of them
    is forgotten here, and what was forgotten here is not let in.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        others: the other homes, or their folders.
        progress: called with ``(stage, done, total)`` as work goes on.

    Returns:
        What came of each other home, in their order.

    Raises:
        NotAHome: a folder is no home. Nothing was merged.
        ConfigError: a home is to be merged into itself. Nothing was merged.
        CorruptHome: a database cannot be read. What was merged before stays, as it does below.
        NewerHome: a later agentpref has changed a database beyond what this one knows.
        UpdateRunning: somebody was forgotten elsewhere, and an update of this home is running.
        NotKept: a database cannot be written.
    """
    place = _opened(home)
    sources = [_opened(other) for other in others]
    for source in sources:
        if os.path.samefile(source.database, place.database):
            raise ConfigError(f"{source.path} is the home itself; name the other homes")
    return [_merge_one(place, source, _told_of(source, progress)) for source in sources]


def _opened(home: Home | StrPath | None) -> Home:
    return Home.open(home)


def _merge_one(home: Home, other: Home, tell: Progress) -> Merged:
    with opened(other) as source:
        keys = _adopt_keys(home, other)
        theirs = _new_tombstones(home, source)
        forgot = tombstones.adopt(home, theirs, tell) if theirs else None
        with translated(home), closing(connect(home)) as target:
            target.execute(f"PRAGMA cache_size = -{CACHE_KILOBYTES}")
            merger = Merger(source, target, home, tell)
            merger.add_all()
    return Merged(str(other.path), merger.outcome, keys, len(theirs), forgot)


def _adopt_keys(home: Home, other: Home) -> int:
    """Take over the keys of the other home's users, without which none of them is found again."""
    if not other.user_keys.exists():
        return 0
    ours = Pseudonyms.of(home)
    return len(ours.adopt(Pseudonyms.of(other), home).names("")) - len(ours.names(""))


def _new_tombstones(home: Home, source: Foreign) -> dict[str, float]:
    """Who was forgotten there and not here; a clock that is ahead forgets nothing to come."""
    query, now = "SELECT user_id, at FROM forgotten", time.time()
    with translated(home), closing(connect(home, readonly=True)) as target:
        ours = dict(target.execute(query))
    theirs = ((name, at) for name, at in source.read(query) if isinstance(name, str))
    return {
        name: min(at, now)
        for name, at in theirs
        if isinstance(at, float) and ours.get(name, -math.inf) < min(at, now)
    }


def _told_of(other: Home, progress: Progress | None) -> Progress:
    """Tell of a stage by the home that it is about: several may have the same one."""

    def tell(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{other.path.name}: {stage}", done, total)

    return tell
