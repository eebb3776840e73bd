"""Out of distribution: how right live and candidate are in the tags that nobody ever trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentpref.prove.metrics import accuracy
from agentpref.prove.results import dot
from agentpref.prove.signs import Signs

if TYPE_CHECKING:
    from agentpref.prove.evaluate import Scores

MOST = 400
"""The newest examples of a tag are asked, so many at most."""

SURE = 0.05


@dataclass(frozen=True, slots=True)
class Exam:
    """Accuracy of live (``before``) and candidate (``after``) in a tag that never trains.

    ``better`` and ``worse`` count prompts, and ``p`` is how likely no fewer would be worse by
    chance, by a one-sided sign test.
    """

    tag: str
    prompts: int
    before: float
    after: float
    better: int
    worse: int
    p: float

    @property
    def note(self) -> str:
        """What a report says of it."""
        loss = f"; a loss (p {self.p:.2g})" if self.p <= SURE else ""
        return (
            f"held-out tag {self.tag!r}: {dot(self.before)} -> {dot(self.after)} on "
            f"{self.prompts} prompts that no update trains, {self.better} better, "
            f"{self.worse} worse{loss}"
        )


def by_tag(scores: Scores) -> list[Exam]:
    """The exam of each tag with any evidence, in the order of their names."""
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(scores.rows):
        numbers.setdefault(row.example.tag, []).append(number)
    found = []
    for tag, own in sorted(numbers.items()):
        paired = scores.paired(own, matched=True)
        if len(paired):
            signs = Signs.of(paired)
            found.append(
                Exam(
                    tag,
                    signs.prompts,
                    accuracy(paired.live),
                    accuracy(paired.candidate),
                    signs.better,
                    signs.worse,
                    signs.chance_of_loss(),
                )
            )
    return found
