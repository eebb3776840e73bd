"""TRL's preference formats.

Read are the preference format (``chosen`` and ``rejected``, the prompt explicit or the beginning
that both share) and the unpaired one (``prompt``, ``completion``, ``label``), each in text or in
messages. Written are messages with an explicit prompt. ``tools`` and ``tag`` are kept, any other
column is passed over. Messages are written as they were recorded, so that nothing is lost.

Pure functions from rows to values and back.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.rows import (
    Fields,
    PreferenceRow,
    UnpairedRow,
    answer_of,
    common_start,
    tag_of,
    tools_of,
    turns,
)
from agentpref.record.messages import prompt_of
from agentpref.types import Message, Pair, Prompt, Thumb

PREFERENCE_COLUMNS = {
    "prompt": ["json"],
    "chosen": ["json"],
    "rejected": ["json"],
    "tools": ["json"],
    "tag": "text",
}
UNPAIRED_COLUMNS = {
    "prompt": ["json"],
    "completion": ["json"],
    "label": "flag",
    "tools": ["json"],
    "tag": "text",
}


def read_preference(row: Fields) -> PreferenceRow:
    """Read two answers to one prompt.

    Raises:
        ExchangeError, InvalidMessage: something in the row is not what it should be.
    """
    if "prompt" not in row and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        _require_no_prompt(row)
        row = {**row, **_split_text(row["chosen"], row["rejected"])}
    chosen = turns(row["chosen"], "chosen", role="assistant")
    rejected = turns(row["rejected"], "rejected", role="assistant")
    shared = common_start(chosen, rejected, names=("chosen", "rejected"))
    return PreferenceRow(_prompt(row, shared), answer_of(chosen), answer_of(rejected), tag_of(row))


def read_unpaired(row: Fields) -> UnpairedRow:
    """Read one answer and whether it was liked; errors as in :func:`read_preference`."""
    label = row["label"]
    if label not in (True, False):
        raise ExchangeError(
            f"'label' is {reprlib.repr(label)}; write true for a good answer, false for a bad one"
        )
    completion = turns(row["completion"], "completion", role="assistant")
    prompt = _prompt(row, completion[:-1])
    return UnpairedRow(prompt, answer_of(completion), bool(label), tag_of(row))


def write_preference(pair: Pair) -> dict[str, Any]:
    """Write a pair as a row of the conversational preference format."""
    answers = {"chosen": [pair.chosen], "rejected": [pair.rejected]}
    return {"prompt": pair.prompt.messages, **answers, **_extras(pair)}


def write_unpaired(thumb: Thumb) -> dict[str, Any]:
    """Write a thumb as a row of the conversational unpaired format."""
    judged = {"completion": [thumb.completion], "label": thumb.desirable}
    return {"prompt": thumb.prompt.messages, **judged, **_extras(thumb)}


def _extras(of: Pair | Thumb) -> dict[str, Any]:
    return {"tag": of.tag} | ({"tools": of.prompt.tools} if of.prompt.tools else {})


def _require_no_prompt(row: Fields) -> None:
    """Refuse to look for a prompt in the answers where it stands under another name."""
    named = next((key for key in ("question", "query", "instruction", "input") if key in row), None)
    if named is not None:
        raise ExchangeError(f"the row has no 'prompt' but a {named!r}; rename it to 'prompt'")


def _split_text(chosen: str, rejected: str) -> dict[str, str]:
    """Part two texts from the beginning they share, at its last space, as a prompt.

    TRL parts them at the first letter that differs, which may be within a word.
    """
    alike = takewhile(lambda letters: letters[0] == letters[1], zip(chosen, rejected, strict=False))
    shared = "".join(letter for letter, _ in alike)
    cut = max((i + 1 for i, letter in enumerate(shared) if letter.isspace()), default=len(shared))
    answers = {"chosen": chosen[cut:].lstrip(), "rejected": rejected[cut:].lstrip()}
    prompt = shared[:cut].strip()
    if not (prompt and all(answers.values())) or chosen == rejected:
        raise ExchangeError(
            "the row has no 'prompt', and 'chosen' and 'rejected' are not two answers after one "
            "beginning; write the prompt in a column 'prompt'"
        )
    return {"prompt": prompt, **answers}


def _prompt(row: Fields, shared: Sequence[Message]) -> Prompt:
    """Join the prompt column and the turns that the answers share, which may repeat it."""
    given = row.get("prompt", [])
    asked = turns(given, "prompt", role="user") if given else []
    repeated = shared and (isinstance(given, str) or list(shared[: len(asked)]) == asked)
    messages = list(shared) if repeated else [*asked, *shared]
    if not messages:
        raise ExchangeError("the row has no prompt; write it in a column 'prompt'")
    return prompt_of(messages, tools_of(row))
