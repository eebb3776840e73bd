"""The gate: decides whether a candidate may serve in place of live.

It takes evidence and returns a verdict with reasons; every check must pass. It is a pure function:
scoring and generating happen in ``evaluate.py``.
"""

from __future__ import annotations

from agentpref.config import GateSettings
from agentpref.prove import behaviour, gain, ordinary, retention
from agentpref.prove.bootstrap import lower_bound
from agentpref.prove.evidence import Evidence
from agentpref.prove.results import CheckResult, GateResult
from agentpref.types import Verdict


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
    enough = gain.enough(new, s)
    better = gain.gain(evidence, s, seed)
    guards = (
        *retention.retention(evidence.retention, s, seed),
        behaviour.distance(evidence.kl, s),
        *behaviour.generation(evidence, s),
        *ordinary.ordinary(evidence.ordinary, s),
        *(
            CheckResult(f"check {c.name}", c.passed, None, None, c.message)
            for c in evidence.user_checks
        ),
    )
    is_worse = enough.passed and not better.passed
    if not enough.passed and len(new):
        is_worse = lower_bound(new.swap(), confidence=s.confidence, seed=seed).lower > 0
    verdict: Verdict = "passed" if enough.passed else "insufficient"
    if is_worse or not all(check.passed for check in guards):
        verdict = "cut_short" if evidence.cut_short else "refused"
    return GateResult(verdict, (enough, better, *guards))
