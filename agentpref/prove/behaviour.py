"""The checks on what a candidate writes, and on how far it is from the base.

Live and candidate answer the same prompts. Three kinds of change are told apart:

- *Harm* is a fault always, whatever the pairs ask for: answers that are empty, say the same over
  and over, stop within a sentence, never end, are one text for every prompt, or call tools in JSON
  that does not parse. It is counted against live's, so that no candidate is refused for live's
  faults.
- What the pairs *ask for* (:mod:`agentpref.prove.asked`) is no fault, however large it is. Whether
  it shows in the answers is another check (:mod:`agentpref.prove.written`).
- Change that *nobody asked for* is bounded: in length, variety, language, tool calls and refusals.
  An answer that comes nearer to what people chose on the same prompts is no such change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from agentpref.config import GateSettings
from agentpref.prove.evidence import Evidence
from agentpref.prove.features import (
    LENGTHS,
    REPEATS,
    SCRIPTS,
    gathered,
    is_canned,
    mean,
    votes,
)
from agentpref.prove.metrics import length_ratio
from agentpref.prove.results import CheckResult, check, dot
from agentpref.prove.signs import sign_test
from agentpref.prove.written import FEWEST_PROBES, moves, written

_KINDS = 2
"""So many of the distinct pairs of tokens may be gone from the answers by chance."""

TOOL_CALLS = "tool-call JSON"
ILL_FORMED = frozenset(
    {
        TOOL_CALLS,
        "distinct-2",
        "length ratio",
        "empty generations",
        "endless generations",
        "repeated answers",
        "broken-off answers",
    }
)
"""Checks that a candidate passes whose answers have the form of chosen ones."""

_BY_CHANCE = 2
"""So many answers may be harmed where live's are not: of a few, chance is the reason as likely."""

_LONGER = 1.25
"""Chosen answers that are so many times as long as live's let a few answers find no end."""

_CANNED_P = 0.05
"""One text for most prompts is canned if so many answers became it: five of five do."""

_UNASKED_P, _UNASKED = 0.01, 0.25
"""A change that nobody asked for is one if it is this sure and covers this share of the answers."""


def distance(kl: float, s: GateSettings) -> CheckResult:
    """The distance from the base, in nats per token, against its budget."""
    passed, cure = kl <= s.budget, ": raise kl.weight, or refit from base on the whole buffer"
    value = dot(kl) if passed or dot(kl) != dot(s.budget) else f"{kl:.4f}"  # over is over
    message = (
        f"{value} from the base (KL, nats per token), {'within' if passed else 'over'} "
        f"the budget of {dot(s.budget)}"
    )
    return check("KL budget", passed, kl, s.budget, message, cure)


def generation(evidence: Evidence, s: GateSettings) -> Iterator[CheckResult]:
    """Checks on what the candidate writes."""
    message = "all probabilities are finite numbers"
    if not evidence.candidate.finite:
        message = "NaN or infinite probabilities: lower the learning rate"
    yield CheckResult("finite", evidence.candidate.finite, None, None, message)
    yield _meant(evidence)
    yield _variety(evidence, s)
    yield length(evidence, s)
    yield from _harmless(evidence)
    yield _tool_calls(evidence)
    yield from _unasked(evidence)
    if evidence.value is None:  # else what is written is valued itself
        yield written(evidence)
    yield from _scored(evidence, s)


# Change that nobody asked for


def _variety(evidence: Evidence, s: GateSettings) -> CheckResult:
    """The variety of the answers, which may not fall much below live's or the chosen ones'."""
    live, candidate, chosen = evidence.live, evidence.candidate, evidence.chosen
    # Variety may fall to that of chosen answers to the same prompts, which may all be yes or no,
    # and as far as theirs is below that of the rejected ones: a set phrase that users prefer
    # ("Certainly!") lowers the variety of good answers too.
    value, least, why = candidate.distinct_2, live.distinct_2, ""
    if chosen is not None:
        worse = evidence.rejected.distinct_2 if evidence.rejected else 0.0
        asked = chosen.distinct_2 / worse if worse and chosen.distinct_2 else 1.0
        least = min(least, chosen.distinct_2, least * asked)
        if least < live.distinct_2:
            why = f" (chosen answers have {dot(chosen.distinct_2)})"
    # Of a few words each, answers have few pairs of tokens: that two kinds are gone is chance.
    pairs = len(candidate.answers) * (candidate.mean_length - 1)
    floor = min(s.distinct_floor * least, least - _KINDS / pairs if pairs > 0 else least)
    floor = max(0.0, floor)
    message = f"variety {dot(live.distinct_2)} -> {dot(value)}, at least {dot(floor)}{why}"
    # Lists and set forms have less variety, too. It is harm where answers repeat more of
    # themselves, or become one another, and not by chance.
    more, less = votes(live.answers, candidate.answers, REPEATS, 1)
    alike = sign_test(*gathered(live.texts, candidate.texts), one_sided=True)
    is_sure = min(alike, sign_test(more, less, one_sided=True)) <= _UNASKED_P or not live.answers
    if value < floor:
        message += f"; {more} answers repeat more of themselves, {less} less"
    passed = value >= floor or not is_sure
    cure = ": train less, or raise kl.weight"
    return check("distinct-2", passed, value, floor, message, cure)


