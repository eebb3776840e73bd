"""What to label next: how large a loss in each tag the gate would not see, for want of evidence.

What live has learned of a tag is protected by its held-out prompts: the fewer there are, the larger
a loss has to be to be told from chance (``prove/retention.py``). What was set aside or aged out
proves nothing, and nor do thumbs of one kind.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agentpref.config import GateSettings
from agentpref.learn.losses.kto import is_liked
from agentpref.prefer.catalog import Catalog, Entry
from agentpref.prove.retention import retention_margin
from agentpref.record import asides
from agentpref.record.journal import Entry as Update
from agentpref.types import HELD_OUT

_THUMBS_READ = 256
"""Of the thumbs of a tag, so many are read to know how many are likes."""

_GATE = ("confidence", "flip_rate", "retention_margin")


@dataclass
class _Tag:
    """The examples of a tag that count: those trained, held-out prompts of pairs, and thumbs."""

    trained: int = 0
    prompts: set[float] = field(default_factory=set)
    pairs: int = 0
    thumbs: list[Entry] = field(default_factory=list)


def label_next(
    connection: sqlite3.Connection, update: Update, live: str | None
) -> list[dict[str, Any]]:
    """The tags of a namespace, those with the least evidence first.

    ``held_out_prompts`` count as evidence. ``unseen_loss`` is the loss of accuracy from which on
    the gate is sure to refuse, once live has learned the tag; ``None`` if no loss is large enough.
    To judge about ``more`` prompts halves it, since a share of them is held out. ``one_kind`` is
    ``"likes"`` or ``"dislikes"`` where there is nothing else: these train, and prove nothing,
    however many there are. Such tags come last.
    """
    config = update.report.get("config", {})
    share = float(config.get("held_out", HELD_OUT))
    gate = GateSettings(**{n: config["gate"][n] for n in _GATE if n in config.get("gate", {})})
    catalog = Catalog(connection, update.namespace, held_out=share)
    apart = config.get("held_out_tags", ())  # more judgements there would prove nothing
    tags = _tags(connection, update, live, catalog)
    rows = [_row(name, tag, catalog) for name, tag in tags if name not in apart]
    judged = sum(row["held_out_prompts"] > 0 for row in rows)
    for row in rows:
        prompts = row["held_out_prompts"]
        loss = retention_margin(prompts, judged + (judged > 1), gate) if prompts else 1.0
        row["unseen_loss"] = loss if loss < 1 else None
        row["more"] = math.ceil(3 * max(1, prompts) / share)  # it falls as the root of the prompts
    rows.sort(key=lambda row: (row["held_out_prompts"], row["tag"]))
    return sorted(rows, key=lambda row: bool(row["one_kind"]))


def _tags(
    connection: sqlite3.Connection, update: Update, live: str | None, catalog: Catalog
) -> list[tuple[str, _Tag]]:
    """The examples that count, by tag."""
    idle = asides.aged_out(connection, live).union(
        *(refusal.examples for refusal in asides.set_aside(connection, update.namespace))
    )
    query = "SELECT example_id, point FROM example WHERE namespace = ?"
    points: dict[str, float] = dict(connection.execute(query, (update.namespace,)).fetchall())
    found: dict[str, _Tag] = {}
    for entry in catalog.entries():
        if entry.example_id in idle:
            continue
        tag = found.setdefault(entry.tag, _Tag())
        tag.trained += not entry.held_out
        if entry.lone:
            tag.thumbs.append(entry)
        else:
            tag.pairs += 1
            if entry.held_out:
                tag.prompts.add(points[entry.example_id])
    return [*found.items()]


def _row(name: str, tag: _Tag, catalog: Catalog) -> dict[str, Any]:
    some = sorted(tag.thumbs, key=lambda one: (not one.held_out, one.example_id))[:_THUMBS_READ]
    liked = {one.example_id: is_liked(one) for one in catalog.find([e.example_id for e in some])}
    proving = [liked[one.example_id] for one in some if one.held_out and one.example_id in liked]
    kinds = {"likes" if up else "dislikes" for up in liked.values()}
    return {
        "tag": name,
        "trained": tag.trained,
        "held_out_prompts": len(tag.prompts) + _even(proving, sum(e.held_out for e in tag.thumbs)),
        "one_kind": kinds.pop() if len(kinds) == 1 and not tag.pairs else None,
    }


def _even(liked: Sequence[bool], total: int) -> int:
    """How many of ``total`` held-out thumbs count: as many likes as dislikes; ``liked`` are some.

    >>> _even([True, True, True, False], 8)
    4
    """
    rarer = min(sum(liked), len(liked) - sum(liked))
    return round(2 * rarer * total / len(liked)) if liked else 0
