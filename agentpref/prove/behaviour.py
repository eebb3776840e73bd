"""The checks on what a candidate writes, and on how far it is from the base."""

from __future__ import annotations

import math
from collections.abc import Iterator

from agentpref.config import GateSettings
from agentpref.prove.evidence import Evidence
from agentpref.prove.metrics import length_ratio
from agentpref.prove.results import CheckResult, check, dot


def distance(kl: float, s: GateSettings) -> CheckResult:
    """The distance from the base, in nats per token, against its budget."""
    passed, cure = kl <= s.kl_budget, ": refit from base on the whole buffer"
    message = (
        f"{dot(kl)} nats per token from the base, {'within' if passed else 'over'} the budget "
        f"of {dot(s.kl_budget)}"
    )
    return check("KL budget", passed, kl, s.kl_budget, message, cure)


def generation(evidence: Evidence, s: GateSettings) -> Iterator[CheckResult]:
    """Checks on what the candidate writes, none of which needs many probes."""
    live, candidate = evidence.live, evidence.candidate
    message = "all log-probabilities are finite"
    if not candidate.finite:
        message = "NaN or infinite log-probabilities: lower the learning rate"
    yield CheckResult("finite", candidate.finite, None, None, message)

    # Distinct-2 may fall where the pairs ask for it: a set phrase that users prefer ("Certainly!")
    # lowers the diversity of good answers too.
    value = candidate.distinct_2
    floor = s.distinct_floor * min(1.0, evidence.asked_distinct) * live.distinct_2
    message = f"{dot(live.distinct_2)} -> {dot(value)}, at least {dot(floor)}"
    cure = ": answers repeat themselves; train less, or raise kl.weight"
    yield check("distinct-2", value >= floor, value, floor, message, cure)

    # The end of the range on the asked side is multiplied by the pairs' own ratio, so that an
    # answer of the asked length has the same room for error as one of live's length otherwise.
    asked = evidence.asked_length
    low, high = s.length_ratio[0] * min(1.0, asked), s.length_ratio[1] * max(1.0, asked)
    ratio = length_ratio(candidate.mean_length, live.mean_length)
    passed = low <= ratio <= high
    message = (
        f"{live.mean_length:.1f} -> {candidate.mean_length:.1f} tokens, × {dot(ratio)}, "
        f"{'within' if passed else 'outside'} {dot(low)} to {dot(high)}"
    )
    if (low, high) != s.length_ratio:
        message += f" (stretched: chosen answers are × {dot(asked)} as long as rejected ones)"
    cure = ": balance the lengths of the pairs, or lower the learning rate"
    yield check("length ratio", passed, ratio, low if ratio < low else high, message, cure)

    # Counts may exceed live's by their noise, two standard deviations (2√live): if live has none,
    # one is too many.
    for name in ("empty", "endless"):
        before, after = getattr(live, name), getattr(candidate, name)
        allowed = before + int(2 * math.sqrt(before))
        message = f"{after} on the probes, live {before}"
        cure = f", at most {allowed}: train less, or raise kl.weight"
        yield check(f"{name} generations", after <= allowed, after, allowed, message, cure)

    old, new, name = live.tool_parse, candidate.tool_parse, "tool-call JSON"
    if old is None or new is None:
        silent = "live" if old is None else "the candidate"
        message = f"nothing to compare: {silent} wrote no tool call on the probes"
        yield CheckResult(name, True, new, old, message)
    else:
        message = f"{dot(old)} -> {dot(new)} of tool calls parse"
        cure = ": raise loss.nll, or replay more pairs with tool calls"
        yield check(name, new >= old, new, old, message, cure)
