"""Whether an update tries once more, and how: what failed says what the next attempt does.

1. An update first trains from live on everything new.
2. If the KL budget is what failed, or nothing but that what live knew in other tags than the new
   ones was lost, the next attempt refits from the base, on what is new and as much as there is of
   the old. It is proven against live like any other candidate.
3. If in some tags most chosen answers are such as nobody can have meant (``prove/asked.py``), the
   next attempt is without these tags, and nothing else changes.
4. If some of the new examples are what failed, the next attempt is without them: those of a tag, of
   judges or of people, or those that an earlier update tried already. They are at fault if live was
   proven to be better about their held-out ones; if what live knew in their tag was lost; or if the
   candidate neither gained on them nor is right about them, as with labels thrown by a coin.
5. If nothing failed but that what people ask for is not written, that answers have lost their form
   (they do not end, repeat themselves, are broken calls of tools), or that it is ranked no better
   either, the next attempt imitates what was chosen: the weight of its NLL is :data:`IMITATION`. If
   what is asked for is still not written, or that spent the KL budget and there is no refit, or
   there is nothing to imitate, it trains :data:`LONGER` times as many epochs, too.
6. If new judgements of a tag contradict what live has learned, and no candidate that had to keep
   that passed, the next attempt is without the old evidence (a :class:`Turn`).
7. If nothing failed but that too little is proven, and a part of the new examples dilutes a gain
   that the others show, the next attempt is without that part (:func:`narrowed`).

All may follow from one attempt. All attempts together are one update with one report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from agentpref.learn.data import Available
from agentpref.prefer.strata import Listed
from agentpref.prove.behaviour import ILL_FORMED, TOOL_CALLS
from agentpref.prove.bootstrap import Paired
from agentpref.prove.drift import by_prompt, more_than_chance
from agentpref.prove.results import CheckResult, GateResult
from agentpref.prove.retention import PEOPLE
from agentpref.prove.signs import Signs
from agentpref.prove.written import WRITTEN
from agentpref.types import BY_JUDGES

if TYPE_CHECKING:
    from agentpref.prove.evaluate import Scores

MOST = 3
"""The most attempts of one update."""

IMITATION = 5.0
"""The least weight α of the chosen answers' NLL after an attempt that ranked and did not write.

A preference loss is content once a rejected answer is unlikely, whatever is written instead."""

LONGER = 3
"""How many times as long an attempt trains where imitation did not help."""

FEWEST = 8
"""With fewer held-out prompts, hardly anything can be shown of a group: it is not at fault."""

_NOT_WRITTEN = frozenset({WRITTEN, TOOL_CALLS})
_MISWRITTEN = _NOT_WRITTEN | ILL_FORMED
_KL, _RETENTION = "KL", "retention of "
_JUDGES = "judges"
_GAIN = "new preferences"
_MOST_GROUPS = 20
_FRESH = "is new"  # of what was tried before and what was not, this is not blamed
_SETS = ("aside", "aged", "restored", "undecided", "waits")
_LISTS = ("without", "changed", "notes", "told")


@dataclass(frozen=True, slots=True)
class Turn:
    """People who changed their minds: the old evidence that yields if it stands in the way.

    ``aged`` are the ids of examples that would no longer count, ``restored`` of those aged out
    before that would count again, and ``back`` of those set aside that would be taken in. ``told``
    and ``notes`` are what the report then says.
    """

    aged: frozenset[str] = frozenset()
    restored: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()
    told: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything would change."""
        return bool(self.aged or self.restored or self.back)

    def freeze(self) -> dict[str, Any]:
        """Plain values to keep with the state of a training."""
        sets = {name: sorted(getattr(self, name)) for name in ("aged", "restored", "back")}
        return sets | {"told": [*self.told], "notes": [*self.notes]}

    @classmethod
    def thaw(cls, frozen: Mapping[str, Any]) -> Turn:
        """The turn that was frozen; of nothing, none."""
        aged, restored, back = (frozenset(frozen.get(n, ())) for n in ("aged", "restored", "back"))
        told, notes = (tuple(frozen.get(name, ())) for name in ("told", "notes"))
        return cls(aged, restored, back, told, notes)


