"""What an update's report says became of every example.

Each example that there is ends in one group of :func:`account`, so the counts of a report add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.learn.data import Available, UpdateRows
from agentpref.models.reasons import Objection, explained
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.strata import Listed
from agentpref.record.updates import Role
from agentpref.types import Example, UpdateReport, Verdict

if TYPE_CHECKING:
    from agentpref.learn.learner import Learner


def take_stock(
    catalog: Catalog,
    learned: Container[str],
    config: UpdateConfig,
    *,
    aside: Container[str] = frozenset(),
    aged: Container[str] = frozenset(),
) -> tuple[Available, dict[str, int]]:
    """List all examples there are by use, and count what makes none by reason.

    ``learned`` holds the ids that the live revision has learned, of which the ``aged`` ones no
    longer count; ``aside`` those that earlier updates set aside.
    """
    listed, left_out = catalog.entries(), catalog.left_out()
    if not config.thumbs.weight:
        pairs = [entry for entry in listed if not entry.lone]
        if len(pairs) < len(listed):
            left_out["thumbs_turned_off"] = len(listed) - len(pairs)
        listed = pairs
    exam = frozenset(config.held_out_tags)
    split = Available.split(listed, learned, catalog.read, aside=aside, aged=aged, exam=exam)
    return split, left_out


def count(**groups: Sequence[Listed]) -> dict[str, int]:
    """Count groups of examples: those with completions to compare, and lone thumbs beside them.

    Decisions of conversations are counted where there are any.

    >>> count(new=())
    {'new': 0, 'new_thumbs': 0}
    """
    counts: dict[str, int] = {}
    for name, examples in groups.items():
        decisions = sum(example.origin == "decision" and example.lone for example in examples)
        thumbs = sum(example.lone for example in examples) - decisions
        counts |= {name: len(examples) - thumbs - decisions, f"{name}_thumbs": thumbs}
        if decisions:
            counts[f"{name}_decisions"] = decisions
    return counts


def there(available: Available) -> dict[str, int]:
    """Count what there is by use. What was aged out is old: live has learned it."""
    old = [*available.old, *(one for one in available.aged if not one.held_out)]
    old_held_out = [*available.old_held_out, *(one for one in available.aged if one.held_out)]
    exam = {"exam": available.exam} if available.exam else {}
    return count(
        new=available.new,
        old=old,
        new_held_out=available.new_held_out,
        old_held_out=old_held_out,
        **exam,
    )


def account(
    available: Available,
    rows: UpdateRows,
    objections: Mapping[str, Objection],
    *,
    before: Available | None = None,
) -> dict[str, tuple[Listed, ...]]:
    """Say of every example that there is what the update did with it; each is in one group.

    Of ordinary answers, which are drawn from a log without a list, those that were drawn are.

    Examples that the update has read are whole, and the others are listed.

    Args:
        available: all examples there are.
        rows: what was trained and evaluated.
        objections: to examples that could not be encoded, by their ids.
        before: the same as it was before this update; else nothing was set aside or aged out by it.
    """
    groups = {
        "trained": rows.new,
        "replayed": rows.old,
        "new_evaluated": rows.new_held_out,
        "old_evaluated": rows.old_held_out,
        "known": rows.known,
    }
    found: dict[str, tuple[Listed, ...]] = {
        name: tuple(row.example for row in group) for name, group in groups.items()
    }
    used = {example.example_id for group in found.values() for example in group}
    fresh, read = available.fresh, {example.example_id: example for example in rows.data.all()}
    unused = [read.get(e.example_id, e) for e in available.all() if e.example_id not in used]
    found["left_out"] = tuple(e for e in unused if e.example_id in objections)
    unused = [e for e in unused if e.example_id not in objections]
    for name, now, then in (
        ("set_aside", available.aside, (before or available).aside),
        ("aged_out", available.aged, (before or available).aged),
    ):
        ids = {e.example_id for e in now}
        known = {e.example_id for e in then}
        mine = [e for e in unused if e.example_id in ids]
        found[name] = tuple(e for e in mine if e.example_id not in known)
        found[f"still_{name}"] = tuple(e for e in mine if e.example_id in known)
        unused = [e for e in unused if e.example_id not in ids]
    found["waiting"] = tuple(e for e in unused if e.example_id in fresh)
    found["not_drawn"] = tuple(e for e in unused if e.example_id not in fresh)
    found["exam"] = available.exam
    return found | _ordinary(rows)


def _ordinary(rows: UpdateRows) -> dict[str, tuple[Listed, ...]]:
    """What became of the ordinary answers that were drawn; none of them counts as learned."""
    found: dict[str, tuple[Listed, ...]] = {
        "anchored": tuple(row.example for row in rows.ordinary if row.advised is None),
        "taught": tuple(row.example for row in rows.ordinary if row.advised is not None),
        "anchored_held_out": tuple(row.example for row in rows.ordinary_held_out),
    }
    used = {example.example_id for group in found.values() for example in group}
    left = tuple(e for e in rows.data.ordinary if e.example_id not in used)
    return found | {"anchored_left_out": left}


def uses(
    groups: Mapping[str, Sequence[Listed]], verdict: Verdict = "passed"
) -> tuple[dict[str, Role], dict[str, tuple[str, ...]]]:
    """What the ledger keeps of an update: what it used each example for, and their sources.

    What was new to an update that was refused is set aside; and known, where nothing was to gain.
    What shows no gain in a candidate that passed is set aside, though it trained.
    """
    fates: dict[Verdict, Role] = {"refused": "set_aside", "nothing_to_gain": "known"}
    fate = fates.get(verdict)
    roles: dict[str, Role] = {
        "restored": "restored",  # unless it is replayed, which says as much
        "trained": fate or "new",
        "new_evaluated": fate or "held_out",
        "replayed": "replay",
        "known": "known",
        "left_out": "left_out",
        "waiting": "waiting",
        "set_aside": "set_aside",
        "aged_out": "aged_out",
        "anchored": "anchor",
        "valued": "anchor",  # a decision that weighs nothing, and decided what others weigh
        "taught": "anchor",
        "anchored_held_out": "anchor_held_out",
    }
    used = [(role, e) for group, role in roles.items() for e in groups.get(group, ())]
    idle: dict[str, Role] = {
        e.example_id: "set_aside" if e.held_out else "trained_aside" for e in groups.get("idle", ())
    }
    read = [e for _, e in used if isinstance(e, Example)]  # the ledger has those of the others
    return (
        {e.example_id: role for role, e in used} | idle,
        {e.example_id: e.provenance for e in read},
    )


def with_account(
    report: UpdateReport, learner: Learner, groups: Mapping[str, Sequence[Listed]]
) -> UpdateReport:
    """The report with what becomes of every example, and with what was not used as logged."""
    objections = {e.example_id: learner.objections[e.example_id] for e in groups["left_out"]}
    always = {"trained", "replayed", "new_evaluated", "old_evaluated"}
    ordinary = {
        name: len(group)
        for name, group in groups.items()
        if name.startswith("anchored") or (name == "taught" and group)
    }
    untold = ("left_out", "restored", "taught", *ordinary)
    told = {k: v for k, v in groups.items() if k not in untold}
    used = {k: v for k, v in told.items() if v or k in always}
    reasons = Counter(objection.reason for objection in objections.values())
    return replace(
        report,
        counts=report.counts | count(**used) | (ordinary if any(ordinary.values()) else {}),
        left_out={**report.left_out, **reasons},
        shortened=dict(learner.shortened),
        retokenized=dict(learner.retokenized),
        base=learner.base.identity,
        notes=[*report.notes, *learner.notes(), *explained(objections, report.model)],
    )
