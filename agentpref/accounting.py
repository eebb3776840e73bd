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
from agentpref.types import Example, UpdateReport

if TYPE_CHECKING:
    from agentpref.learn.learner import Learner


def take_stock(
    catalog: Catalog, learned: Container[str], config: UpdateConfig
) -> tuple[Available, dict[str, int]]:
    """List all examples there are by use, and count what makes none by reason.

    ``learned`` holds the ids that the live revision has learned.
    """
    listed, left_out = catalog.entries(), catalog.left_out()
    if not config.thumbs.weight:
        pairs = [entry for entry in listed if not entry.lone]
        if len(pairs) < len(listed):
            left_out["thumbs_turned_off"] = len(listed) - len(pairs)
        listed = pairs
    return Available.split(listed, learned, catalog.read), left_out


def count(**groups: Sequence[Listed]) -> dict[str, int]:
    """Count groups of examples: those with completions to compare, and lone thumbs beside them.

    >>> count(new=())
    {'new': 0, 'new_thumbs': 0}
    """
    counts: dict[str, int] = {}
    for name, examples in groups.items():
        thumbs = sum(example.lone for example in examples)
        counts |= {name: len(examples) - thumbs, f"{name}_thumbs": thumbs}
    return counts


def account(
    available: Available, rows: UpdateRows, objections: Mapping[str, Objection]
) -> dict[str, tuple[Listed, ...]]:
    """Say of every example that there is what the update did with it; each is in one group.

    Of ordinary answers, which are drawn from a log without a list, those that were drawn are.

    Examples that the update has read are whole, and the others are listed.

    Args:
        available: all examples there are.
        rows: what was trained and evaluated.
        objections: to examples that could not be encoded, by their ids.
    """
    groups = {
        "trained": rows.new,
        "replayed": rows.old,
        "new_evaluated": rows.new_held_out,
        "old_evaluated": rows.old_held_out,
    }
    found: dict[str, tuple[Listed, ...]] = {
        name: tuple(row.example for row in group) for name, group in groups.items()
    }
    used = {example.example_id for group in found.values() for example in group}
    fresh, read = available.fresh, {example.example_id: example for example in rows.data.all()}
    unused = [read.get(e.example_id, e) for e in available.all() if e.example_id not in used]
    found["left_out"] = tuple(e for e in unused if e.example_id in objections)
    unused = [e for e in unused if e.example_id not in objections]
    found["waiting"] = tuple(e for e in unused if e.example_id in fresh)
    found["not_drawn"] = tuple(e for e in unused if e.example_id not in fresh)
    return found | _ordinary(rows)


def _ordinary(rows: UpdateRows) -> dict[str, tuple[Listed, ...]]:
    """What became of the ordinary answers that were drawn; none of them counts as learned."""
    found: dict[str, tuple[Listed, ...]] = {
        "anchored": tuple(row.example for row in rows.ordinary),
        "anchored_held_out": tuple(row.example for row in rows.ordinary_held_out),
    }
    used = {example.example_id for group in found.values() for example in group}
    left = tuple(e for e in rows.data.ordinary if e.example_id not in used)
    return found | {"anchored_left_out": left}


def uses(
    groups: Mapping[str, Sequence[Listed]],
) -> tuple[dict[str, Role], dict[str, tuple[str, ...]]]:
    """What the ledger keeps of an update: what it used each example for, and their sources."""
    roles: dict[str, Role] = {
        "trained": "new",
        "new_evaluated": "held_out",
        "replayed": "replay",
        "left_out": "left_out",
        "waiting": "waiting",
        "anchored": "anchor",
        "anchored_held_out": "anchor_held_out",
    }
    used = [(role, e) for group, role in roles.items() for e in groups[group]]
    read = [e for _, e in used if isinstance(e, Example)]  # the ledger has those of the others
    return (
        {e.example_id: role for role, e in used},
        {e.example_id: e.provenance for e in read},
    )


def with_account(
    report: UpdateReport, learner: Learner, groups: Mapping[str, Sequence[Listed]]
) -> UpdateReport:
    """The report with what becomes of every example, and with what was not used as logged."""
    objections = {e.example_id: learner.objections[e.example_id] for e in groups["left_out"]}
    rare = {"waiting", "not_drawn"}  # of no interest where there are none
    ordinary = {name: len(group) for name, group in groups.items() if name.startswith("anchored")}
    used = {
        name: group
        for name, group in groups.items()
        if name != "left_out" and name not in ordinary and (group or name not in rare)
    }
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