@dataclass(frozen=True, slots=True)
class Plan:
    """One attempt: what it starts from, whether it imitates, for how long, what it is without.

    ``imitation`` is the least weight of the chosen answers' NLL, whatever the settings say, and
    ``longer`` how many times as many epochs it trains.

    ``looks`` counts the candidates that the attempts before might have led to, beside this one: a
    proof on the same held-out judgements must pay for as many. Of the last one of these attempts,
    that were ``choices``, with this one among them. ``aside`` are the ids of all
    examples that are set aside, ``aged`` of those aged out, by this update or before, and
    ``restored`` of those that count again. ``waits`` are those ``aside`` that showed no gain, and
    wait for the next update if the attempt without them is refused. ``without`` says in words what
    of the new examples the attempt is without. ``changed``, ``undecided``, ``notes`` and ``turn``
    are those of :class:`~agentpref.changes.Changes`, and ``told`` are the attempts before this one.
    """

    number: int = 1
    start: Literal["live", "base"] = "live"
    longer: int = 1
    looks: int = 0
    imitation: float = field(default=0.0, kw_only=True)
    choices: int = field(default=1, kw_only=True)
    waits: frozenset[str] = field(default=frozenset(), kw_only=True)
    aside: frozenset[str] = frozenset()
    aged: frozenset[str] = frozenset()
    restored: frozenset[str] = frozenset()
    undecided: frozenset[str] = frozenset()
    without: tuple[str, ...] = ()
    changed: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    told: tuple[dict[str, Any], ...] = ()
    turn: Turn = field(default_factory=Turn)

    def turned(self) -> Plan:
        """The plan of the next attempt, in which the old evidence yields."""
        return replace(
            self,
            number=self.number + 1,
            looks=self.looks + 1,
            choices=1,
            aside=self.aside - self.turn.back,
            aged=(self.aged | self.turn.aged) - self.turn.restored,
            restored=self.restored | self.turn.restored,
            changed=(*self.changed, *self.turn.told),
            notes=(*self.notes, *self.turn.notes),
            turn=Turn(),
        )

    def freeze(self) -> dict[str, Any]:
        """Plain values to keep with the state of its training."""
        sets = {name: sorted(getattr(self, name)) for name in _SETS}
        lists = {name: [*getattr(self, name)] for name in _LISTS}
        numbers: dict[str, float] = {"attempt": self.number, "looks": self.looks}
        numbers["longer"] = self.longer
        numbers["choices"] = self.choices
        numbers["imitation"] = self.imitation
        return numbers | {"start": self.start, "turn": self.turn.freeze()} | sets | lists

    @classmethod
    def thaw(cls, frozen: Mapping[str, Any]) -> Plan:
        """The plan that was frozen; of nothing, which older versions kept, the first attempt."""
        sets: dict[str, Any] = {name: frozenset(frozen.get(name, ())) for name in _SETS}
        lists: dict[str, Any] = {name: tuple(frozen.get(name, ())) for name in _LISTS}
        return cls(
            frozen.get("attempt", 1),
            frozen.get("start", "live"),
            frozen.get("longer", 1),
            frozen.get("looks", 0),
            **sets,
            **lists,
            imitation=frozen.get("imitation", 0.0),
            choices=frozen.get("choices", 1),
            turn=Turn.thaw(frozen.get("turn", {})),
        )


