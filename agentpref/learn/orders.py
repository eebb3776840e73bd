"""The contents of orders from a team's main process to its followers, as plain JSON values.

A row is sent as its token ids, its reference log-probs and the fields of its pair or thumb that the
loss reads, without any text. Numbers that may be infinite are written in hexadecimal, to the last
bit.
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
    """Turn a row into plain values."""
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
    """Restore a row that trains and scores like the frozen one; its texts are empty."""
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
    """Turn rows and their reference log-probs into plain values."""
    return [
        {**freeze_row(row.encoded), "reference": [float(logp).hex() for logp in row.reference]}
        for row in rows
    ]


def thaw_training(rows: Sequence[Mapping[str, Any]]) -> list[TrainingRow]:
    """Restore rows with their reference log-probs."""
    return [
        TrainingRow(thaw_row(row), PairLogps(*(float.fromhex(logp) for logp in row["reference"])))
        for row in rows
    ]
