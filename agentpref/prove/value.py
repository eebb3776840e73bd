"""The check on conversations: what would they earn with the candidate, and with live?

Each policy is asked what it would say at every state of some held-out conversations, and fitted
Q-evaluation says what that is worth from where they began (:mod:`agentpref.prove.ope.traces`).
These conversations trained nothing, and the intervals are over them. Where a policy
would say what is like nothing in the log, the log does not tell, and no number is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

from agentpref.config import GateSettings
from agentpref.prove.evidence import EarnedEvidence, ValueEvidence
from agentpref.prove.gain import LIKELY, NAME, State, odds
from agentpref.prove.results import CheckResult, dot
from agentpref.prove.signs import allowed

FEWEST = 20
"""With fewer held-out conversations nothing is said."""

MOST_UNSUPPORTED = 0.1
"""At so much that is like no logged answer, the log does not tell what a policy earns."""

EARNED = "logged thumbs"
"""The name of the check of what logged answers say."""

LEAST_EXPLAINED = 0.1
"""Where answers tell less of what conversations come to, no policy's answers are known by them."""

_NOTHING = 1e-6  # values that differ by less are the same


@dataclass(frozen=True, slots=True)
class ValueGain:
    """What the evidence says of a gain in value; as :class:`agentpref.prove.gain.Gain`."""

    state: State
    chance: float
    needed: float
    look: int
    counts: bool
    likely: bool
    why: str = ""

    @property
    def refuted(self) -> bool:
        """Whether a loss is proven."""
        return self.state == "loss"

    def to_mapping(self) -> dict[str, float | None]:
        """The numbers for reports."""
        return {
            "chance": self.chance,
            "needed": self.needed,
            "look": self.look,
            "look_counts": self.counts,
            "likely": self.likely,
            "comparisons_needed": None,
        }


def weigh(found: ValueEvidence, looks: int, s: GateSettings) -> ValueGain:
    """Decide on the gain: by the difference of the two values, against its standard error."""
    look, risk = looks + 1, 1 - s.confidence
    needed, why = allowed(look, risk), refusal(found)
    if why:
        return ValueGain("open", 1.0, needed, looks, False, False, why)
    least = _NOTHING * max(1.0, abs(found.live), abs(found.candidate))
    z = found.gain / max(found.error, least)
    chance = NormalDist().cdf(-z)
    state: State = "open"
    if chance <= needed:
        state = "proven"
    elif NormalDist().cdf(z) <= risk:
        state = "loss"
    return ValueGain(state, chance, needed, look, True, chance <= allowed(look, LIKELY))


def refusal(found: ValueEvidence) -> str:
    """Why the log does not tell what the candidate is worth; empty if it does."""
    if found.conversations < FEWEST:
        return f"{found.conversations} held-out conversations, of at least {FEWEST}: collect more"
    for share, who in ((found.unsupported, "the candidate"), (found.unsupported_live, "live")):
        if share >= MOST_UNSUPPORTED:
            return (
                f"{share:.0%} of what {who} would say is like no logged answer, so the log does "
                "not tell what it earns: try it as a canary, and log what comes of it"
            )
    if found.explained < LEAST_EXPLAINED:
        return (
            f"answers tell {max(0.0, found.explained):.0%} of what held-out conversations come to "
            f"(at least {LEAST_EXPLAINED:.0%}), so the log does not tell whose are better: collect "
            "more, or try it as a canary"
        )
    if not all(map(math.isfinite, (found.live, found.candidate, found.error))):
        return "the value is no finite number: look at the rewards"
    return ""


def earned(found: EarnedEvidence | None) -> Iterator[CheckResult]:
    """A veto where logged answers prove that the candidate earns less than live.

    There is no check where they do not tell.
    """
    if found is None:
        return
    passed = found.high >= 0
    message = (
        f"by {found.answers} logged answers live earns {dot(found.live)} and the candidate "
        f"{dot(found.candidate)} in thumbs ({dot(found.low, signed=True)} to "
        f"{dot(found.high, signed=True)})"
    )
    if not passed:
        message += ": a proven loss; it makes likelier what people liked less"
    yield CheckResult(EARNED, passed, found.candidate, found.live, message)


def check(found: ValueEvidence, gain: ValueGain, s: GateSettings) -> CheckResult:
    """The check that conversations earn more."""
    passed = gain.state == "proven"
    if gain.why:
        return CheckResult(NAME, False, None, gain.needed, gain.why)
    least = found.gain - NormalDist().inv_cdf(s.confidence) * found.error
    message = (
        f"conversations earn {dot(found.live)} -> {dot(found.candidate)} by fitted Q-evaluation on "
        f"{found.conversations} held-out ones, {dot(found.gain, signed=True)}, at least "
        f"{dot(least, signed=True)}: {odds(gain.chance)} by chance, {odds(gain.needed)} or rarer "
        "proves a gain"
    )
    if gain.state == "loss":
        message += "; no gain but a loss: look at the rewards"
    elif not passed:
        message += "; collect more conversations, or train longer"
    return CheckResult(NAME, passed, gain.chance, gain.needed, message)
