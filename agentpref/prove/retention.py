"""The checks on what live has learned: is anything of it lost?

Retention is a test of non-inferiority per stratum: the lower bound of the change must lie above
−margin. A fixed margin of .03 would refuse nearly every update of a small stratum, since a harmless
update flips some pairs in either direction. So the margin of a stratum is

    max(retention_margin, (z_confidence + z_γ) · √(flips / n) + 1/n),  γ = (1 − confidence) / K

for n prompts and K retention checks, where ``flips`` is the share that a harmless update turns
over: twice the share that became better, and ``flip_rate`` at least. An update that changes nothing
on average turns as many for the worse as for the better, however many these are; a lean towards
"yes" that swings turns nearly all. It passes with probability 1 − γ (1/n, as a change moves in
steps of one prompt), and by Bonferroni is refused with probability 1 − confidence at most, for any
number of strata (simulated with flips of .1: .01 to .05 for strata of 10 to 500 prompts; .14 for
many of 5). How many became better says only roughly how many turn: of harmless updates that turn .3
to .5 of 2 to 5 strata of 20 to 200 prompts, .06 to .29 are refused (.4 to .9 if ``flip_rate`` stood
for all). What became worse widens no margin, so a candidate that only loses is held to
``flip_rate``. The price is that small strata detect only large losses (K = 4 and flips of .1: .19
at 50 prompts, .09 at 200, .04 at 1,000). So one more check covers all strata together, for damage
too small to detect in any one: a loss of .05 in each of three strata of 200 is refused 93 times in
100.

Where live is right about no more prompts than a coin may be, there is nothing to retain. There only
a proven loss of more than ``retention_margin`` refuses: that so many more became worse than better
has probability γ at most by chance (the exact sign test of the prompts that changed). All strata
together are judged by whichever rule fits them.

Where a judge's verdicts trained, what people said is the independent check of them: of all held-out
prompts on which people decided, new ones too, a proven loss refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Paired, lower_bound
from agentpref.prove.gain import odds
from agentpref.prove.metrics import accuracy
from agentpref.prove.results import CheckResult, check, cure_of, describe, dot
from agentpref.prove.signs import Signs
from agentpref.types import Stratum

PEOPLE = "what people said"
"""The name of the check of what people decided, where a judge's verdicts trained."""

_LEARNED = 0.2
"""How often a coin may be as right as live about what live has learned: no proof of a lead is asked
for, lest a small stratum go without protection, but that a lead is likely."""


def retention(
    evidence: Mapping[Stratum, Paired], s: GateSettings, seed: int
) -> Iterator[CheckResult]:
    """One check per group of what live has learned, and one over all groups together."""
    groups = {str(stratum): paired for stratum, paired in evidence.items()}
    if len(groups) > 1:
        groups["all strata together"] = Paired.pooled(groups.values())
    for name, paired in groups.items():
        name = f"retention of {name}"
        if _lead(paired).chance_of_gain() <= _LEARNED:
            yield _kept(name, paired, len(groups), s, seed)
        else:
            yield _not_worse(name, paired, len(groups), s)


def people(paired: Paired | None, s: GateSettings) -> Iterator[CheckResult]:
    """The check of what people decided, where a judge's verdicts trained."""
    if paired is None:
        return
    signs, level = Signs.of(paired), 1 - s.confidence
    chance = signs.chance_of_loss()
    message = (
        f"{dot(accuracy(paired.live))} -> {dot(accuracy(paired.candidate))} on {signs.prompts} "
        f"held-out prompts; {signs.better} became better, {signs.worse} worse: {odds(chance)} by "
        f"chance, {odds(level)} or rarer proves a loss"
    )
    cure = "; the judge's verdicts pull away from people's: calibrate it again, or mend its rubric"
    yield check(PEOPLE, chance > level, chance, level, message, cure)


def _kept(name: str, paired: Paired, checks: int, s: GateSettings, seed: int) -> CheckResult:
    """The check of a group that live is right about: is it still within the margin?"""
    bound = lower_bound(paired, confidence=s.confidence, seed=seed)
    better = Signs.of(paired).better
    margin = retention_margin(bound.prompts, checks, s, better=better)
    passed = bound.lower > -margin
    message = describe(bound, -margin, passed)
    if margin > s.retention_margin:
        many = 2 * better > s.flip_rate * bound.prompts
        turned = f", of which {better} became better," if many else ""
        message += (
            f" (margin widened from {dot(s.retention_margin)}: on {bound.prompts} prompts"
            f"{turned} a smaller loss could not be told from chance)"
        )
    loss = "a loss beyond the margin: raise replay.minimum or kl.weight, or refit from base"
    return check(
        name, passed, bound.lower, -margin, message, cure_of(bound, -s.retention_margin, s, loss)
    )


def _not_worse(name: str, paired: Paired, checks: int, s: GateSettings) -> CheckResult:
    """The check of a group that live is no more right about than a coin: is a loss proven?"""
    signs, lead, level = Signs.of(paired), _lead(paired), _level(checks, s)
    chance, lost = signs.chance_of_loss(), accuracy(paired.live) - accuracy(paired.candidate)
    message = (
        f"live is right about {lead.better} of {lead.prompts} held-out prompts, which a coin may "
        f"be: nothing to retain; {signs.better} became better, {signs.worse} worse: "
        f"{odds(chance)} by chance, {odds(level)} or rarer proves a loss"
    )
    cure = "; a loss: raise replay.minimum or kl.weight, or refit from base"
    passed = chance > level or lost <= s.retention_margin
    return check(name, passed, chance, level, message, cure)


def _lead(paired: Paired) -> Signs:
    """How many prompts live is right about, and how many it is wrong about."""
    return Signs.of(Paired((0.5,) * len(paired), paired.live, paired.prompts))


def _level(checks: int, settings: GateSettings) -> float:
    return (1 - settings.confidence) / checks


def retention_margin(
    prompts: int, checks: int, settings: GateSettings, *, better: int = 0
) -> float:
    """The loss that each of ``checks`` retention checks allows on a number of prompts.

    ``better`` is how many of them became better. The docstring of this module gives the formula
    and its reason.
    """
    normal = NormalDist()
    z = normal.inv_cdf(settings.confidence) + normal.inv_cdf(1 - _level(checks, settings))
    flips = max(settings.flip_rate, min(1.0, 2 * better / prompts))
    noise = z * math.sqrt(flips / prompts) + 1 / prompts
    return max(settings.retention_margin, noise)
