"""What a score means: which keys are preferences, and the scale of their scores.

A score is a preference only under a key that was *declared*: ``thumbs`` is from the start, others
are by ``declared.py``, with their lowest and highest score. Under any other key it is a
measurement, such as a latency; it is kept, and trains nothing.

A thumb is 0 or 1, or -1 or 1. A 0 is a dislike from 0 to 1, and neutral from -1 to 1. So a scale
belongs to a source: the key and the kind of voter in one namespace. That of thumbs stays what it
was when the source first showed it. Each row keeps the scale that it was given on, whatever home it
is merged into. An imported row brings its own.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from math import inf, isfinite
from typing import NamedTuple, TypeAlias

import orjson

from agentpref.errors import InvalidFeedback
from agentpref.record.messages import IMPORT_ID
from agentpref.record.sums import counted
from agentpref.types import THUMBS, Feedback

Bounds: TypeAlias = tuple[float, float]

UNIT: Bounds = (0.0, 1.0)
SIGNED: Bounds = (-1.0, 1.0)
UNKNOWN: Bounds = (-inf, inf)
"""Stars, percentages, seconds: what is much and what is little would have to be guessed."""


SCALES = "SELECT key, source, low, high FROM feedback_scale WHERE namespace = ?"


class Scale(NamedTuple):
    """The scale of the scores that one kind of source gives under one key."""

    key: str
    source: str
    low: float
    high: float


def require_thumb(score: float) -> None:
    """Refuse a score under the key ``thumbs`` that is none, with ``InvalidFeedback``."""
    if score not in (-1, 0, 1):
        raise InvalidFeedback(
            f"score is {score:g}, but a thumb is 0 or 1, -1 or 1, or a bool; give other scores "
            "under a key of their own, and declare its scale once: log.declare('stars', low=1, "
            "high=5), or `agentpref keys declare stars --low 1 --high 5`"
        )


def shown_by(scores: Iterable[float]) -> Bounds | None:
    """The scale that some scores of one source show; ``None`` if they are all 1.

    A 1 is the best of most scales, and shows nothing. Of several scores, one outside -1..1 leaves
    the scale unknown. Negative ones show -1..1, unless more zeros say that they are strays.
    """
    scores = list(scores)
    if any(abs(score) > 1 for score in scores):
        return UNKNOWN
    negative = sum(score < 0 for score in scores)
    if negative and negative >= scores.count(0):
        return SIGNED
    return UNIT if any(score < 1 for score in scores) else None


def is_known(scale: Bounds) -> bool:
    """Whether a scale has two ends, and so a middle."""
    return all(map(isfinite, scale))


def read_scale(text: str) -> Bounds:
    """Read the scale of a stored row; JSON has no infinity, and stores an unknown end as null."""
    low, high = orjson.loads(text)
    return -inf if low is None else low, inf if high is None else high


def fixed_scale(connection: sqlite3.Connection, row: Feedback, namespace: str) -> Bounds | None:
    """The scale of a row, which it may be the first thumb to show; ``None`` if it has none.

    Raises:
        InvalidFeedback: the score is no thumb, or outside the scale of its source.
    """
    if row.score is None or row.correction is not None or row.feedback_id.startswith(IMPORT_ID):
        return row.scale
    source = (namespace, row.key, row.source)
    query = "SELECT low, high, since FROM feedback_scale WHERE (namespace, key, source) = (?, ?, ?)"
    low, high, since = connection.execute(query, source).fetchone() or (*UNKNOWN, None)
    known = (low, high) if is_known((low, high)) else None
    if row.key == THUMBS and row.scale is None:
        require_thumb(row.score)
    scale = row.scale or known
    if row.key == THUMBS and since is None:
        scale = scale or shown_by([row.score])
        if scale is not None:
            with counted(connection, "feedback_scale"):
                add_scale(connection, *source, scale, row.created_at)
    if scale is not None and not scale[0] <= row.score <= scale[1]:
        raise _outside(row, namespace, scale, since)
    if scale is None and row.key == THUMBS:
        return SIGNED if row.score < 0 else UNIT  # a 1 is liked on both, and fixes neither
    return scale


def _outside(row: Feedback, namespace: str, scale: Bounds, since: float | None) -> InvalidFeedback:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(since or row.created_at))
    low, high = (f"{end:g}" for end in scale)
    cure = f"declare its scale anew: log.declare({row.key!r}, low=…, high=…, replace=True)"
    if row.key == THUMBS:
        cure = (
            "if 0 is neutral, because your scores are from -1 to 1, say so once: "
            "log.declare('thumbs', low=-1, high=1, replace=True)"
        )
    return InvalidFeedback(
        f"score {row.score:g} does not fit the key {row.key!r}: since {when}, its scores by source "
        f"{row.source!r} in namespace {namespace!r} are from {low} to {high}; pass a score from "
        f"{low} to {high}, or {cure}"
    )


def add_scale(
    connection: sqlite3.Connection, namespace: str, key: str, source: str, scale: Bounds, at: float
) -> None:
    """Keep the scale of a source; one that is known stays."""
    connection.execute(
        "INSERT OR IGNORE INTO feedback_scale (namespace, key, source, low, high, since)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (namespace, key, source, *scale, at),
    )


def derive_scales(connection: sqlite3.Connection) -> None:
    """Give the scores of a home from before scales were kept the scale that their source shows."""
    found: dict[tuple[str, str, str], list[tuple[float, float, str]]] = {}
    for namespace, key, source, *said in connection.execute(_WITHOUT_SCALE):
        if source == "human" or key == THUMBS:
            found.setdefault((namespace, key, source), []).append((said[0], said[1], said[2]))
    for of, rows in found.items():
        live = [row for row in rows if not row[2].startswith(IMPORT_ID)]
        scale = shown_by(score for score, _, _ in live)
        if scale is not None:
            add_scale(connection, *of, scale, min(at for _, at, _ in live))
        for score, _, row_id in rows:
            own = UNIT if row_id.startswith(IMPORT_ID) else scale
            if own is not None and own[0] <= score <= own[1]:
                values = (orjson.dumps(own).decode(), row_id)
                connection.execute("UPDATE feedback SET scale = ? WHERE feedback_id = ?", values)


def declare_what_had_a_scale(connection: sqlite3.Connection) -> None:
    """Declare the keys under which people's scores had a scale, so that they go on to count.

    ``feedback_scale`` has nearly all of them. Others have the scale of their newest score.
    """
    connection.execute(
        """INSERT OR REPLACE INTO feedback_scale (namespace, key, source, low, high, since)
        SELECT namespace, key, said.source, json_extract(said.scale, '$[0]'),
            json_extract(said.scale, '$[1]'), max(said.created_at)
        FROM feedback AS said CROSS JOIN run USING (run_id)
        WHERE said.source = 'human' AND key != 'thumbs' AND correction IS NULL
            AND json_type(said.scale, '$[0]') IN ('integer', 'real')
            AND json_type(said.scale, '$[1]') IN ('integer', 'real')
            AND NOT EXISTS (SELECT 1 FROM feedback_scale AS known
                WHERE known.namespace = run.namespace AND known.key = said.key
                AND known.source = 'human' AND known.low > -1e999 AND known.high < 1e999)
        GROUP BY namespace, key"""
    )


_WITHOUT_SCALE = """
SELECT namespace, key, feedback.source, score, feedback.created_at, feedback_id
FROM feedback CROSS JOIN run USING (run_id)
WHERE score IS NOT NULL AND correction IS NULL AND scale IS NULL
"""
