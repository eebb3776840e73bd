"""The gate: decides whether a candidate may serve in place of live.

It takes evidence and returns a verdict with its reasons in words and numbers; every check must
pass. It is a pure function: scoring and generating happen in ``evaluate.py``.

Retention is a test of non-inferiority per stratum: the lower bound of the change must lie above
−margin. A fixed margin of .03 would refuse nearly every update of a small stratum, since a harmless
update turns over some pairs in either direction. So the margin of a stratum is

    max(retention_margin, (z_confidence + z_γ) · √(flip_rate / n) + 1/n),  γ = (1 − confidence) / K

for n prompts and K retention checks: what an update that changes nothing on average, but turns over
``flip_rate`` of the prompts, passes with probability 1 − γ (1/n, as a change moves in steps of one
prompt). By Bonferroni such an update is refused with probability 1 − confidence at most, however
many strata there are (simulated: .01 to .05 for strata of 10 to 500 prompts; .14 for many of 5).
The price is that small strata detect only large losses (K = 4: .19 at 50 prompts, .09 at 200, .04
at 1,000). So one more check covers all strata together, for damage too small to detect in any one:
a loss of .05 in each of three strata of 200 is refused 93 times in 100. The margin depends on
numbers of prompts and settings, never on what the candidate did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Bound, Paired, lower_bound, pairs_needed
from agentpref.prove.metrics import length_ratio
from agentpref.types import Stratum, Verdict

FEWEST_PROMPTS = 30  # below this the bootstrap covers less than it says


@dataclass(frozen=True, slots=True)
class Generations:
    """Sanity of one policy's greedy answers to the probe prompts.

    ``mean_length`` is in tokens; ``empty`` and ``endless`` count answers with no text and answers
    cut off at the token limit; ``tool_parse`` is the share of the tool calls written that parse as
    JSON, ``None`` where none was written; ``finite`` says that every log-probability was.
    """

    distinct_2: float
    mean_length: float
    empty: int = 0
    endless: int = 0
    tool_parse: float | None = None
    finite: bool = True


@dataclass(frozen=True, slots=True)
class UserCheckResult:
    """The result of one of the user's own checks."""

    name: str
    passed: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a verdict rests on.

    ``new`` holds the scores of held-out examples that live has not learned. ``retention`` holds
    those of the groups of :func:`~agentpref.prefer.strata.coarsen` that it has learned; there is
    none while the base serves, which has nothing to forget. ``kl`` is KL(π_0‖π_θ) in nats per
    token. ``live`` and ``candidate`` answered the same probes. ``asked_length`` and
    ``asked_distinct`` are length ratio and ratio of distinct-2 between the chosen and the rejected
    answers of the new examples: what they ask for.
    """

    new: Paired
    kl: float
    live: Generations
    candidate: Generations
    retention: Mapping[Stratum, Paired] = field(default_factory=dict)
    asked_length: float = 1.0
    asked_distinct: float = 1.0
    user_checks: tuple[UserCheckResult, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One condition: the value found, the bound it is compared with, and both in words."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    message: str


@dataclass(frozen=True, slots=True)
class GateResult:
    """The verdict on a candidate, and every check behind it."""

    verdict: Verdict
    checks: tuple[CheckResult, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The messages of the checks that failed; empty where the candidate is promoted."""
        return tuple(f"{check.name}: {check.message}" for check in self.checks if not check.passed)

    def to_mapping(self) -> dict[str, Any]:
        """The result as plain values for JSON; numbers that are not finite become ``None``."""
        checks = [{k: _plain(v) for k, v in asdict(check).items()} for check in self.checks]
        return {"verdict": self.verdict, "checks": checks}


def judge(evidence: Evidence, settings: GateSettings | None = None, *, seed: int = 0) -> GateResult:
    """Decide on a candidate. The same evidence, settings and seed give the same verdict.

    ``refused`` if anything but the amount of new evidence speaks against it; then
    ``insufficient`` if there is too little new evidence; then ``promoted``. With too little
    evidence, failing to gain is no fault yet, but a proven loss is.

    Raises:
        UpdateError: for a retention stratum without pairs.
    """
    settings = settings or GateSettings()
    enough = _enough(evidence.new, settings)
    gain = _gain(evidence.new, settings, seed)
    guards = (
        *_retention(evidence.retention, settings, seed),
        _kl(evidence.kl, settings),
        *_generation(evidence, settings),
        *(
            CheckResult(f"check {c.name}", c.passed, None, None, c.message)
            for c in evidence.user_checks
        ),
    )
    fault = not gain.passed if enough.passed else _is_worse(evidence.new, settings, seed)
    refused = fault or not all(check.passed for check in guards)
    outcome: Verdict = "refused" if refused else "promoted" if enough.passed else "insufficient"
    return GateResult(outcome, (enough, gain, *guards))


