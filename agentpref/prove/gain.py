"""The check on new preferences: is the candidate better at what live has not learned?

A gain is proven by the sign test of ``signs.py``; or where new labels ask for something (fewer
words, say) that the candidate writes and live does not, and no more held-out prompts are ranked
worse than better: live may rank it rightly without ever writing it. While a gain is neither proven
nor refuted the evidence is open, and more judgements may settle it.

Where trained prompts are to give evidence too, there are two tests, and they share the error that
the look may make: half of it is for the held-out prompts alone, and half for both kinds together.
Where the held-out ones are proof enough, no further model is trained; and where little can be
learned from parts of the night, what these show does not drown them. For both kinds together to be
proof, more held-out prompts must be better than worse: only they were judged by the candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Bound, lower_bound
from agentpref.prove.evidence import Evidence
from agentpref.prove.results import CheckResult, dot
from agentpref.prove.signs import Signs, allowed, can_decide, prompts_needed
from agentpref.prove.written import Move, has_room, proven

NAME = "new preferences"
_ALONE = 0.5
"""The share of a look's error that is for the held-out prompts alone, if there are others."""

_WRITTEN = 0.05
"""The share of a look's error that is for what people ask for and the candidate writes."""

LIKELY = 0.2
"""The chance that one of all looks calls a gain likely that is none: at the first, 1 in 10."""

_KNOWN = 0.9
"""At this accuracy live says already what people want."""

_FEWEST_PROMPTS = 30
"""With fewer, the bootstrap covers less than its nominal confidence, and its bound is not shown."""

MOST_TAGS = 5
"""How many tags without a gain are named."""

_NOTHING = "no new held-out pair to judge by, nor a like and a dislike in one tag"
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


State = Literal["proven", "loss", "worthless", "open"]


@dataclass(frozen=True, slots=True)
class Gain:
    """What the evidence says of a gain.

    ``state`` is ``proven``; ``loss``, if that is proven; ``worthless``, if a gain worth having is
    refuted; else ``open``. ``held_out`` and ``cross_fitted`` count the prompts judged by the
    candidate and by models on the way to it; ``chance`` is the probability of so many better ones
    by chance, and must be at most ``needed``, or ``likely`` for a likely gain. ``look`` is the
    number of looks so far, with this one if it ``counts``: one that could not have proved a gain
    does not. ``comparisons_needed`` estimates how many new comparisons would, if the shares so far
    are the true ones; ``None`` if none would. ``written`` is what proves a gain by what is written.
    """

    state: State
    held_out: Signs
    cross_fitted: Signs
    chance: float
    needed: float
    look: int
    counts: bool
    likely: float = 0.0
    comparisons_needed: int | None = None
    written: tuple[Move, ...] = ()

    @property
    def refuted(self) -> bool:
        """Whether more evidence is not worth waiting for."""
        return self.state in ("loss", "worthless")

    @property
    def is_likely(self) -> bool:
        """Whether a gain is likely at least."""
        return self.chance <= self.likely and self.held_out.better > self.held_out.worse

    def to_mapping(self) -> dict[str, float | None]:
        """The numbers for reports."""
        found = {
            "prompts": self.held_out.prompts,
            "better": self.held_out.better,
            "worse": self.held_out.worse,
            "cross_fitted": self.cross_fitted.prompts,
            "cross_fitted_better": self.cross_fitted.better,
            "cross_fitted_worse": self.cross_fitted.worse,
            "chance": self.chance,
            "needed": self.needed,
            "look": self.look,
            "look_counts": self.counts,
            "likely": self.is_likely,
            "written": len(self.written),
        }
        return {**found, "comparisons_needed": self.comparisons_needed}


def weigh(evidence: Evidence, s: GateSettings) -> Gain:
    """Decide on the gain."""
    risk = 1 - s.confidence
    held_out, crossed = Signs.of(evidence.new), Signs.of(evidence.cross_fitted)
    look = evidence.looks + 1
    may_err = allowed(look, risk, evidence.choices)
    error, by_writing = (1 - _WRITTEN) * may_err, _WRITTEN * may_err
    alone = error * (_ALONE if evidence.to_cross_fit else 1)
    together = error - alone
    counts = can_decide(held_out.prompts, alone) or (
        evidence.to_cross_fit > 0 and can_decide(held_out.prompts + evidence.to_cross_fit, together)
    )
    may_write = counts and held_out.better >= held_out.worse
    writes = proven(evidence, by_writing, risk) if may_write else ()
    state: State = "open"
    signs, needed = held_out, alone
    if held_out.chance_of_gain() <= alone or writes:
        state = "proven"
    elif held_out.chance_of_loss() <= risk:
        state = "loss"
    elif held_out.chance_if_worth_having() <= risk:
        state = "worthless"
    elif crossed.prompts:
        signs, needed = held_out + crossed, together
        if signs.chance_of_gain() <= together and held_out.better > held_out.worse:
            state = "proven"
    more = prompts_needed(signs, (1 - _WRITTEN) * allowed(look + 1, risk))
    return Gain(
        state,
        held_out,
        crossed,
        signs.chance_of_gain(),
        needed,
        look if counts else evidence.looks,
        counts,
        allowed(look, LIKELY, evidence.choices),
        None if more is None else max(1, round(evidence.comparisons * more / signs.prompts)),
        writes,
    )


