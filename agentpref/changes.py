"""Finds preferences that changed, and decides which old evidence no longer counts.

Before an update trains, live is asked about the new judgements of each tag, and about old held-out
ones of the same tag (and, where users are known, of the same users). Where the new ones contradict
the old (``prove/drift.py``), the old evidence before the change point yields, if no candidate that
kept it passed: it is aged out, neither replayed nor held against the candidate. It stays in the
log. What was aged out before comes back where it says what the new judgements say: then people have
turned again. A new topic in the same tag may look like a change; where both can be learned, nothing
yields.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from agentpref.config import UpdateConfig
from agentpref.learn.data import Available
from agentpref.prefer.strata import Listed, sample
from agentpref.prove.drift import Contradiction, Judged, by_prompt, contradiction, more_than_chance
from agentpref.record import asides
from agentpref.record.asides import Refusal
from agentpref.record.updates import Updates
from agentpref.retry import Turn
from agentpref.types import Example

if TYPE_CHECKING:
    from agentpref.learn.learner import Learner

MOST_OLD, MOST_NEW = 256, 512
"""How many judgements of a tag are asked about: a sample of the old, the newest of the new."""

L = TypeVar("L", bound=Listed)
Users = frozenset[str | None]


@dataclass(frozen=True, slots=True)
class Changes:
    """What becomes of old and of set-aside examples, by their ids, and what the report says.

    ``turn`` is what yields if it must. ``back`` were set aside, and are taken in again.
    ``undecided`` names the tags in which new judgements may contradict, but too few to say so.
    """

    turn: Turn = field(default_factory=Turn)
    back: frozenset[str] = frozenset()
    undecided: frozenset[str] = frozenset()
    told: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def find_changes(
    learner: Learner,
    available: Available,
    connection: sqlite3.Connection,
    refusals: Sequence[Refusal],
    live: str,
    config: UpdateConfig,
) -> Changes:
    """Ask live about new and old judgements, tag by tag.

    Args:
        learner: scores examples under live.
        available: all examples there are.
        connection: to the home, which knows who judged.
        refusals: what is set aside, by the update that did it.
        live: the revision that serves.
        config: the confidence of the gate.
    """
    available = replace(available, aside=_meant(available.aside, refusals))
    witness = _Witness(learner, available, connection)
    tags = sorted({one.tag for one in (*available.new, *available.new_held_out)})
    trained = Updates(connection).trained_by(live)  # live has seen the labels of these
    unseen = tuple(one for one in available.aside if one.example_id not in trained)
    tags = [tag for tag in tags if any(one.tag == tag for one in available.old_held_out)]
    level = (1 - config.gate.confidence) / max(1, len(tags))
    parts = [_in_tag(tag, witness, available, unseen, level) for tag in tags]
    agreed = _agreeing(witness, available, unseen, refusals, live, level)
    notes = [note for part in parts for note in part.notes]
    if agreed:
        notes.append(
            f"{len(agreed)} examples that were set aside are taken in again: what live has learned "
            "since agrees with them"
        )
    turns = [part.turn for part in parts]
    return Changes(
        turn=Turn(
            aged=frozenset().union(*(turn.aged for turn in turns)),
            restored=frozenset().union(*(turn.restored for turn in turns)),
            back=frozenset().union(*(turn.back for turn in turns)),
            told=tuple(told for turn in turns for told in turn.told),
            notes=tuple(note for turn in turns for note in turn.notes),
        ),
        back=agreed,
        undecided=frozenset().union(*(part.undecided for part in parts)),
        told=tuple(told for part in parts for told in part.told),
        notes=tuple(notes),
    )


class _Witness:
    """Live, who says of examples whether it agrees with them, and who judged them."""

    def __init__(
        self, learner: Learner, available: Available, connection: sqlite3.Connection
    ) -> None:
        self._learner, self._available, self._connection = learner, available, connection

    def ask(self, listed: Sequence[Listed]) -> list[tuple[Example, float]]:
        """Examples that can be scored and count as evidence, and how right live is about each."""
        from agentpref.prove import evaluate

        rows = self._learner.measure(self._available.read(listed))
        if not rows:
            return []
        right = evaluate.policy_scores(self._learner, "live", rows)
        counted = evaluate.Scores(rows, right, right).counted(range(len(rows)))
        return [(rows[number].example, right[number]) for number in counted]

    def users(self, examples: Iterable[Example]) -> dict[str, Users]:
        """Who judged each example, by its id, now."""
        return self._named({one.example_id: set(one.provenance) for one in examples})

    def users_then(self, listed: Iterable[Listed]) -> dict[str, Users]:
        """Who judged each example, by its id, when updates used it."""
        ids = [one.example_id for one in listed]
        known = asides.sources(self._connection, ids)
        return self._named({name: known.get(name, set()) for name in ids})

    def _named(self, judgements: Mapping[str, set[str]]) -> dict[str, Users]:
        names = asides.voters(self._connection, {one for own in judgements.values() for one in own})
        return {
            example: frozenset(names.get(one) for one in own) or frozenset([None])
            for example, own in judgements.items()
        }


def _in_tag(
    tag: str, witness: _Witness, available: Available, unseen: Sequence[Listed], level: float
) -> Changes:
    """Decide on one tag."""
    fresh = _of(tag, available.new, available.new_held_out, unseen)
    fresh = sorted(fresh, key=lambda one: (one.created_at, one.example_id))[-MOST_NEW:]
    new = witness.ask(fresh)
    old = witness.ask(sample(_of(tag, available.old_held_out), MOST_OLD))
    by_whom = witness.users(example for example, _ in (*new, *old))
    same = _users(new, by_whom) & _users(old, by_whom)
    new, old = ([one for one in some if by_whom[one[0].example_id] & same] for some in (new, old))
    found = contradiction(_judged(old), _judged(new), level=level)
    if found is None:
        return Changes()
    told = {"tag": tag, "users": len(same - {None}), **found._asdict()}
    if found.state == "undecided":
        note = (
            f"{tag}: {found.contradicting} of {found.new} new judgements contradict older ones, "
            f"too few to say that people changed their minds (p {found.p_value:.2g}); the older "
            "ones still count"
        )
        return Changes(undecided=frozenset([tag]), told=(told,), notes=(note,))
    learned = _of(tag, available.old, available.old_held_out)
    aged = _before(learned, found.since, same, witness)
    restored = _turned_back(_of(tag, available.aged), same, witness, found.live_agrees, level)
    back = frozenset(
        one.example_id for one in _of(tag, available.aside) if one.created_at >= found.since
    )
    counts = {"aged_out": len(aged), "restored": len(restored), "back": len(back)}
    note = _explained(tag, found, len(aged), len(restored), len(back))
    return Changes(Turn(aged, restored, back, ({**told, **counts},), (note,)))


def _before(
    learned: Sequence[Listed], since: float, same: Users, witness: _Witness
) -> frozenset[str]:
    """Of what was learned, the evidence before a change point that only these users gave."""
    older = [one for one in learned if one.created_at < since]
    by_whom = witness.users_then(older)
    return frozenset(one.example_id for one in older if by_whom[one.example_id] <= same)


def _turned_back(
    aged: Sequence[Listed], same: Users, witness: _Witness, agrees: bool, level: float
) -> frozenset[str]:
    """Of what was aged out before, what is on the same side of live as the new judgements."""
    by_whom = witness.users_then(aged)
    theirs = [one for one in aged if by_whom[one.example_id] <= same]
    held_out = [one for one in theirs if one.held_out]
    judged = _judged(witness.ask(sample(held_out or theirs, MOST_OLD)))
    alike = sum(one.right is agrees for one in judged)
    if more_than_chance(alike, len(judged)) > level:
        return frozenset()
    return frozenset(one.example_id for one in theirs)


def _meant(aside: Sequence[Listed], refusals: Sequence[Refusal]) -> tuple[Listed, ...]:
    """What was set aside and may come back by itself: not what nobody can have meant."""
    reports = {name: refusal.report for refusal in refusals for name in refusal.examples}
    return tuple(
        one for one in aside if not asides.is_odd(reports.get(one.example_id, {}), one.tag)
    )


def _agreeing(
    witness: _Witness,
    available: Available,
    unseen: Sequence[Listed],
    refusals: Sequence[Refusal],
    live: str,
    level: float,
) -> frozenset[str]:
    """What was set aside before live was trained, and live agrees with, tag by tag.

    It is asked about those ``unseen`` ones that did not train it.
    """
    found, asked = set[str](), {one.example_id for one in unseen}
    for refusal in refusals:
        if refusal.parent == live:
            continue
        theirs = [one for one in available.aside if one.example_id in refusal.examples]
        for tag in sorted({one.tag for one in theirs}):
            group = _of(tag, theirs)
            judged = _judged(
                witness.ask(sample([e for e in group if e.example_id in asked], MOST_OLD))
            )
            right = sum(one.right for one in judged)
            if more_than_chance(right, len(judged)) <= level:
                found.update(one.example_id for one in group)
    return frozenset(found)


def _explained(tag: str, found: Contradiction, aged: int, restored: int, back: int) -> str:
    day = datetime.fromtimestamp(found.since).astimezone().date()
    note = (
        f"{tag}: {found.contradicting} of {found.new} new judgements since {day} contradict "
        f"{aged} older ones, which were left out"
    )
    if restored:
        note += f"; {restored} that no longer counted were taken in again"
    if back:
        note += f"; {back} that were set aside were taken in again"
    return note


def _judged(asked: Iterable[tuple[Example, float]]) -> list[Judged]:
    return by_prompt((one.prompt.id, one.created_at, right) for one, right in asked)


def _users(asked: Iterable[tuple[Example, float]], by_whom: Mapping[str, Users]) -> Users:
    return frozenset().union(*(by_whom[one.example_id] for one, _ in asked))


def _of(tag: str, *groups: Iterable[L]) -> list[L]:
    return [one for group in groups for one in group if one.tag == tag]