def follow_up(
    plan: Plan,
    checks: Sequence[CheckResult],
    new: Scores,
    available: Available,
    was_tried: Callable[[], Collection[str]],
    *,
    can_refit: bool,
    can_imitate: bool,
    confidence: float,
    odd: Collection[str] = (),
) -> tuple[Plan, str] | None:
    """The attempt after one that was refused, and why it follows; ``None`` if none would help.

    Args:
        plan: what was tried.
        checks: the gate's.
        new: how right live and the candidate are about the new held-out examples.
        available: what there was to learn.
        was_tried: ids of the examples that earlier updates tried.
        can_refit: whether a refit from the base is possible and would be another start.
        can_imitate: whether there are chosen answers, and the loss has a weight for their NLL.
        confidence: of the exact tests.
        odd: the tags whose chosen answers nobody can have meant.
    """
    if plan.number == MOST:
        return None
    if odd and (without := _without_odd(plan, available, odd)) is not None:
        return without
    if plan.turn and not odd:
        return plan.turned(), "people changed their minds, so the older evidence yields"
    failed, whys, following = [one for one in checks if not one.passed], list[str](), plan
    can_refit = can_refit and not odd  # which would be odd from there, too
    why = _to_refit(failed, available) if can_refit and plan.start == "live" else ""
    if why:
        whys.append(f"{why}, so base is refitted on everything that still counts")
        following = replace(following, start="base", looks=following.looks + 1)
    names = {one.name for one in failed}
    if names & _MISWRITTEN and names <= {*_MISWRITTEN, _GAIN} and not odd:
        why = "hardly written" if names & _NOT_WRITTEN else "written without the form of answers"
        if can_imitate and not plan.imitation:
            whys.append(
                f"it was ranked and {why}, so it imitates the chosen answers, too (weight of "
                f"their NLL: {IMITATION:g} or more)"
            )
            following = replace(following, imitation=IMITATION, looks=following.looks + 1)
        elif names & _NOT_WRITTEN and plan.longer == 1:
            whys.append(f"it was ranked and {why}, so it trains {LONGER} times as long")
            following = replace(following, longer=LONGER, looks=following.looks + 1)
    # The penalty takes its time: three times as long, an imitation was a third nearer to the base.
    is_far = bool(names) and all(name.startswith(_KL) for name in names - {_GAIN})
    if is_far and names != {_GAIN} and plan.imitation and plan.longer == 1 and not whys:
        whys.append(f"imitation spent the KL budget, so it trains {LONGER} times as long")
        following = replace(following, longer=LONGER, looks=following.looks + 1)
    at_fault = faulty(failed, new, available, odd, was_tried, confidence=confidence)
    if at_fault is not None:
        whys.append(f"once more without {'; '.join(at_fault.words)}")
        following = replace(
            following,
            aside=plan.aside | at_fault.examples,
            without=(*plan.without, *at_fault.words),
            looks=following.looks + at_fault.choices,
        )
    if not whys:
        return None
    choices = following.looks - plan.looks
    return replace(following, number=plan.number + 1, choices=choices), "; ".join(whys)


def _to_refit(failed: Sequence[CheckResult], available: Available) -> str:
    """Why a refit from the base may help; empty if nothing says so."""
    if any(one.name.startswith(_KL) for one in failed):
        return "the KL budget is spent"
    tags = {one.tag for one in (*available.new, *available.new_held_out)}
    is_old = failed and all(one.name.startswith(_RETENTION) for one in failed)
    return "what live knew in other tags was lost" if is_old and not _lost(failed, tags) else ""


def narrowed(
    plan: Plan,
    new: Scores,
    available: Available,
    was_tried: Callable[[], Collection[str]],
    *,
    confidence: float,
) -> tuple[Plan, str] | None:
    """The attempt after one that proved too little, and why it follows; ``None`` for none.

    It is without what shows no gain (:func:`idle`). The arguments are those of :func:`follow_up`.
    """
    found = None if plan.number == MOST else idle(new, available, was_tried, confidence=confidence)
    if found is None or found.examples.issuperset(one.example_id for one in available.new):
        return None
    following = replace(
        plan,
        number=plan.number + 1,
        looks=plan.looks + found.choices,
        choices=found.choices,
        aside=plan.aside | found.examples,
        waits=plan.waits | found.examples,
        without=(*plan.without, *found.words),
    )
    return following, f"the rest may prove more, so once more without {'; '.join(found.words)}"


