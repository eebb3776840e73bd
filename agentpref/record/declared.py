"""Which keys of feedback are preferences, beside ``thumbs``: those that somebody declared.

A declaration holds for a namespace and for every source: people, models and code. Scores that were
given before it count too, if they fit its scale. See ``scales.py`` for what a scale means.
"""

from __future__ import annotations

import sqlite3
import time
from typing import Any, NamedTuple

from agentpref.errors import ConfigError, InvalidFeedback, described
from agentpref.record.database import transaction
from agentpref.record.scales import SIGNED, UNIT, Bounds, is_known
from agentpref.record.sums import counted
from agentpref.types import RETRACTION, SOURCES, THUMBS

_RESERVED = (RETRACTION, "correction", "comparison")


class KeyUse(NamedTuple):
    """A key of feedback: its scale, since when it has one, and how many scores there are.

    ``low`` and ``high`` are ``None`` where no scale is known.
    """

    key: str
    source: str
    low: float | None
    high: float | None
    since: float | None
    scores: int

    @property
    def declared(self) -> bool:
        """Whether its scores are preferences."""
        return self.key == THUMBS or self.low is not None


def declare(
    connection: sqlite3.Connection,
    namespace: str,
    key: str,
    scale: tuple[Any, Any],
    *,
    replace: bool = False,
) -> None:
    """Declare that the scores under a key are preferences; declaring it again changes nothing.

    Raises:
        InvalidFeedback: the key or the scale is none.
        ConfigError: the key has another scale, and ``replace`` is false.
    """
    bounds = _checked(key, scale)
    query = "SELECT low, high FROM feedback_scale WHERE (namespace, key, source) = (?, ?, ?)"
    with transaction(connection), counted(connection, "feedback_scale"):
        for source in SOURCES:
            found = connection.execute(query, (namespace, key, source)).fetchone()
            if found == bounds:
                continue
            if found is not None and is_known(found) and not replace:
                raise ConfigError(
                    f"the scores of {key!r} by source {source!r} in namespace {namespace!r} are "
                    f"from {found[0]:g} to {found[1]:g} already; pass replace=True (--replace) to "
                    f"read new scores from {bounds[0]:g} to {bounds[1]:g}"
                )
            connection.execute(
                "INSERT OR REPLACE INTO feedback_scale"
                " (namespace, key, source, low, high, since) VALUES (?, ?, ?, ?, ?, ?)",
                (namespace, key, source, *bounds, time.time()),
            )


def undeclare(connection: sqlite3.Connection, namespace: str, key: str) -> bool:
    """Take a declaration back: the scores are kept and train nothing. Returns whether it was one.

    Raises:
        InvalidFeedback: the key is ``thumbs``.
    """
    if key == THUMBS:
        raise InvalidFeedback("thumbs are always preferences; take single ones back with retract")
    with transaction(connection), counted(connection, "feedback_scale"):
        query = "DELETE FROM feedback_scale WHERE namespace = ? AND key = ? AND low > -1e999"
        return connection.execute(query, (namespace, key)).rowcount > 0


def _checked(key: Any, scale: tuple[Any, Any]) -> Bounds:
    if not isinstance(key, str) or not key or not key.isprintable() or key in _RESERVED:
        shown = key if key in _RESERVED else described(key)
        raise InvalidFeedback(f"key is {shown}; pass the key of scores, such as 'stars'")
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in scale):
        raise InvalidFeedback(
            f"low is {described(scale[0])} and high {described(scale[1])}; pass the lowest and the "
            "highest score, for example low=1, high=5"
        )
    low, high = map(float, scale)
    if not (is_known((low, high)) and low < high):
        raise InvalidFeedback(
            f"the scale is from {low:g} to {high:g}; pass the lowest and the highest score, for "
            "example low=1, high=5"
        )
    if key == THUMBS and (low, high) not in (UNIT, SIGNED):
        raise InvalidFeedback(
            f"thumbs are from 0 to 1 or from -1 to 1, not from {low:g} to {high:g}; give such "
            "scores under a key of their own, for example log.declare('stars', low=1, high=5)"
        )
    return low, high


def uses(connection: sqlite3.Connection, namespace: str) -> list[KeyUse]:
    """List the keys of a namespace that have a scale or scores, by key and source."""
    found = []
    for key, source, low, high, since, scores in connection.execute(_USES, (namespace,)):
        if not is_known((low, high)):
            low = high = since = None
        found.append(KeyUse(key, source, low, high, since, scores))
    return found


def undeclared(connection: sqlite3.Connection, namespace: str) -> dict[str, int]:
    """Count the scores under keys that are no preferences, by key."""
    return dict(connection.execute(_UNDECLARED, (namespace, THUMBS)).fetchall())


_USES = """
WITH given AS (
    SELECT key, feedback.source AS source, count(*) AS scores
    FROM feedback CROSS JOIN run USING (run_id)
    WHERE namespace = ?1 AND score IS NOT NULL AND correction IS NULL GROUP BY 1, 2
), known AS (SELECT key, source, low, high, since FROM feedback_scale WHERE namespace = ?1)
SELECT key, source, coalesce(low, -1e999), coalesce(high, 1e999), since, coalesce(scores, 0)
FROM (SELECT key, source FROM given UNION SELECT key, source FROM known)
LEFT JOIN given USING (key, source) LEFT JOIN known USING (key, source)
ORDER BY key, source
"""

_UNDECLARED = """
SELECT key, count(*) FROM feedback CROSS JOIN run USING (run_id)
WHERE key != ?2 AND score IS NOT NULL AND correction IS NULL AND namespace = ?1
    AND NOT EXISTS (SELECT 1 FROM feedback_scale AS known
        WHERE known.namespace = ?1 AND known.key = feedback.key
        AND known.source = feedback.source AND low > -1e999 AND high < 1e999)
GROUP BY key ORDER BY key
"""
