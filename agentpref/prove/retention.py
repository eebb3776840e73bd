"""The checks on what live has learned: is anything of it lost?

Retention is a test of non-inferiority per stratum: the lower bound of the change must lie above
−margin. A fixed margin of .03 would refuse nearly every update of a small stratum, since a harmless
update flips some pairs in either direction. So the margin of a stratum is

    max(retention_margin, (z_confidence + z_γ) · √(flip_rate / n) + 1/n),  γ = (1 − confidence) / K

for n prompts and K retention checks. An update that changes nothing on average, but flips
``flip_rate`` of the prompts, passes it with probability 1 − γ (1/n, as a change moves in steps of
one prompt). By Bonferroni such an update is refused with probability 1 − confidence at most, for
any number of strata (simulated: .01 to .05 for strata of 10 to 500 prompts; .14 for many of 5).
The price is that small strata detect only large losses (K = 4: .19 at 50 prompts, .09 at 200, .04
at 1,000). So one more check covers all strata together, for damage too small to detect in any one:
a loss of .05 in each of three strata of 200 is refused 93 times in 100. The margin depends on
numbers of prompts and settings, never on what the candidate did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Paired, lower_bound
from agentpref.prove.results import CheckResult, check, cure_of, describe, dot
from agentpref.types import Stratum


def retention(
    evidence: Mapping[Stratum, Paired], s: GateSettings, seed: int
) -> Iterator[CheckResult]:
    """One check per group of what live has learned, and one over all groups together."""
    groups = {str(stratum): paired for stratum, paired in evidence.items()}
    if len(groups) > 1:
        groups["all strata together"] = Paired.pooled(groups.values())
    for name, paired in groups.items():
        bound = lower_bound(paired, confidence=s.confidence, seed=seed)
        margin = retention_margin(bound.prompts, len(groups), s)
        passed = bound.lower > -margin
        message = describe(bound, -margin, passed)
        if margin > s.retention_margin:
            message += (
                f" (margin widened from {dot(s.retention_margin)}: on {bound.prompts} prompts a "
                "smaller loss could not be told from chance)"
            )
        loss = "a loss beyond the margin: raise replay.minimum or kl.weight, or refit from base"
        cure = cure_of(bound, -s.retention_margin, s, loss)
        yield check(f"retention of {name}", passed, bound.lower, -margin, message, cure)


def retention_margin(prompts: int, checks: int, settings: GateSettings) -> float:
    """The loss that each of ``checks`` retention checks allows on a number of prompts.

    The docstring of this module gives the formula and its reason.
    """
    normal = NormalDist()
    risk = (1 - settings.confidence) / checks
    z = normal.inv_cdf(settings.confidence) + normal.inv_cdf(1 - risk)
    noise = z * math.sqrt(settings.flip_rate / prompts) + 1 / prompts
    return max(settings.retention_margin, noise)
