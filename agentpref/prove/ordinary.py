"""The checks on answers that should stay: those that nobody judged, and those that people like.

Of answers that nobody judged: do they stay as likely, and free of harm?

It looks at held-out ordinary answers, whose prompts lie outside of what people judge, so no
preference asks for a change there. How much less likely live's and the log's answers have become is
measured in nats per token, where an answer counts as 16 tokens at least, as for KL. What has become
likelier makes up for nothing: an anchor makes most answers a little likelier while a few are
destroyed. Every fall counts, so the mean over answers shows damage to a few of them.

Answers that people like are held to more loosely, since some thumbs are slips, and other judgements
of the same night may ask for something else: most of them must not become less likely. Else where
people correct what is wrong and like what is right, "always the opposite" would pass, because only
corrections can be ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from agentpref.config import GateSettings
from agentpref.prove import behaviour
from agentpref.prove.evidence import Evidence, OrdinaryEvidence
from agentpref.prove.features import votes
from agentpref.prove.results import CheckResult, check, dot
from agentpref.prove.signs import sign_test

NAME = "ordinary answers"
LIKED = "liked answers"

_SURE = 0.01
"""The chance at which answers may be called shorter or longer though they are not."""


def falls(live: Sequence[float], candidate: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """How much less likely each answer has become, in nats per token; 0 where it has not.

    ``live`` and ``candidate`` are the sums of its tokens' log-probabilities.
    """
    from agentpref.learn.batch import SHORTEST

    each = zip(live, candidate, tokens, strict=True)
    return [max(0.0, before - after) / max(SHORTEST, count) for before, after, count in each]


def ordinary(evidence: Evidence, s: GateSettings) -> Iterator[CheckResult]:
    """A check on how likely ordinary answers still are, and one on what is written instead.

    There is none where nothing ordinary was logged or held out.
    """
    found = evidence.ordinary
    if found is None or not found.falls:
        return
    value, size = math.fsum(found.falls) / len(found.falls), len(found.falls)
    passed = value <= s.ordinary_loss
    message = (
        f"{size} answers that nobody judged are {dot(value)} nats per token less likely than under "
        f"live, {'within' if passed else 'more than'} {dot(s.ordinary_loss)}"
    )
    cure = ": raise anchor.size or anchor.weight, lower kl.target, or train less"
    yield check(NAME, passed, value, s.ordinary_loss, message, cure)
    yield _written(evidence, found, s)


def liked(evidence: Evidence, s: GateSettings) -> Iterator[CheckResult]:
    """A check on the answers that people liked; none where there are none among new thumbs."""
    if not evidence.liked:
        return
    lost, size = sum(fall > s.ordinary_loss for fall in evidence.liked), len(evidence.liked)
    passed = sign_test(lost, size - lost, one_sided=True) > 1 - s.confidence
    who = "people liked" if evidence.value is None else "led to more than usual"
    message = (
        f"{lost} of {size} new held-out answers that {who} are more than "
        f"{dot(s.ordinary_loss)} nats per token less likely than under live"
    )
    cure = ": the other judgements ask for the opposite; look at the labels"
    yield check(LIKED, passed, lost, size / 2, message, cure)


def _written(evidence: Evidence, found: OrdinaryEvidence, s: GateSettings) -> CheckResult:
    """Whether ordinary requests are answered as before, as far as nobody asked for a change.

    A likely answer need not become much less likely until another one is likelier: "Yes" to
    everything cost .02 nats per token.
    """
    live, candidate = found.live, found.candidate
    # As for other counts, two standard deviations above live's are allowed.
    allowed = live.harmed + int(2 * math.sqrt(live.harmed))
    wrong = []
    if candidate.harmed > allowed:
        wrong.append(f"at most {allowed}")
    own = replace(evidence, live=live, candidate=candidate, chosen=None, rejected=None, fresh=0)
    canned, length = behaviour.canned(own), behaviour.length(own, s)
    if not canned.passed:
        wrong.append(canned.message)
    # Of answers in many styles some become another one by chance: most must have moved one way.
    moved = votes(live.answers, candidate.answers, "tokens", 1)
    if not length.passed and sign_test(min(moved), max(moved)) <= _SURE:
        wrong.append(length.message)
    message = "; ".join([
        f"{candidate.harmed} of {len(candidate.answers)} greedy answers are empty, endless, "
        f"repeated or broken off, live {live.harmed}", *wrong
    ])  # fmt: skip
    cure = "; raise anchor.weight, or train less"
    return check(f"{NAME}, written", not wrong, candidate.harmed, allowed, message, cure)