def _without_odd(plan: Plan, available: Available, odd: Collection[str]) -> tuple[Plan, str] | None:
    """The attempt without tags that nobody can mean; ``None`` if nothing else is new.

    Whatever else failed, these may have caused it, and what they contradict does not yield to them.
    Which tags they are is read off the labels, so that no other candidate could have followed.
    """
    fresh = (*available.new, *available.new_held_out)
    examples = frozenset(one.example_id for one in fresh if one.tag in odd)
    tags = sorted({one.tag for one in fresh if one.tag in odd})
    if not tags or len(examples) == len(fresh):
        return None
    words = tuple(f"tag {tag} (nobody can mean what is chosen there)" for tag in tags)
    contradicts = any(told["tag"] in odd for told in plan.turn.told)
    following = replace(
        plan,
        number=plan.number + 1,
        looks=plan.looks + 1,
        aside=plan.aside | examples,
        turn=Turn() if contradicts else plan.turn,
        without=(*plan.without, *words),
    )
    return following, f"once more without {'; '.join(words)}"


def following(told: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Says which attempts were refused, and what followed, for the notes of a report."""
    for one in told:
        if "next" in one:
            names = ", ".join(failure.partition(":")[0] for failure in one["failed"])
            yield f"attempt {one['attempt']}, from {one['start']}, failed ({names}); {one['next']}"


class AtFault(NamedTuple):
    """New examples that failed, in words and by their ids.

    ``choices`` counts the sets of groups that could have been at fault instead.
    """

    words: tuple[str, ...]
    examples: frozenset[str]
    choices: int


def faulty(
    failed: Sequence[CheckResult],
    new: Scores,
    available: Available,
    odd: Collection[str],
    was_tried: Callable[[], Collection[str]],
    *,
    confidence: float,
) -> AtFault | None:
    """The new examples that failed; ``None`` if all did, or none."""
    fresh = (*available.new, *available.new_held_out)
    for kind, groups in _ways(fresh, was_tried, odd):
        lost = _lost(failed, groups) if kind == "tag" else ()
        faults = {}
        for name, ids in sorted(groups.items()):
            why = _fault(new.paired(_numbers(new, ids)), 1 - confidence)
            if name in lost:
                why = "what live knew of it was lost"
            if name == _JUDGES and any(one.name == PEOPLE for one in failed):
                why = "what people said was lost"
            if why is not None and name != _FRESH:
                faults[name] = why
        if 0 < len(faults) < len(groups):
            words = tuple(f"{kind} {name} ({why})" for name, why in faults.items())
            examples = frozenset().union(*(groups[name] for name in faults))
            return AtFault(words, examples, 2 ** min(len(groups), _MOST_GROUPS) - 2)
    return None


def idle(
    new: Scores,
    available: Available,
    was_tried: Callable[[], Collection[str]],
    *,
    confidence: float,
) -> AtFault | None:
    """The new examples that a candidate shows no gain in, while the others alone show one.

    ``None`` if there are none. No gain is shown where no more of the held-out prompts became better
    than worse, and the candidate is right about no more of them than a coin may be. The groups that
    could be meant, in each way to split them, are those with enough prompts to say so.
    """
    level, choices = 1 - confidence, 0
    fresh = (*available.new, *available.new_held_out)
    for kind, groups in _ways(fresh, was_tried):
        parts = {name: new.paired(_numbers(new, ids)) for name, ids in sorted(groups.items())}
        large = [n for n in parts if n != _FRESH and len(set(parts[n].prompts)) >= FEWEST]
        choices += max(0, 2 ** min(len(large), _MOST_GROUPS) - 1 - (len(large) == len(groups)))
        found = {name: why for name in large if (why := _no_gain(parts[name], level))}
        examples = frozenset[str]().union(*(groups[name] for name in found))
        others = _numbers(new, {one.example_id for one in fresh} - examples)
        rest = Signs.of(new.paired(others, matched=True))
        if found and rest.chance_of_gain() <= level:
            words = tuple(f"{kind} {name} ({why})" for name, why in found.items())
            return AtFault(words, examples, choices)
    return None


def _no_gain(paired: Paired, level: float) -> str | None:
    """Says that no gain is shown on some prompts; ``None`` if one is, or little is left to gain."""
    changed = Signs.of(paired)
    right = Signs.of(replace(paired, live=(0.5,) * len(paired)))
    if changed.better > changed.worse or right.chance_of_gain() <= level:
        return None
    return f"no gain: right about {right.better} of {right.prompts} held-out prompts"


def _numbers(new: Scores, ids: Collection[str]) -> list[int]:
    """The numbers of the rows of some examples."""
    return [n for n, row in enumerate(new.rows) if row.example.example_id in ids]


def only_undecided(plan: Plan, result: GateResult) -> bool:
    """Whether nothing failed but to keep what people may think otherwise of now.

    Then nobody can say yet whether the candidate forgot or learned, and more judgements will. If a
    gain is refuted, they are not worth waiting for.
    """
    failed = [one for one in result.checks if not one.passed and one.name != _GAIN]
    strata = [one for one in failed if one.name.startswith(_RETENTION) and "/" in one.name]
    together = [one for one in failed if one.name == f"{_RETENTION}all strata together"]
    return (
        bool(strata)
        and not result.refuted
        and len(strata) + len(together) == len(failed)
        and all(_lost([one], plan.undecided) for one in strata)
    )


def _lost(failed: Iterable[CheckResult], tags: Collection[str]) -> set[str]:
    """The tags of the strata that failed; these are named namespace/tag/origin/age."""
    ends = {one.name.rsplit("/", 2)[0] for one in failed if one.name.startswith(_RETENTION)}
    return {tag for tag in tags if any(end.endswith(f"/{tag}") for end in ends)}


def _ways(
    fresh: Sequence[Listed], was_tried: Callable[[], Collection[str]], odd: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """The ways to split new examples in which some may be at fault and others not.

    Each is its name and the ids of its groups, none where it does not split them. Where all tags
    are such as nobody can mean, none of them is better than another. What people judged is not
    split by how they did it. Coin labels make corrections only of what live does not say itself,
    so "the opposite" would be proven on these alone.
    """

    def by(key: Callable[[Listed], str]) -> dict[str, set[str]]:
        groups: dict[str, set[str]] = {}
        for one in fresh:
            groups.setdefault(key(one), set()).add(one.example_id)
        return groups if len(groups) > 1 else {}

    if not odd:
        yield "tag", by(lambda one: one.tag)
    yield "source", by(lambda one: _JUDGES if one.origin in BY_JUDGES else "people")
    tried = was_tried()
    yield "what", by(lambda one: "an earlier update tried" if one.example_id in tried else _FRESH)


def _fault(paired: Paired, level: float) -> str | None:
    """What is wrong with a group, by its held-out examples; ``None`` if nothing is shown."""
    changes = by_prompt(
        (prompt, 0.0, (1 + after - before) / 2)
        for prompt, before, after in zip(paired.prompts, paired.live, paired.candidate, strict=True)
    )
    right = by_prompt(
        (prompt, 0.0, after) for prompt, after in zip(paired.prompts, paired.candidate, strict=True)
    )
    gains, rights = sum(one.right for one in changes), sum(one.right for one in right)
    if more_than_chance(len(changes) - gains, len(changes)) <= level:
        return f"{len(changes) - gains} held-out prompts lost, {gains} gained"
    no_gain = more_than_chance(gains, len(changes)) > level
    if len(right) >= FEWEST and no_gain and more_than_chance(rights, len(right)) > level:
        return f"no gain: right about {rights} of {len(right)} held-out prompts"
    return None