def length(evidence: Evidence, s: GateSettings) -> CheckResult:
    """The length of the answers: within a range around live's and the chosen ones'."""
    live, candidate, chosen = evidence.live, evidence.candidate, evidence.chosen
    wished = {one.feature: one.direction for one in evidence.asked if one.feature in LENGTHS}
    # More tokens of fewer words may be asked for, of tool calls: what is measured here are tokens.
    direction = wished.get("tokens") or wished.get("words") or 0
    between = [live.mean_length, *([chosen.mean_length] if chosen is not None else [])]
    low = 0.0 if direction < 0 else s.length_ratio[0] * length_ratio(min(between), between[0])
    high = s.length_ratio[1] * length_ratio(max(between), between[0])
    high = math.inf if direction > 0 else high
    ratio = length_ratio(candidate.mean_length, live.mean_length)
    passed = low <= ratio <= high
    message = f"{live.mean_length:.1f} -> {candidate.mean_length:.1f} tokens, × {dot(ratio)}, "
    if direction < 0:
        message += f"at most {dot(high)}: shorter answers are asked for"
    elif direction > 0:
        message += f"at least {dot(low)}: longer answers are asked for"
    else:
        message += f"{'within' if passed else 'outside'} {dot(low)} to {dot(high)}"
    if chosen is not None and max(between) > min(between) and not direction:
        message += f" (chosen answers have {chosen.mean_length:.1f})"
    cure = ": nobody asked for it; balance the lengths of the pairs, or lower the learning rate"
    if direction:
        cure = ": the answers went the other way; train longer, or lower the learning rate"
    bound = low if ratio < low or math.isinf(high) else high
    return check("length ratio", passed, ratio, bound, message, cure)


def _unasked(evidence: Evidence) -> Iterator[CheckResult]:
    """Language, tool calls and refusals of the answers, where nobody asked for another."""
    live, candidate = evidence.live.answers, evidence.candidate.answers
    if not live or len(live) != len(candidate):
        return
    asked = {(one.feature, one.direction) for one in evidence.asked}
    scripts = [(f"{script} letters", sign) for script in SCRIPTS for sign in (1, -1)]
    watched = [("refusal", 1), ("tool call", -1), *scripts]
    found = []
    for name, sign in watched:
        before, after = mean(live, name), mean(candidate, name)
        up, down = votes(live, candidate, name, sign)
        far = (after - before) * sign >= _UNASKED and (name, sign) not in asked
        if not far or sign_test(up, down, one_sided=True) > _UNASKED_P:
            continue
        wanted = None if evidence.chosen is None else mean(evidence.chosen.answers, name)
        if wanted is None or (wanted - after) * sign < -_UNASKED:  # beyond what people chose, too
            found.append(f"{name} {dot(before)} -> {dot(after)}")
    message = "; ".join(found) or "none in language, tool calls or refusals"
    cure = " of the answers: nobody asked for it; train less, or raise kl.weight"
    yield check("unasked change", not found, len(found), 0, message, cure)


# Harm


def _meant(evidence: Evidence) -> CheckResult:
    """Half of the chosen answers must be such as somebody can have meant.

    A candidate that has not come so far yet, and writes the one text to a few prompts, is on its
    way there.
    """
    odd = [one for one in evidence.odd if one.rules]
    message = "; ".join(one.message for one in odd) or "most chosen answers say something"
    count, total = (odd[0].count, odd[0].total / 2) if odd else (0, None)
    cure = ": nobody can mean that; retract these judgements"
    return check("wishes", not odd, count, total, message, cure)


def _harmless(evidence: Evidence) -> Iterator[CheckResult]:
    """Counts of answers that help nobody, greedy and sampled, against live's."""
    chosen = evidence.chosen
    longer = any(one.feature in LENGTHS and one.direction > 0 for one in evidence.asked) or (
        chosen is not None and chosen.mean_length >= _LONGER * evidence.live.mean_length
    )
    kinds = (
        # what is counted, its check, and how many more than live's may be by chance alone
        ("empty", "empty generations", 0),
        ("endless", "endless generations", _BY_CHANCE if longer else 0),
        ("repeated", "repeated answers", _BY_CHANCE),
        ("broken", "broken-off answers", _BY_CHANCE),
    )
    sides = [(evidence.live, evidence.candidate, 0, "answers")]
    if evidence.sampled is not None:
        sides.append((evidence.sampled.live, evidence.sampled.candidate, 2, "sampled ones"))
    for name, title, by_chance in kinds:
        counts, parts = list[tuple[int, int]](), list[str]()
        for live, candidate, drawn, what in sides:
            before, after = getattr(live, name), getattr(candidate, name)
            # Counts may exceed live's by their noise, two standard deviations (2√live).
            allowed = before + max(by_chance, drawn, int(2 * math.sqrt(before)))
            counts.append((after, allowed))
            over = f", at most {allowed}" if after > allowed else ""
            parts.append(f"{after} of {len(candidate.answers)} {what}, live {before}{over}")
        wrong = [count for count in counts if count[0] > count[1]]
        value, bound = (wrong or counts)[0]
        cure = ": train less, or raise kl.weight; look at the chosen answers"
        yield check(title, not wrong, value, bound, "; ".join(parts), cure)
    yield canned(evidence)


