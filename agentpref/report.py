"""What an update did and why, as plain values: what is returned, stored and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["promoted", "refused", "insufficient", "nothing_new"]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did and why. Accuracies are held-out, per tag, before and after.

    ``counts`` are of pairs, and under the same name with ``_thumbs`` of lone thumbs.
    ``evaluated_thumbs`` are the new held-out thumbs that count as evidence: as many likes as
    dislikes. Every row that was not used, or not as it was logged, is counted by reason:
    ``left_out`` are neither trained nor evaluated, ``shortened`` lost the oldest turns of their
    prompt, ``retokenized`` had logged tokens that could not be used. ``config`` holds the settings,
    and ``notes`` anything else worth knowing, such as why an interrupted training started over.
    """

    update_id: str
    namespace: str
    model: str
    created_at: float
    verdict: Verdict
    parent: str | None
    revision: str | None = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    shortened: dict[str, int] = field(default_factory=dict)
    retokenized: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """The messages of the checks that failed."""
        return [f"{c['name']}: {c['message']}" for c in self.checks if not c["passed"]]

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain values: what ``--json`` prints and the database stores."""
        return asdict(self)
