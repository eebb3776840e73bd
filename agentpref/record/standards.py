"""By what the judgements of a namespace are read: the scales of scores, and whom it trusts.

People are trusted, and so are programs, whose rules are their app's own. A model is trusted in the
strata in which a calibration found it right more often than not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any, NamedTuple

from agentpref.record import judges
from agentpref.record.scales import SCALES, Scale


class Standards(NamedTuple):
    """The scales of keys by source, and each judge's noise ε by stratum, by its name as a voter."""

    scales: tuple[Scale, ...] = ()
    judges: Mapping[str, Mapping[str, float]] = {}

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that are equal for equal standards."""
        voters = {voter: dict(sorted(self.judges[voter].items())) for voter in sorted(self.judges)}
        return {"scales": sorted(map(list, self.scales)), "judges": voters}


def standards(connection: sqlite3.Connection, namespace: str) -> Standards:
    """The standards of a namespace as they are now."""
    scales = (Scale(*row) for row in connection.execute(SCALES, (namespace,)))
    return Standards((*scales,), judges.trusted(connection, namespace))
