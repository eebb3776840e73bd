"""The check on new preferences: is the candidate better at what live has not learned?"""

from __future__ import annotations

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Paired, lower_bound
from agentpref.prove.evidence import Evidence
from agentpref.prove.results import CheckResult, check, cure_of, describe

FEWEST_PROMPTS = 30  # with fewer, the bootstrap covers less than its nominal confidence


def enough(new: Paired, s: GateSettings) -> CheckResult:
    """Enough pairs, and enough prompts among them for the bootstrap to be trusted."""
    name, pairs, prompts = "enough evidence", len(new), len(set(new.prompts))
    found = f"{pairs} new held-out pairs"
    if pairs < s.min_pairs:
        cure = f" of at least {s.min_pairs}: {s.min_pairs - pairs} more would allow a promotion"
        return check(name, False, pairs, s.min_pairs, found, cure)
    fewest = min(FEWEST_PROMPTS, s.min_pairs)
    cure = f" of at least {fewest}: ask about {fewest - prompts} other prompts"
    return check(name, prompts >= fewest, prompts, fewest, f"{found} on {prompts} prompts", cure)


def gain(evidence: Evidence, s: GateSettings, seed: int) -> CheckResult:
    """A proven gain: the lower bound of the change in accuracy is above 0."""
    name, new = "new preferences", evidence.new
    if not len(new):
        return CheckResult(name, False, None, 0.0, "no new held-out pair to judge by")
    bound = lower_bound(new, confidence=s.confidence, seed=seed)
    passed = bound.lower > 0
    no_gain = "no gain to prove: check the labels, or train longer"
    if evidence.cut_short:
        no_gain = "no gain to prove: max_minutes stopped the training; raise it"
    cure = cure_of(bound, 0.0, s, no_gain)
    return check(name, passed, bound.lower, 0.0, describe(bound, 0.0, passed), cure)
