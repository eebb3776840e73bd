"""TRL's formats: preference and unpaired preference.

A preference row has ``chosen`` and ``rejected``, and a ``prompt`` unless both begin with it. An
unpaired row has ``prompt``, ``completion`` and ``label``. Each may be text or messages. ``tools``
and ``tag`` are kept, other columns are ignored. Rows are written as messages with an explicit
prompt, exactly as they were recorded.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import (
    Fields,
    Format,
    PreferenceRecord,
    chosen_and_rejected,
    record_of_row,
    require,
    shared_start,
    turns,
)
from agentpref.types import Message


def read_preference(row: Fields) -> PreferenceRecord:
    """Read two answers to one prompt."""
    if "prompt" not in row and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        row = {**row, **_split_text(row)}
    shared, answers = shared_start(row, "chosen", "rejected")
    return record_of_row(row, _asked(row, shared), answers)


def read_unpaired(row: Fields) -> PreferenceRecord:
    """Read one answer and whether it was liked."""
    label = row["label"]
    require(label in (True, False), "'label'", label, "write true for a good answer, or false")
    *shared, answer = turns(row["completion"], "completion", role="assistant")
    return record_of_row(row, _asked(row, shared), [answer], (int(label),))


def write_preference(record: PreferenceRecord) -> dict[str, Any]:
    """Write a pair; the format holds every message."""
    chosen, rejected = chosen_and_rejected(record)
    return _row(record, chosen=[chosen], rejected=[rejected])


def write_unpaired(record: PreferenceRecord) -> dict[str, Any]:
    """Write a completion that was judged by itself; the format holds every message."""
    cure = "choose another format, such as 'preference': this one holds one completion"
    require(len(record.labels) == 1, "its list of labels", record.labels, cure)
    return _row(record, completion=[*record.completions], label=record.labels[0] == 1)


def _row(record: PreferenceRecord, **judged: Any) -> dict[str, Any]:
    tools = {"tools": record.prompt.tools} if record.prompt.tools else {}
    return {"prompt": record.prompt.messages, **judged, "tag": record.tag, **tools}


def _split_text(row: Fields) -> dict[str, str]:
    """Split two texts into the prompt that both begin with, up to its last space, and the rest.

    TRL splits at the first letter that differs, which may be inside a word.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    for key in ("question", "query", "instruction", "input"):
        if key in row:
            raise ExchangeError(f"the row has no 'prompt' but a {key!r}; rename it to 'prompt'")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = "".join(letter for letter, _ in alike)
    words = re.match(r".*\s", shared, re.DOTALL)
    start = words[0] if words else shared
    answers = {side: row[side][len(start) :].lstrip() for side in ("chosen", "rejected")}
    if not (start.strip() and all(answers.values())) or chosen == rejected:
        raise ExchangeError(
            "the row has no 'prompt', and 'chosen' and 'rejected' are not two answers after one "
            "beginning; write the prompt in a column 'prompt'"
        )
    return {"prompt": start.strip(), **answers}


def _asked(row: Fields, shared: list[Message]) -> list[Message]:
    """Join the prompt and the turns that the answers share, which may repeat the prompt."""
    given = row.get("prompt")
    asked = turns(given, "prompt", role="user") if given else []
    repeated = shared and (isinstance(given, str) or shared[: len(asked)] == asked)
    messages = shared if repeated else [*asked, *shared]
    if not messages:
        raise ExchangeError("the row has no prompt; write it in a column 'prompt'")
    return messages


_MORE = {"tools": ["json"], "tag": "text"}

PREFERENCE = Format(
    shapes=(("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    read=read_preference,
    write=write_preference,
    columns={"prompt": ["json"], "chosen": ["json"], "rejected": ["json"], **_MORE},
)
UNPAIRED = Format(
    shapes=(("prompt", "completion", "label"),),
    read=read_unpaired,
    write=write_unpaired,
    columns={"prompt": ["json"], "completion": ["json"], "label": "flag", **_MORE},
    completions=1,
)
