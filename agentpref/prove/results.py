"""What a check finds, what the gate decides, and how both are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agentpref.config import GateSettings
from agentpref.prove.bootstrap import Bound, pairs_needed
from agentpref.types import Verdict


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
    """The verdict on a candidate, the results of all checks, and the numbers of the gain.

    ``refuted`` says whether a loss is proven, or that no gain worth having is there.
    """

    verdict: Verdict
    checks: tuple[CheckResult, ...]
    gain: Mapping[str, float | None] = field(default_factory=dict)
    refuted: bool = False

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
        return {"verdict": self.verdict, "checks": checks, "gain": dict(self.gain)}


def check(
    name: str, passed: bool, value: float | None, bound: float | None, message: str, cure: str
) -> CheckResult:
    """A result whose message ends with the cure if the check failed."""
    return CheckResult(name, passed, value, bound, message if passed else message + cure)


def describe(bound: Bound, floor: float, passed: bool) -> str:
    """Write a change as ``.52 -> .91 on 214 held-out pairs, +.39, lower bound +.33 > 0``."""
    against = "0" if floor == 0 else dot(floor, signed=True)
    short = "" if passed else f", short by {dot(floor - bound.lower)}"
    note = f" ({bound.message})" if bound.message else ""
    return (
        f"{dot(bound.live)} -> {dot(bound.candidate)} on {bound.pairs} held-out pairs, "
        f"{dot(bound.change, signed=True)}, lower bound {dot(bound.lower, signed=True)} "
        f"{'>' if passed else 'not >'} {against}{short}{note}"
    )


def cure_of(bound: Bound, floor: float, s: GateSettings, otherwise: str) -> str:
    """What may lift a bound above the floor: more pairs, if the change is real."""
    needed = pairs_needed(bound, floor, confidence=s.confidence)
    if needed is None:
        return f"; {otherwise}"
    return f"; if this change is real, about {needed} pairs would settle it"


def dot(value: float, signed: bool = False) -> str:
    """Write a number as ``.52`` or ``+.39``; below .01 with three decimals."""
    digits = 3 if 0 < abs(value) < 0.01 else 2
    text = f"{value + 0.0:{'+' if signed else ''}.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
