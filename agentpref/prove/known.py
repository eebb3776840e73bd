"""What live is right about already, of the judgements that it has not learned.

It is asked tag by tag, by the same measure as the gate's. Lone thumbs of which there are no
opposite ones in their tag say nothing: a policy that moves all answers alike is right about all of
one kind. Nobody can tell whether live knows what they want, so that they never count as known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentpref.prove import evaluate
from agentpref.prove.signs import Signs

if TYPE_CHECKING:
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner


@dataclass(frozen=True, slots=True)
class Known:
    """What live is right about.

    ``nothing_to_gain`` is whether in no tag even a candidate that is right about all that can be
    told could show a gain worth having. Of ``prompts`` with judgements that tell it, live is right
    about ``right``. ``untold`` counts prompts with thumbs that tell nothing, where these are so
    many that there might be a gain.
    """

    nothing_to_gain: bool = False
    prompts: int = 0
    right: int = 0
    untold: int = 0

    @property
    def all(self) -> bool:
        """Whether nothing is left to learn of any judgement."""
        return self.nothing_to_gain and not self.untold


def known(
    learner: Learner,
    held_out: Sequence[EncodedExample],
    trained: Sequence[EncodedExample],
    *,
    risk: float,
) -> Known:
    """Ask live about new judgements.

    What is held out is asked about first: it is scored anyway, and says no in most cases.

    Args:
        learner: scores rows under live.
        held_out: rows that prove.
        trained: rows that train.
        risk: the probability of so little to gain, in a tag, were a gain worth having there.
    """
    tags: dict[str, tuple[list[EncodedExample], list[EncodedExample]]] = {}
    for row in (*held_out, *trained):
        tags.setdefault(row.example.tag, ([], []))[not row.example.held_out].append(row)
    found = list[Known]()
    for own in tags.values():
        found.append(_in_tag(learner, *own, risk))
        if not found[-1].nothing_to_gain:
            return Known()
    prompts, right, untold = (
        sum(getattr(one, name) for one in found) for name in ("prompts", "right", "untold")
    )
    return Known(prompts > 0, prompts, right, untold)


def _in_tag(
    learner: Learner, held_out: list[EncodedExample], trained: list[EncodedExample], risk: float
) -> Known:
    everything = [*held_out, *trained]
    prompts, silent = _told(everything), _silent(everything, risk)
    wrong = 0
    for rows in (held_out, everything) if prompts else ():
        wrong = Signs.of(evaluate.best_case(learner, rows)).better
        if _may_gain(prompts, wrong, risk):
            return Known()
    untold = silent if _may_gain(prompts + silent, wrong + silent, risk) else 0
    return Known(True, prompts, prompts - wrong, untold)


def _may_gain(prompts: int, wrong: int, risk: float) -> bool:
    return Signs(prompts, better=wrong).chance_if_worth_having() > risk


def _told(rows: Sequence[EncodedExample]) -> int:
    """How many prompts have judgements that tell whether live is right."""
    counted = evaluate.Scores(rows, (), ()).counted(range(len(rows)))
    return len({rows[number].example.prompt.id for number in counted})


def _silent(rows: Sequence[EncodedExample], risk: float) -> int:
    """How many more prompts have lone thumbs, of which too few have an opposite to tell."""
    lone = [row for row in rows if row.example.lone]
    if not _may_gain(_told(lone), 0, risk):
        return 0
    return len({row.example.prompt.id for row in rows}) - _told(rows)
