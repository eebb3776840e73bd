"""What a score means: the scale that it was given on.

A 0 is a dislike from 0 to 1, and neutral from -1 to 1. So a scale belongs to a source: the key and
the kind of voter in one namespace, and it stays what it was when the source first showed it. Each
row keeps the scale that it was given on, whatever home it is merged into. An imported row brings
its own.

Only scores that may be thumbs have a scale: a program's ``latency`` needs none.
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
from agentpref.types import Feedback

Bounds: TypeAlias = tuple[float, float]

UNIT: Bounds = (0.0, 1.0)
SIGNED: Bounds = (-1.0, 1.0)
UNKNOWN: Bounds = (-inf, inf)
"""Stars, percentages, seconds: what is much and what is little would have to be guessed."""


class Scale(NamedTuple):
    """The scale of the scores that one kind of source gave under one key."""

    key: str
    source: str
    low: float
    high: float


def is_thumb(row: Feedback | Scale) -> bool:
    """Whether a score, or those of a scale, says what is liked: a person's, or a ``thumbs``."""
    return row.source == "human" or row.key == "thumbs"


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
    """The scale of a row, which it may be the first to show; ``None`` if it has none.

    Raises:
        InvalidFeedback: the score is outside the scale of its source.
    """
    said = row.score is not None and row.correction is None and is_thumb(row)
    if row.score is None or not said or row.feedback_id.startswith(IMPORT_ID):
        return row.scale
    source = (namespace, row.key, row.source)
    found = connection.execute(
        "SELECT low, high, since FROM feedback_scale"
        " WHERE namespace = ? AND key = ? AND source = ?",
        source,
    ).fetchone()
    scale = row.scale or (found[:2] if found else shown_by([row.score]))
    if found is None and scale is not None:
        with counted(connection, "feedback_scale"):
            add_scale(connection, *source, scale, row.created_at)
    if scale is not None and not scale[0] <= row.score <= scale[1]:
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found[2]))
        low, high = (f"{end:g}" for end in scale)
        raise InvalidFeedback(
            f"score {row.score:g} does not fit the key {row.key!r}: since {since}, its scores by "
            f"source {row.source!r} in namespace {namespace!r} are from {low} to {high}; pass a "
            f"score from {low} to {high}, or say on which other scale it is, for example "
            "scale=(1, 5)"
        )
    return scale


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
        if source == "human" or key == "thumbs":
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


_WITHOUT_SCALE = """
SELECT namespace, key, feedback.source, score, feedback.created_at, feedback_id
FROM feedback CROSS JOIN run USING (run_id)
WHERE score IS NOT NULL AND correction IS NULL AND scale IS NULL
"""
