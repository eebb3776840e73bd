"""How right a reward model is about pairs that it has not seen, and what it has a taste for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.prefer.judges.calibration import Estimate, share
from agentpref.prove.signs import sign_test

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
_BINS = 10


class Told(NamedTuple):
    """A held-out pair: its prompt and tag, and how much longer its better answer is, in log."""

    prompt: str
    tag: str
    longer: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How right a reward model is about ``pairs`` held-out pairs.

    ``accuracy`` is the share in which the better answer has the higher reward; ``longer`` and
    ``shorter`` are the same where that is the longer or the shorter one. ``calibration_error``
    (expected calibration error, ten bins) and ``brier`` compare the probabilities with what people
    said. ``strata`` have pairs and accuracy by tag. A tie counts as wrong.
    """

    pairs: int
    right: int
    accuracy: Estimate | None = None
    longer: Estimate | None = None
    shorter: Estimate | None = None
    calibration_error: float | None = None
    brier: float | None = None
    strata: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether it is shown to be right more often than a coin (exact sign test)."""
        return sign_test(self.right, self.pairs - self.right, one_sided=True) <= 1 - CONFIDENCE

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = asdict(self) | {"shown": self.shown}
        strata = {tag: {"pairs": n, "accuracy": a} for tag, (n, a) in self.strata.items()}
        plain = {k: v._asdict() if isinstance(v, Estimate) else v for k, v in found.items()}
        return plain | {"strata": strata}


def quality(margins: NDArray[Any], told: Sequence[Told]) -> Quality:
    """Measure margins r(better) − r(worse) in log-odds, ``[n]``, of held-out pairs.

    Raises:
        MissingDependency: scipy is not installed.
    """
    import numpy as np

    if not told:
        return Quality(0, 0)
    right = margins > 0
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    error = sum(abs(float((sure - right)[bins == one].sum())) for one in set(bins))
    longer = np.array([one.longer for one in told])
    tags = np.array([one.tag for one in told])

    def part(chosen: NDArray[Any]) -> Estimate | None:
        yes = int(right[chosen].sum())
        return share(yes, int(chosen.sum()) - yes, CONFIDENCE)

    return Quality(
        len(told),
        int(right.sum()),
        part(np.ones(len(told), dtype=bool)),
        part(longer > 0),
        part(longer < 0),
        error / len(told),
        float(np.mean((1 / (1 + np.exp(-margins)) - 1) ** 2)),
        {
            str(tag): (int((tags == tag).sum()), float(right[tags == tag].mean()))
            for tag in sorted(set(tags))
        },
    )