def gain(evidence: Evidence, found: Gain, s: GateSettings, seed: int) -> CheckResult:
    """The check that a gain is proven; what was found is in words, and what would settle it."""
    passed = found.state == "proven"
    if not len(evidence.new):
        return CheckResult(NAME, False, None, found.needed, _NOTHING)
    bound = lower_bound(evidence.new, confidence=s.confidence, seed=seed)
    message = f"{_size(bound)}; {_signs(found)}"
    if found.written:
        surest = odds(min(move.asked.chance for move in found.written))
        listed = ", ".join(map(str, found.written[:2]))
        message += f"; asked for ({surest} by chance) and written: {listed}"
    if not passed:
        message += f"; {_cure(evidence, found)}"
    return CheckResult(NAME, passed, found.chance, found.needed, message)


def _size(bound: Bound) -> str:
    """Write the size of a change as ``.52 -> .91 on 214 held-out pairs, +.39, at least +.33``."""
    known = bound.error is not None and bound.prompts >= _FEWEST_PROMPTS
    least = f", at least {dot(bound.lower, signed=True)}" if known else ""
    return (
        f"{dot(bound.live)} -> {dot(bound.candidate)} on {bound.pairs} held-out pairs, "
        f"{dot(bound.change, signed=True)}{least}"
    )


def _signs(found: Gain) -> str:
    """Write the test as ``15 of 20 prompts better, 3 worse, 1 in 265 by chance; …``."""
    held_out, crossed = found.held_out, found.cross_fitted
    text = f"{held_out.better} of {held_out.prompts} prompts better, {held_out.worse} worse"
    if not held_out.better + held_out.worse + crossed.prompts:
        return f"none of {held_out.prompts} prompts better or worse"
    if crossed.prompts:
        text += (
            f"; of {crossed.prompts} trained ones, each judged before it was trained, "
            f"{crossed.better} better, {crossed.worse} worse"
        )
    text += f": {odds(found.chance)} by chance, {odds(found.needed)} or rarer proves a gain"
    look = found.look if found.counts else found.look + 1
    name = _ORDINALS[look - 1] if look <= len(_ORDINALS) else f"{look}th"
    return f"{text} ({name} look)"


def _cure(evidence: Evidence, found: Gain) -> str:
    """Say what would settle what is not proven."""
    if evidence.cut_short:
        return "max_minutes stopped the training: raise it"
    if found.state == "loss":
        return "no gain but a loss: check the labels"
    live = sum(evidence.new.live) / len(evidence.new)
    if evidence.known or (live >= _KNOWN and found.state == "worthless"):
        if has_room(evidence):
            return "live is right about nearly all of them, and does not write so: train longer"
        if evidence.untold:
            return (
                f"live is right about nearly all of them already; {evidence.untold} more have "
                "thumbs of one kind, which prove nothing: collect the other kind, too"
            )
        return "live is right about nearly all of them already: there is nothing to gain"
    if found.state == "worthless":
        return "no gain worth having: check the labels, or train longer"
    if not found.counts:
        return "too few to prove anything, so this look does not count: collect more comparisons"
    if found.comparisons_needed is None:
        return "no more better than worse: check the labels, or collect more comparisons"
    more = max(1, found.comparisons_needed - evidence.comparisons)
    return f"if this change is real, about {more:,} more comparisons would settle it"


def odds(chance: float) -> str:
    """Write a probability as ``1 in 48``.

    >>> odds(0.0207), odds(1e-9)
    ('1 in 48', '1 in over a million')
    """
    if chance < 1e-6:
        return "1 in over a million"
    rarity = 1 / chance
    return f"1 in {rarity:,.0f}" if rarity >= 10 else f"1 in {rarity:.2g}"


def without_gain(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Says which tags are ranked no better, where others are; of new held-out examples, by tag."""
    idle = [
        f"{tag} ({dot(one['before'])} -> {dot(one['after'])} on {one['pairs']:.0f} pairs)"
        for tag, one in accuracy.items()
        if one["after"] <= one["before"] < 1
    ]
    if not idle or len(idle) == len(accuracy):
        return []
    named, more = ", ".join(idle[:MOST_TAGS]), len(idle) - MOST_TAGS
    return [
        f"no gain of its own on new held-out pairs: {named}{f' and {more} more' * (more > 0)}; "
        "trained with the others, since the gate proves a gain on all that is new together"
    ]
