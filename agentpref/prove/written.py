"""The check that what people ask for is written, and not only ranked.

A candidate may rank answers as people did and go on to write what it always wrote. Live and
candidate answer the same new prompts. Where most of what the pairs plainly ask for
(:mod:`agentpref.prove.asked`) does not show in the candidate's answers, the preference is ranked,
but not written, and the candidate is refused; and so it is where it is a form of answer that does
not show, such as a call of a tool, whatever came with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentpref.prove.asked import Asked
from agentpref.prove.evidence import Evidence
from agentpref.prove.features import LANGUAGE, Features, mean, vote
from agentpref.prove.results import CheckResult, check, dot
from agentpref.prove.signs import sign_test

WRITTEN = "written"
FEWEST_PROBES = 8
"""With fewer prompts, what is written cannot be told from chance."""

_ROOM = 0.25
"""Live has room for a wish unless it is within this share of it from the chosen answers."""

_MOVED_P = 0.15
"""A wish is written if so many answers moved that way, and so few the other, by a one-sided sign
test: three of three do. The check is for what is hardly written, so its own error may be this."""

_SURE_P = 0.05
"""And where ranking can show no gain, by so small an error."""

_FAR, _FAR_P = 0.25, 0.25
"""Or if this share of it shows in the mean of the answers, and two of two moved."""

FORMS = frozenset({"JSON", "tool call", "valid tool call"})
"""Features without which an answer is of another kind, for programs at least."""

_PLAIN = 0.5
"""A wish is plain if the logarithm of its p is this share of the surest one's, or more."""


@dataclass(frozen=True, slots=True)
class Move:
    """What became of a wish in the answers to new prompts.

    ``before`` and ``after`` are the feature's means over live's and the candidate's greedy answers.
    ``up`` counts prompts whose answers moved as asked, ``down`` the others that moved. ``room`` is
    whether live was not there already, and ``moved`` whether the candidate went there.
    """

    asked: Asked
    before: float
    after: float
    up: int
    down: int
    room: bool
    moved: bool

    @property
    def chance(self) -> float:
        """The p-value of the answers that moved, by a one-sided sign test."""
        return sign_test(self.up, self.down, one_sided=True)

    def __str__(self) -> str:
        a = self.asked
        return (
            f"{'more' if a.direction > 0 else 'fewer'} {a.feature} ({_short(self.before)} -> "
            f"{_short(self.after)}; chosen {_short(a.chosen)}, rejected {_short(a.rejected)})"
        )


def moves(evidence: Evidence) -> tuple[Move, ...]:
    """What became of each feature that is asked for, in answers to the new prompts."""
    return _moves(evidence, evidence.fresh) if evidence.fresh >= FEWEST_PROBES else ()


def _moves(evidence: Evidence, prompts: int) -> tuple[Move, ...]:
    live, candidate = (g.answers[:prompts] for g in (evidence.live, evidence.candidate))
    if len(live) != len(candidate):
        return ()
    drawn: tuple[Sequence[Features], Sequence[Features]] = ((), ())
    if evidence.sampled is not None:
        drawn = evidence.sampled.live.answers, evidence.sampled.candidate.answers
    found = []
    for asked in evidence.asked:
        name, sign = asked.feature, asked.direction
        before, after = mean(live, name), mean(candidate, name)
        room = (asked.chosen - before) * sign >= _ROOM * asked.size
        # A prompt's vote is that of its greedy answer, or of the sampled one where that is unmoved.
        moved = [vote(*pair, name, sign) for pair in zip(live, candidate, strict=True)]
        for number, pair in enumerate(zip(*drawn, strict=True)):
            if number < len(moved) and not moved[number]:
                moved[number] = vote(*pair, name, sign)
        up, down = moved.count(1), moved.count(-1)
        far, p = (after - before) * sign >= _FAR * asked.size, sign_test(up, down, one_sided=True)
        is_written = p <= _MOVED_P or (far and p <= _FAR_P)
        found.append(Move(asked, before, after, up, down, room, is_written))
    return tuple(found)


def has_room(evidence: Evidence) -> bool:
    """Whether live does not write yet what people plainly ask for."""
    return any(move.room for move in _plain(moves(evidence)))


def _plain(found: Sequence[Move]) -> list[Move]:
    """What people ask for about as surely as for anything, whether live writes so or not."""
    surest = min((move.asked.p for move in found), default=1.0)
    return [move for move in found if move.asked.p <= surest**_PLAIN]


def proven(evidence: Evidence, error: float, risk: float) -> tuple[Move, ...]:
    """What people certainly ask for and the candidate certainly writes more of than live.

    That people ask for it may be by chance with probability ``error`` at most: all new labels say
    so. That answers to held-out prompts moved there may be with ``risk``, by a sign test; live was
    not there already.
    """
    return tuple(
        move
        for move in _moves(evidence, evidence.unseen)
        if move.room and move.asked.chance <= error and move.chance <= risk
    )


def written(evidence: Evidence) -> CheckResult:
    """Whether what is asked for shows in the answers: ranked, and written too."""
    found = moves(evidence)
    if evidence.known:  # then nothing but what is written can show a gain
        found = tuple(replace(one, moved=one.room and one.chance <= _SURE_P) for one in found)
    open_to = [move for move in found if move.room or move.moved]
    shown = [move for move in open_to if move.moved]
    rest = [move for move in open_to if not move.moved]
    plain = [move for move in _plain(found) if move in open_to]
    missing = [move for move in plain if _is_form(move) and move.room and not move.moved]
    passed = 2 * sum(move.moved for move in plain) >= len(plain) and not missing
    if not evidence.asked:
        message = "the pairs ask for nothing that can be measured without a scorer"
    elif not found:
        message = f"too few new prompts to see it: {evidence.fresh} of {FEWEST_PROBES}"
    elif not open_to:
        message = f"live writes so already: {_listed(found)}"
    elif not passed:
        message = (
            f"ranked, but not written: {_listed(missing or rest)} on {evidence.fresh} new prompts, "
            f"of which {_unchanged(evidence)} got the answer of before"
        )
    else:
        message = _listed(shown)
        message = "; ".join(filter(None, (message, f"not: {_listed(rest)}" if rest else "")))
    cure = ": train longer or with a higher rate, on answers that the model itself wrote"
    if evidence.cut_short:
        cure = ": max_minutes stopped the training: raise it"
    return check(WRITTEN, passed, len(shown), None, message, cure)


def _is_form(move: Move) -> bool:
    """Whether a wish is for a form of answer: one without it is none of that form at all."""
    name = move.asked.feature
    return move.asked.direction > 0 and (name in FORMS or name.startswith(LANGUAGE))


def _unchanged(evidence: Evidence) -> int:
    texts = zip(evidence.live.texts, evidence.candidate.texts, strict=False)
    return sum(old == new for old, new in list(texts)[: evidence.fresh])


def _listed(found: Sequence[Move], most: int = 4) -> str:
    rest = f" and {len(found) - most} others" if len(found) > most else ""
    return ", ".join(map(str, found[:most])) + rest


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 2 else dot(value)
