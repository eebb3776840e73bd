"""The gate: decides whether a candidate may serve in place of live.

It takes evidence and returns a verdict with reasons; every check must pass. It is a pure function:
scoring and generating happen in ``evaluate.py``.

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
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Bound, Paired, lower_bound, pairs_needed
from agentpref.prove.metrics import length_ratio
from agentpref.types import Stratum, Verdict

FEWEST_PROMPTS = 30  # with fewer, the bootstrap covers less than its nominal confidence


@dataclass(frozen=True, slots=True)
class Generations:
    """Statistics of one policy's greedy answers to the probe prompts.

    ``mean_length`` is in tokens; ``empty`` and ``endless`` count answers without text and answers
    cut off at the token limit; ``tool_parse`` is the share of the written tool calls that parse as
    JSON, ``None`` if none was written; ``finite`` is whether every log-probability was finite.
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
    """The evidence for a verdict.

    ``new`` has the scores of held-out examples that live has not learned. ``retention`` has those
    that it has learned, by group of :func:`~agentpref.prefer.strata.coarsen`; it is empty while the
    base serves, which has nothing to forget. ``kl`` is KL(π_0‖π_θ) in nats per token. ``live`` and
    ``candidate`` answered the same probes. ``asked_length`` and ``asked_distinct`` are the ratios
    of length and of distinct-2 between chosen and rejected answers of the new examples: the change
    that the examples ask for. ``cut_short`` says whether a limit of time stopped the training.
    ``notes`` say what a reader should know of how it was gathered.
    """

    new: Paired
    kl: float
    live: Generations
    candidate: Generations
    retention: Mapping[Stratum, Paired] = field(default_factory=dict)
    asked_length: float = 1.0
    asked_distinct: float = 1.0
    user_checks: tuple[UserCheckResult, ...] = ()
    cut_short: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One condition: a value, the bound that it is compared with, and a message about both."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    message: str


