"""The check on answers that nobody judged: do they stay as likely, and free of harm?

It looks at held-out ordinary answers, whose prompts lie outside of what people judge, so no
preference asks for a change there. How much less likely live's and the log's answers have become is
measured in nats per token, where an answer counts as 16 tokens at least, as for KL. What has become
likelier makes up for nothing: an anchor makes most answers a little likelier while a few are
destroyed. Every fall counts, so the mean over answers shows damage to a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentpref.config import GateSettings
from agentpref.prove.results import CheckResult, check, dot

NAME = "ordinary answers"


@dataclass(frozen=True, slots=True)
class OrdinaryEvidence:
    """What became of ordinary answers: one number each, and what both policies write instead.

    ``falls`` are losses of log-likelihood against live in nats per token, 0 or more. ``live`` and
    ``candidate`` are counts of harm (empty, endless, repeated, broken off) among ``written`` greedy
    answers.
    """

    falls: Sequence[float]
    written: int = 0
    live: int = 0
    candidate: int = 0


def falls(live: Sequence[float], candidate: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """How much less likely each answer has become, in nats per token; 0 where it has not.

    ``live`` and ``candidate`` are the sums of its tokens' log-probabilities.
    """
    from agentpref.learn.batch import SHORTEST

    each = zip(live, candidate, tokens, strict=True)
    return [max(0.0, before - after) / max(SHORTEST, count) for before, after, count in each]


def ordinary(evidence: OrdinaryEvidence | None, s: GateSettings) -> Iterator[CheckResult]:
    """One check on how likely ordinary answers still are and on what is written instead.

    There is none where nothing ordinary was logged or held out.
    """
    if evidence is None or not evidence.falls:
        return
    value, size = math.fsum(evidence.falls) / len(evidence.falls), len(evidence.falls)
    passed = value <= s.ordinary_loss
    message = (
        f"{size} answers that nobody judged are {dot(value)} nats per token less likely than under "
        f"live, {'within' if passed else 'more than'} {dot(s.ordinary_loss)}"
    )
    cure = ": raise anchor.size or anchor.weight, lower kl.target, or train less"
    yield check(NAME, passed, value, s.ordinary_loss, message, cure)

    # As for other counts, two standard deviations above live's are allowed.
    allowed = evidence.live + int(2 * math.sqrt(evidence.live))
    message = (
        f"{evidence.candidate} of {evidence.written} greedy answers are empty, endless, repeated "
        f"or broken off, live {evidence.live}"
    )
    passed = evidence.candidate <= allowed
    cure = f", at most {allowed}: raise anchor.weight, or train less"
    yield check(f"{NAME}, written", passed, evidence.candidate, allowed, message, cure)
