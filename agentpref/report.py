"""What an update did and why, as plain values: what is returned, kept and shown.

Knows nothing of how any of it came about.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["promoted", "refused", "insufficient", "nothing_new"]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did and why. Accuracies are held-out, per tag, before and after.

    ``counts`` are of pairs, and under the same name with ``_thumbs`` of lone thumbs.
    ``examined_thumbs`` are the new held-out thumbs that count as evidence: as many likes as
    dislikes. Every row that was not used, or not as it was logged, is counted by reason:
    ``left_out`` those that train and prove nothing, ``shortened`` those whose prompt lost its
    oldest turns, ``retokenised`` those whose logged tokens could not be used. ``notes`` are what
    else is worth knowing, in words, such as why an interrupted training was not gone on with.
    """

    update_id: str
    namespace: str
    model: str
    created_at: float
    verdict: Outcome
    parent: str | None
    revision: str | None = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    shortened: dict[str, int] = field(default_factory=dict)
    retokenised: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """Words of the checks that did not hold."""
        return [f"{check['name']}: {check['words']}" for check in self.checks if not check["holds"]]

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain values: what ``--json`` prints and the database keeps."""
        return asdict(self)