@dataclass(frozen=True, slots=True)
class GateResult:
    """The verdict on a candidate, and the results of all checks."""

    verdict: Verdict
    checks: tuple[CheckResult, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The messages of the checks that failed; empty where the candidate passed."""
        return tuple(f"{check.name}: {check.message}" for check in self.checks if not check.passed)

    def to_mapping(self) -> dict[str, Any]:
        """The result as plain values for JSON; numbers that are not finite become ``None``."""
        checks = [asdict(check) for check in self.checks]
        for check in checks:
            for name in ("value", "bound"):
                if check[name] is not None and not math.isfinite(check[name]):
                    check[name] = None
        return {"verdict": self.verdict, "checks": checks}


def judge(evidence: Evidence, settings: GateSettings | None = None, *, seed: int = 0) -> GateResult:
    """Decide on a candidate. The same evidence, settings and seed give the same verdict.

    The verdict is ``refused`` if any check but the one on the amount of new evidence fails, or
    ``cut_short`` if a limit of time had stopped the training; otherwise ``insufficient`` if there
    is too little new evidence; otherwise ``passed``. With too little evidence, no gain is no reason
    to refuse yet, but a proven loss is.

    Raises:
        UpdateError: for a retention stratum without pairs.
    """
    s = settings or GateSettings()
    new = evidence.new
    enough = _enough(new, s)
    gain = _gain(evidence, s, seed)
    guards = (
        *_retention(evidence.retention, s, seed),
        _kl(evidence.kl, s),
        *_generation(evidence, s),
        *(
            CheckResult(f"check {c.name}", c.passed, None, None, c.message)
            for c in evidence.user_checks
        ),
    )
    is_worse = enough.passed and not gain.passed
    if not enough.passed and len(new):
        is_worse = lower_bound(new.swap(), confidence=s.confidence, seed=seed).lower > 0
    verdict: Verdict = "passed" if enough.passed else "insufficient"
    if is_worse or not all(check.passed for check in guards):
        verdict = "cut_short" if evidence.cut_short else "refused"
    return GateResult(verdict, (enough, gain, *guards))


def retention_margin(prompts: int, checks: int, settings: GateSettings) -> float:
    """The loss that each of ``checks`` retention checks allows on a number of prompts.

    The docstring of this module gives the formula and its reason.
    """
    normal = NormalDist()
    risk = (1 - settings.confidence) / checks
    z = normal.inv_cdf(settings.confidence) + normal.inv_cdf(1 - risk)
    noise = z * math.sqrt(settings.flip_rate / prompts) + 1 / prompts
    return max(settings.retention_margin, noise)


def _check(
    name: str, passed: bool, value: float | None, bound: float | None, message: str, cure: str
) -> CheckResult:
    """A result whose message ends with the cure if the check failed."""
    return CheckResult(name, passed, value, bound, message if passed else message + cure)


def _enough(new: Paired, s: GateSettings) -> CheckResult:
    """Enough pairs, and enough prompts among them for the bootstrap to be trusted."""
    name, pairs, prompts = "enough evidence", len(new), len(set(new.prompts))
    found = f"{pairs} new held-out pairs"
    if pairs < s.min_pairs:
        cure = f" of at least {s.min_pairs}: {s.min_pairs - pairs} more would allow a promotion"
        return _check(name, False, pairs, s.min_pairs, found, cure)
    fewest = min(FEWEST_PROMPTS, s.min_pairs)
    cure = f" of at least {fewest}: ask about {fewest - prompts} other prompts"
    return _check(name, prompts >= fewest, prompts, fewest, f"{found} on {prompts} prompts", cure)


def _gain(evidence: Evidence, s: GateSettings, seed: int) -> CheckResult:
    name, new = "new preferences", evidence.new
    if not len(new):
        return CheckResult(name, False, None, 0.0, "no new held-out pair to judge by")
    bound = lower_bound(new, confidence=s.confidence, seed=seed)
    passed = bound.lower > 0
    no_gain = "no gain to prove: check the labels, or train longer"
    if evidence.cut_short:
        no_gain = "no gain to prove: max_minutes stopped the training; raise it"
    cure = _cure(bound, 0.0, s, no_gain)
    return _check(name, passed, bound.lower, 0.0, _describe(bound, 0.0, passed), cure)


def _retention(
    retention: Mapping[Stratum, Paired], s: GateSettings, seed: int
) -> Iterator[CheckResult]:
    groups = {str(stratum): paired for stratum, paired in retention.items()}
    if len(groups) > 1:
        groups["all strata together"] = Paired.pooled(groups.values())
    for name, paired in groups.items():
        bound = lower_bound(paired, confidence=s.confidence, seed=seed)
        margin = retention_margin(bound.prompts, len(groups), s)
        passed = bound.lower > -margin
        message = _describe(bound, -margin, passed)
        if margin > s.retention_margin:
            message += (
                f" (margin widened from {_dot(s.retention_margin)}: on {bound.prompts} prompts a "
                "smaller loss could not be told from chance)"
            )
        loss = "a loss beyond the margin: raise replay.minimum or kl.weight, or refit from base"
        cure = _cure(bound, -s.retention_margin, s, loss)
        yield _check(f"retention of {name}", passed, bound.lower, -margin, message, cure)


def _describe(bound: Bound, floor: float, passed: bool) -> str:
    """Write a change as ``.52 -> .91 on 214 held-out pairs, +.39, lower bound +.33 > 0``."""
    against = "0" if floor == 0 else _dot(floor, signed=True)
    short = "" if passed else f", short by {_dot(floor - bound.lower)}"
    note = f" ({bound.message})" if bound.message else ""
    return (
        f"{_dot(bound.live)} -> {_dot(bound.candidate)} on {bound.pairs} held-out pairs, "
        f"{_dot(bound.change, signed=True)}, lower bound {_dot(bound.lower, signed=True)} "
        f"{'>' if passed else 'not >'} {against}{short}{note}"
    )


def _cure(bound: Bound, floor: float, s: GateSettings, otherwise: str) -> str:
    """What may lift a bound above the floor: more pairs, if the change is real."""
    needed = pairs_needed(bound, floor, confidence=s.confidence)
    if needed is None:
        return f"; {otherwise}"
    return f"; if this change is real, about {needed} pairs would settle it"


def _kl(kl: float, s: GateSettings) -> CheckResult:
    passed, cure = kl <= s.kl_budget, ": refit from base on the whole buffer"
    message = (
        f"{_dot(kl)} nats per token from the base, {'within' if passed else 'over'} the budget "
        f"of {_dot(s.kl_budget)}"
    )
    return _check("KL budget", passed, kl, s.kl_budget, message, cure)


def _generation(evidence: Evidence, s: GateSettings) -> Iterator[CheckResult]:
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
    message = f"{_dot(live.distinct_2)} -> {_dot(value)}, at least {_dot(floor)}"
    cure = ": answers repeat themselves; train less, or raise kl.weight"
    yield _check("distinct-2", value >= floor, value, floor, message, cure)

    # The end of the range on the asked side is multiplied by the pairs' own ratio, so that an
    # answer of the asked length has the same room for error as one of live's length otherwise.
    asked = evidence.asked_length
    low, high = s.length_ratio[0] * min(1.0, asked), s.length_ratio[1] * max(1.0, asked)
    ratio = length_ratio(candidate.mean_length, live.mean_length)
    passed = low <= ratio <= high
    message = (
        f"{live.mean_length:.1f} -> {candidate.mean_length:.1f} tokens, × {_dot(ratio)}, "
        f"{'within' if passed else 'outside'} {_dot(low)} to {_dot(high)}"
    )
    if (low, high) != s.length_ratio:
        message += f" (stretched: chosen answers are × {_dot(asked)} as long as rejected ones)"
    cure = ": balance the lengths of the pairs, or lower the learning rate"
    yield _check("length ratio", passed, ratio, low if ratio < low else high, message, cure)

    # Counts may exceed live's by their noise, two standard deviations (2√live): if live has none,
    # one is too many.
    for name in ("empty", "endless"):
        before, after = getattr(live, name), getattr(candidate, name)
        allowed = before + int(2 * math.sqrt(before))
        message = f"{after} on the probes, live {before}"
        cure = f", at most {allowed}: train less, or raise kl.weight"
        yield _check(f"{name} generations", after <= allowed, after, allowed, message, cure)

    old, new, name = live.tool_parse, candidate.tool_parse, "tool-call JSON"
    if old is None or new is None:
        silent = "live" if old is None else "the candidate"
        message = f"nothing to compare: {silent} wrote no tool call on the probes"
        yield CheckResult(name, True, new, old, message)
    else:
        message = f"{_dot(old)} -> {_dot(new)} of tool calls parse"
        cure = ": raise loss.nll, or replay more pairs with tool calls"
        yield _check(name, new >= old, new, old, message, cure)


def _dot(value: float, signed: bool = False) -> str:
    """Write a number as ``.52`` or ``+.39``; below .01 with three decimals."""
    digits = 3 if 0 < abs(value) < 0.01 else 2
    text = f"{value + 0.0:{'+' if signed else ''}.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