def retention_margin(prompts: int, checks: int, settings: GateSettings) -> float:
    """Return the loss that one of ``checks`` retention checks allows on a number of prompts.

    The formula and its reason stand at the top of this module.
    """
    normal = NormalDist()
    risk = (1 - settings.confidence) / checks
    z = normal.inv_cdf(settings.confidence) + normal.inv_cdf(1 - risk)
    noise = z * math.sqrt(settings.flip_rate / prompts) + 1 / prompts
    return max(settings.retention_margin, noise)


def _enough(new: Paired, settings: GateSettings) -> CheckResult:
    """Enough pairs, and enough prompts among them for the bootstrap to be trusted."""
    pairs, prompts = len(new), len(set(new.prompts))
    fewest = min(FEWEST_PROMPTS, settings.min_pairs)
    if pairs < settings.min_pairs:
        message = f"{pairs} new held-out pairs of at least {settings.min_pairs}: "
        message += f"{settings.min_pairs - pairs} more would allow a promotion"
        return CheckResult("enough evidence", False, pairs, settings.min_pairs, message)
    message = f"{pairs} new held-out pairs on {prompts} prompts"
    if prompts < fewest:
        message += f" of at least {fewest}: ask about {fewest - prompts} other prompts"
    return CheckResult("enough evidence", prompts >= fewest, prompts, fewest, message)


def _gain(new: Paired, settings: GateSettings, seed: int) -> CheckResult:
    if not len(new):
        return CheckResult("new preferences", False, None, 0.0, "no new held-out pair to judge by")
    bound = lower_bound(new, confidence=settings.confidence, seed=seed)
    passed = bound.lower > 0
    message = _describe(bound, 0.0, passed)
    if not passed:
        message += _cure(
            bound, 0.0, settings, "no gain to prove: check the labels, or train longer"
        )
    return CheckResult("new preferences", passed, bound.lower, 0.0, message)


def _is_worse(new: Paired, settings: GateSettings, seed: int) -> bool:
    """Whether live is proven better than the candidate on the new pairs."""
    reverse = new.swap()
    return (
        len(new) > 0 and lower_bound(reverse, confidence=settings.confidence, seed=seed).lower > 0
    )


def _retention(
    retention: Mapping[Stratum, Paired], settings: GateSettings, seed: int
) -> Iterator[CheckResult]:
    groups = {str(stratum): paired for stratum, paired in retention.items()}
    if len(groups) > 1:
        groups["all strata together"] = Paired.pooled(groups.values())
    for name, paired in groups.items():
        bound = lower_bound(paired, confidence=settings.confidence, seed=seed)
        margin = retention_margin(bound.prompts, len(groups), settings)
        yield _retained(f"retention of {name}", bound, margin, settings)


def _retained(name: str, bound: Bound, margin: float, settings: GateSettings) -> CheckResult:
    passed = bound.lower > -margin
    message = _describe(bound, -margin, passed)
    if margin > settings.retention_margin:
        message += f" (margin widened from {_dot(settings.retention_margin)}: on {bound.prompts} "
        message += "prompts a smaller loss could not be told from chance)"
    if not passed:
        loss = "a loss beyond the margin: raise replay.minimum or kl.weight, or refit from base"
        message += _cure(bound, -settings.retention_margin, settings, loss)
    return CheckResult(name, passed, bound.lower, -margin, message)


def _describe(bound: Bound, floor: float, passed: bool) -> str:
    """Write a change as ``.52 -> .91 on 214 held-out pairs, +.39, lower bound +.33 > 0``."""
    against = "0" if floor == 0 else _dot(floor, signed=True)
    relation = (
        f"> {against}" if passed else f"not > {against}, short by {_dot(floor - bound.lower)}"
    )
    note = f" ({bound.message})" if bound.message else ""
    return (
        f"{_dot(bound.live)} -> {_dot(bound.candidate)} on {bound.pairs} held-out pairs, "
        f"{_dot(bound.change, signed=True)}, lower bound {_dot(bound.lower, signed=True)} "
        f"{relation}{note}"
    )


def _cure(bound: Bound, floor: float, settings: GateSettings, otherwise: str) -> str:
    """Say what would settle a bound that fell short: more pairs, if the change is real, or not."""
    needed = pairs_needed(bound, floor, confidence=settings.confidence)
    if needed is None:
        return f"; {otherwise}"
    return f"; if this change is real, about {needed} pairs would settle it"