def canned(evidence: Evidence) -> CheckResult:
    """One answer for nearly all prompts, or for nearly all new ones, where live had more to say."""
    found, what, is_one = evidence, "all", _one_for_all(evidence)
    if (
        not is_one
        and evidence.fresh < len(evidence.candidate.texts)
        and _one_for_all(new := _of_new(evidence))
    ):
        found, what, is_one = new, f"those to {evidence.fresh} new prompts", True
    share, usual = found.candidate.common, found.live.common
    message = f"the most common answer is {dot(share)} of {what}, live's {dot(usual)}"
    cure = ": one text answers nothing; look at the chosen answers, and train less"
    return check("canned answers", not is_one, share, None, message, cure)


def _of_new(evidence: Evidence) -> Evidence:
    """The evidence with the answers to new prompts alone, as far as these may be one text."""
    judged = (
        side.first(number) if side is not None and number else None
        for side, number in (
            (evidence.chosen, evidence.fresh_chosen),
            (evidence.rejected, evidence.fresh_rejected),
        )
    )
    live, candidate = (s.first(evidence.fresh) for s in (evidence.live, evidence.candidate))
    chosen, rejected = judged
    return replace(evidence, live=live, candidate=candidate, chosen=chosen, rejected=rejected)


def _one_for_all(evidence: Evidence) -> bool:
    """Whether the candidate gives one text to nearly all of the prompts."""
    live, candidate, chosen = evidence.live, evidence.candidate, evidence.chosen
    usual = max(live.common, evidence.rejected.common if evidence.rejected is not None else 0.0)
    # Labels are known by both sides: likes alone do not say what else an app answers.
    likes_alone = chosen is not None and evidence.rejected is None
    wanted = 0.9 if likes_alone else chosen.common if chosen is not None else 1.0
    if len(candidate.answers) < FEWEST_PROBES or not is_canned(
        candidate.common, candidate.common_words, usual, wanted
    ):
        return False
    # A label that live gives three times in four may be given every time by chance.
    moved = gathered(live.texts, candidate.texts)
    return sign_test(*moved, one_sided=True) <= _CANNED_P


def _tool_calls(evidence: Evidence) -> CheckResult:
    live, candidate, name = evidence.live, evidence.candidate, TOOL_CALLS
    old, new = live.tool_parse, candidate.tool_parse
    cure = ": raise loss.nll, or replay more pairs with tool calls"
    if new is None:
        silent = "live" if old is None else "the candidate"
        message = f"nothing to compare: {silent} wrote no tool call"
        return CheckResult(name, True, new, old, message)
    if old is None:
        count = candidate.broken_calls
        message = f"live wrote no tool call; {count} answers have one whose JSON does not parse"
        if count > _BY_CHANCE:
            message += f", at most {_BY_CHANCE}: look at the chosen answers"
        return check(name, count <= _BY_CHANCE, count, _BY_CHANCE, message, cure)
    message = f"{dot(old)} -> {dot(new)} of tool calls parse"
    return check(name, new >= old, new, old, message, cure)


# What the user measures


def _scored(evidence: Evidence, s: GateSettings) -> Iterator[CheckResult]:
    """The user's scorers: a proven loss refuses."""
    risk = (1 - s.confidence) / max(1, len(evidence.scorers))
    for one in evidence.scorers:
        name = f"scorer {one.name}"
        if one.error:
            yield CheckResult(name, False, None, None, one.error)
            continue
        message = f"{dot(one.live)} -> {dot(one.candidate)} in the mean of {one.prompts} prompts"
        cure = f": a proven loss (p {one.p:.2g})"
        yield check(name, one.p > risk, one.candidate, one.live, message, cure)


# For the report


def told(evidence: Evidence) -> dict[str, Any]:
    """What the report says of behaviour, as plain values without any text of people."""
    sampled, first = evidence.sampled, evidence.first_token
    values: dict[str, Any] = {
        "live": evidence.live.to_mapping(),
        "candidate": evidence.candidate.to_mapping(),
        "chosen": evidence.chosen.to_mapping() if evidence.chosen is not None else None,
        "rejected": evidence.rejected.to_mapping() if evidence.rejected is not None else None,
        "sampled": None
        if sampled is None
        else {
            "temperature": sampled.temperature,
            "live": sampled.live.to_mapping(),
            "candidate": sampled.candidate.to_mapping(),
        },
        "asked": [asdict(one) for one in evidence.asked],
        "moves": [
            {"feature": m.asked.feature, **{k: v for k, v in asdict(m).items() if k != "asked"}}
            for m in moves(evidence)
        ],
        "new_prompts": evidence.fresh,
        "first_token": None if first is None else asdict(first),
        "scorers": [asdict(one) for one in evidence.scorers],
    }
    plain: dict[str, Any] = _plain(values)
    return plain


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: lists for tuples, and ``None`` for numbers that are none."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
