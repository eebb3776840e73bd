"""TRL's formats: preference and unpaired preference.

A preference row has ``chosen`` and ``rejected``, and a ``prompt`` unless both begin with it. An
unpaired row has ``prompt``, ``completion`` and ``label``. Each may be text or messages; text may be
a transcript as in HH-RLHF (``Human: …``, ``Assistant: …``), which becomes messages. ``system``
(also ``system_prompt``) goes before the prompt, and ``tools``, ``chat_template_kwargs`` and ``tag``
are kept. Rows are written as messages with an explicit prompt, exactly as they were recorded.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from agentpref.errors import ExchangeError, described
from agentpref.prefer.formats import (
    Fields,
    Format,
    PreferenceRecord,
    alike,
    chosen_and_rejected,
    record_of_row,
    require,
    shared_start,
    turns,
)
from agentpref.types import Message


def read_preference(row: Fields) -> PreferenceRecord:
    """Read two answers to one prompt."""
    row = _without_repeated_prompt(_with_turns(row))
    if "prompt" not in row and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        row = {**row, **_split_text(row)}
    shared, answers = shared_start(row, "chosen", "rejected")
    return record_of_row(row, _briefed(row, _asked(row, shared)), answers)


def read_unpaired(row: Fields) -> PreferenceRecord:
    """Read one answer and whether it was liked."""
    row, label = _with_turns(row), row["label"]
    require(label in (True, False), "'label'", label, "write true for a good answer, or false")
    *shared, answer = turns(row["completion"], "completion", role="assistant")
    return record_of_row(row, _briefed(row, _asked(row, shared)), [answer], (int(label),))


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
    prompt = record.prompt
    more = {"tools": prompt.tools, "chat_template_kwargs": prompt.chat_template_kwargs}
    given = {key: value for key, value in more.items() if value}
    return {"prompt": prompt.messages, **judged, "tag": record.tag, **given}


def _without_repeated_prompt(row: Fields) -> Fields:
    """Cut a prompt in text that both answers, in text, begin with."""
    told = [row.get(key) for key in ("prompt", "chosen", "rejected")]
    if not all(isinstance(text, str) for text in told):
        return row
    prompt, *answers = (str(text).strip() for text in told)
    after = [answer[len(prompt) :] for answer in answers if answer.startswith(prompt)]
    if not prompt or len(after) < 2 or not all(text[:1].isspace() for text in after):
        return row
    return {**row, **dict(zip(("chosen", "rejected"), map(str.lstrip, after), strict=True))}


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


def _with_turns(row: Fields) -> Fields:
    """Turn transcripts into messages: whole ones, and prompts that end before the answer."""
    told = {
        key: _transcript(row[key], key)
        for key in ("prompt", "chosen", "rejected", "completion")
        if isinstance(row.get(key), str) and row[key].lstrip().startswith("Human:")
    }
    return {**row, **{key: messages for key, messages in told.items() if messages}}


def _transcript(text: str, key: str) -> list[Message]:
    """Read a transcript; nothing if a text is none, although it begins like one."""
    _, *parts = _SPEAKER.split(text.replace("\r\n", "\n").strip())
    messages: list[Message] = [
        {"role": {"Human": "user", "Assistant": "assistant"}[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    last = messages[-1]
    if key == "prompt":
        return messages[:-1] if last["role"] == "assistant" and not last["content"] else []
    if last["role"] == "user":
        raise ExchangeError(
            f"{key!r} is a transcript that ends with 'Human:'; it must end with the answer, after "
            "'\\n\\nAssistant:'"
        )
    return messages


_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _asked(row: Fields, shared: list[Message]) -> list[Message]:
    """Join the prompt and the turns that the answers share, which may repeat the prompt."""
    given = row.get("prompt")
    is_text = isinstance(given, str)
    asked = turns(given, "prompt", role="user") if given else []
    if not asked or not shared:
        messages = asked or shared
        if not messages:
            raise ExchangeError("the row has no prompt; write it in a column 'prompt'")
        return messages
    first = next((i for i, m in enumerate(shared) if m.get("role") not in _BRIEFS), len(shared))
    for start in range(first + 1):
        if alike(shared[start : start + len(asked)], asked):
            return [*shared[:start], *asked, *shared[start + len(asked) :]]
    if is_text and any(alike([{**message, "role": "user"}], asked) for message in shared):
        return shared
    for size in range(min(len(asked), len(shared)), 0, -1):
        if alike(asked[-size:], shared[:size]):
            return [*asked, *shared[size:]]
    if is_text and (first == len(shared) or shared[first].get("role") == "assistant"):
        return [*shared[:first], *asked, *shared[first:]]
    if is_text or first:
        raise ExchangeError(
            "the answers begin with other messages than 'prompt' has; write the whole prompt as "
            "messages in 'prompt', with [{'role': 'system', 'content': …}, …] if it is a system "
            "prompt, and only what follows it in the answers"
        )
    return [*asked, *shared]


_BRIEFS = ("system", "developer")


def _briefed(row: Fields, messages: list[Message]) -> list[Message]:
    """Put the system prompt that a row has in a column of its own before the messages."""
    for key in ("system", "system_prompt"):
        text = row.get(key, "")
        require(isinstance(text, str), repr(key), text, "write text, or leave it out")
        if not text.strip():
            continue
        if messages[0].get("role") not in _BRIEFS:
            messages = [{"role": "system", "content": text}, *messages]
        elif not alike(messages[:1], [{**messages[0], "content": text}]):
            cure = "the prompt begins with another system message; keep one of them"
            raise ExchangeError(f"{key!r} is {described(text)}, and {cure}")
    return messages


_MORE = {"tools": ["json"], "tag": "text", "chat_template_kwargs": "json"}

PREFERENCE = Format(
    shapes=(("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    read=read_preference,
    write=write_preference,
    columns={"prompt": ["json"], "chosen": ["json"], "rejected": ["json"], **_MORE},
    optional=("system", "system_prompt"),
)
UNPAIRED = Format(
    shapes=(("prompt", "completion", "label"),),
    read=read_unpaired,
    write=write_unpaired,
    columns={"prompt": ["json"], "completion": ["json"], "label": "flag", **_MORE},
    optional=("system", "system_prompt"),
    completions=1,
)