def _kl(kl: float, settings: GateSettings) -> CheckResult:
    passed = kl <= settings.kl_budget
    message = (
        f"{_dot(kl)} nats per token from the base, {'within' if passed else 'over'} the budget "
    )
    message += f"of {_dot(settings.kl_budget)}"
    if not passed:
        message += ": refit from base on the whole buffer"
    return CheckResult("KL budget", passed, kl, settings.kl_budget, message)


def _generation(evidence: Evidence, settings: GateSettings) -> Iterator[CheckResult]:
    """Checks on what the candidate writes, none of which needs many probes."""
    live, candidate = evidence.live, evidence.candidate
    yield _finite(candidate.finite)
    yield _distinct(live, candidate, evidence.asked_distinct, settings)
    yield _length(live, candidate, evidence.asked_length, settings)
    yield _no_more("empty generations", live.empty, candidate.empty)
    yield _no_more("endless generations", live.endless, candidate.endless)
    yield _tool_calls(live.tool_parse, candidate.tool_parse)


def _finite(finite: bool) -> CheckResult:
    message = "all log-probabilities are finite"
    if not finite:
        message = "NaN or infinite log-probabilities: lower the learning rate"
    return CheckResult("finite", finite, None, None, message)


def _distinct(
    live: Generations, candidate: Generations, asked: float, s: GateSettings
) -> CheckResult:
    """Distinct-2 at least ``distinct_floor`` × live's, or less where the pairs ask for less.

    A set phrase that users prefer ("Certainly!") lowers the diversity of good answers too.
    """
    floor = s.distinct_floor * min(1.0, asked) * live.distinct_2
    passed = candidate.distinct_2 >= floor
    message = f"{_dot(live.distinct_2)} -> {_dot(candidate.distinct_2)}, at least {_dot(floor)}"
    if not passed:
        message += ": answers repeat themselves; train less, or raise kl.weight"
    return CheckResult("distinct-2", passed, candidate.distinct_2, floor, message)


def _length(
    live: Generations, candidate: Generations, asked: float, s: GateSettings
) -> CheckResult:
    """Length within ``length_ratio`` of live's, stretched by what the pairs ask for.

    The end on the asked side is multiplied by the pairs' own ratio, so that an answer of just the
    asked length has the same room for error as one of live's length has without being asked.
    """
    low, high = s.length_ratio[0] * min(1.0, asked), s.length_ratio[1] * max(1.0, asked)
    ratio = length_ratio(candidate.mean_length, live.mean_length)
    passed = low <= ratio <= high
    message = f"{live.mean_length:.1f} -> {candidate.mean_length:.1f} tokens, × {_dot(ratio)}, "
    message += f"{'within' if passed else 'outside'} {_dot(low)} to {_dot(high)}"
    if (low, high) != s.length_ratio:
        message += f" (stretched: chosen answers are × {_dot(asked)} as long as rejected ones)"
    if not passed:
        message += ": balance the lengths of the pairs, or lower the learning rate"
    return CheckResult("length ratio", passed, ratio, low if ratio < low else high, message)


def _no_more(name: str, live: int, candidate: int) -> CheckResult:
    """No more than live's, but for the noise of a count: two standard deviations, 2√live.

    Where live has none, one is too many.
    """
    allowed = live + int(2 * math.sqrt(live))
    message = f"{candidate} on the probes, live {live}"
    if candidate > allowed:
        message += f", at most {allowed}: train less, or raise kl.weight"
    return CheckResult(name, candidate <= allowed, candidate, allowed, message)


def _tool_calls(live: float | None, candidate: float | None) -> CheckResult:
    if live is None or candidate is None:
        silent = "live" if live is None else "the candidate"
        message = f"nothing to compare: {silent} wrote no tool call on the probes"
        return CheckResult("tool-call JSON", True, candidate, live, message)
    message = f"{_dot(live)} -> {_dot(candidate)} of tool calls parse"
    if candidate < live:
        message += ": raise loss.nll, or replay more pairs with tool calls"
    return CheckResult("tool-call JSON", candidate >= live, candidate, live, message)


def _dot(value: float, signed: bool = False) -> str:
    """Write a number as ``.52`` or ``+.39``; three decimals below .01, so that little shows."""
    digits = 3 if 0 < abs(value) < 0.01 else 2
    text = f"{value + 0.0:{'+' if signed else ''}.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
