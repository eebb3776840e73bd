"""What the main process of a team tells its followers: plain values that JSON holds.

Of a row go the token ids, its references, and what the loss reads of its pair or thumb; no text
does. Numbers that need not be finite are written in hexadecimal, to the last bit. Knows nothing of
how orders travel, nor of how they are carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentpref.learn.encode import Encoded, EncodedPair, EncodedThumb
from agentpref.learn.logps import PairLogps
from agentpref.learn.objective import TrainingRow
from agentpref.types import Pair, Prompt, Thumb

_NO_PROMPT = Prompt("", ())


def freeze_row(row: Encoded) -> dict[str, Any]:
    """A row as plain values."""
    ids = {"prompt": row.prompt, "completions": row.completions}
    if isinstance(row, EncodedThumb):
        return {**ids, "desirable": row.thumb.desirable, "id": row.thumb.thumb_id}
    pair = row.pair
    return {
        **ids,
        "id": pair.pair_id,
        "origin": pair.origin,
        "weight": pair.weight,
        "noise": pair.noise,
        "by": [pair.chosen_by, pair.rejected_by],
    }


def thaw_row(values: Mapping[str, Any]) -> Encoded:
    """A row that trains and scores as the one that was frozen; its texts are empty."""
    prompt = tuple(values["prompt"])
    first, second = (tuple(ids) for ids in values["completions"])
    if "desirable" in values:
        thumb = Thumb("", "", 0.0, _NO_PROMPT, {}, values["desirable"], thumb_id=values["id"])
        return EncodedThumb(thumb, prompt, first, second)
    chosen_by, rejected_by = values["by"]
    pair = Pair(
        values["id"],
        "",
        0.0,
        _NO_PROMPT,
        {},
        {},
        values["origin"],
        weight=values["weight"],
        noise=values["noise"],
        chosen_by=chosen_by,
        rejected_by=rejected_by,
    )
    return EncodedPair(pair, prompt, first, second)


def freeze_training(rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
    """Rows and their references as plain values."""
    return [
        {**freeze_row(row.encoded), "reference": [float(logp).hex() for logp in row.reference]}
        for row in rows
    ]


def thaw_training(rows: Sequence[Mapping[str, Any]]) -> list[TrainingRow]:
    """Rows to train on, as they were frozen."""
    return [
        TrainingRow(thaw_row(row), PairLogps(*(float.fromhex(logp) for logp in row["reference"])))
        for row in rows
    ]
