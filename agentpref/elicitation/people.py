"""What the people who compare answers did: how many, how fast, from which side, how much alike."""

from __future__ import annotations

import itertools
import sqlite3
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agentpref.judging.gold import standing_comparisons
from agentpref.prefer.judges.calibration import people_agreement
from agentpref.prove.signs import sign_test
from agentpref.record.store import Store
from agentpref.types import Comparison

PAUSE = 600.0
"""Two answers further apart than so many seconds have a pause between them."""


class Annotator(NamedTuple):
    """What one person said in a namespace.

    ``seconds`` is the median time between two answers, pauses left out; ``None`` if nobody can say.
    ``first`` of ``decided`` answers name the one that was shown first, and ``chance`` is how likely
    so uneven a share is by chance: who decides by the side has a small one. ``agreed`` says how
    often others say the same of the same answers, by stratum and in ``"all"``, as
    :func:`~agentpref.prefer.judges.calibration.people_agreement` counts it.
    """

    voter: str | None
    answers: int
    ties: int
    seconds: float | None
    decided: int
    first: int
    chance: float
    agreed: Mapping[str, Mapping[str, Any]]


def annotators(connection: sqlite3.Connection, namespace: str) -> list[Annotator]:
    """What each person said in a namespace whose comparisons stand; the busiest first."""
    said = [row for row in standing_comparisons(connection, namespace) if row.source == "human"]
    asked = sorted({row.run_a for row in said})
    runs, _, _ = Store(connection).judged(namespace, asked)
    tags = {run.run_id: run.tag for run in runs}
    by_voter: dict[str | None, list[Comparison]] = defaultdict(list)
    for row in said:
        by_voter[row.user_id].append(row)
    found = [_annotator(voter, own, said, tags) for voter, own in by_voter.items()]
    return sorted(found, key=lambda one: (-one.answers, one.voter or ""))


def _annotator(
    voter: str | None,
    own: Sequence[Comparison],
    said: Sequence[Comparison],
    tags: Mapping[str, str],
) -> Annotator:
    times = sorted(row.created_at for row in own)
    gaps = [b - a for a, b in itertools.pairwise(times) if b - a <= PAUSE]
    decided = [row.winner for row in own if row.winner != "tie"]
    first = decided.count("a")
    pairs = {_unit(row) for row in own}
    shared = [row for row in said if _unit(row) in pairs]
    strata = ("all", *sorted({tags[row.run_a] for row in shared if row.run_a in tags}))
    return Annotator(
        voter,
        len(own),
        len(own) - len(decided),
        statistics.median(gaps) if gaps else None,
        len(decided),
        first,
        sign_test(first, len(decided) - first),
        {
            name: people_agreement(
                [_vote(row) for row in shared if name in ("all", tags.get(row.run_a))], alpha=False
            )
            for name in strata
        },
    )


def _unit(row: Comparison) -> tuple[str, str]:
    one, other = sorted((row.run_a, row.run_b))
    return one, other


def _vote(row: Comparison) -> tuple[tuple[str, str], str, str]:
    winner = row.winner if row.run_a <= row.run_b else row.swap().winner
    return _unit(row), row.user_id or "", winner
