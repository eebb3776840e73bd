"""The gate: decides whether a candidate may serve in place of live.

It takes evidence and returns a verdict with reasons; every check must pass. It is a pure function:
scoring and generating happen in ``evaluate.py``.
"""

from __future__ import annotations

from agentpref.config import GateSettings
from agentpref.prove import behaviour, gain, ordinary, retention, value
from agentpref.prove.evidence import Evidence
from agentpref.prove.results import CheckResult, GateResult
from agentpref.prove.written import WRITTEN, has_room
from agentpref.types import Verdict


def judge(evidence: Evidence, settings: GateSettings | None = None, *, seed: int = 0) -> GateResult:
    """Decide on a candidate. The same evidence, settings and seed give the same verdict.

    The verdict is ``refused`` if a guard fails, or if the evidence refutes a gain: a loss is
    proven, or that no gain worth having is there. It is ``cut_short`` instead if a limit of time
    had stopped the training. It is ``nothing_to_gain`` if nothing but a gain is wanting, live is
    right about nearly all of it already and writes what is asked for, and there are no thumbs of
    which nobody can tell that. Otherwise it is ``passed`` if a gain is proven, and ``insufficient``
    while that is open; then what is not written yet may still be learned.

    Raises:
        UpdateError: for a retention stratum without pairs.
    """
    s = settings or GateSettings()
    found: gain.Gain | value.ValueGain
    if evidence.value is None:
        found = gain.weigh(evidence, s)
        better = gain.gain(evidence, found, s, seed)
    else:
        found = value.weigh(evidence.value, evidence.looks, s)
        better = value.check(evidence.value, found, s)
    guards = (
        *retention.retention(evidence.retention, s, seed),
        *retention.people(evidence.people, s),
        behaviour.distance(evidence.kl, s),
        *behaviour.generation(evidence, s),
        *ordinary.ordinary(evidence, s),
        *ordinary.liked(evidence, s),
        *value.earned(evidence.earned),
        *(
            CheckResult(f"check {c.name}", c.passed, None, None, c.message)
            for c in evidence.user_checks
        ),
    )
    failed = {check.name for check in guards if not check.passed}
    verdict: Verdict = "passed" if found.state == "proven" else "insufficient"
    learns_on = bool(evidence.untold) if evidence.known else found.state == "open"
    harmed = failed - ({WRITTEN} if learns_on else set())
    if found.refuted or harmed:
        verdict = "cut_short" if evidence.cut_short else "refused"
    only_gain = found.state not in ("proven", "loss") and not harmed and verdict != "cut_short"
    if evidence.known and only_gain:
        is_open = has_room(evidence) or evidence.untold
        verdict = "insufficient" if is_open else "nothing_to_gain"
    return GateResult(verdict, (better, *guards), found.to_mapping(), found.refuted)
