"""LLaMA-Factory's ranking formats.

ShareGPT is read and written: ``conversations`` of turns ``{"from", "value"}``, ``chosen`` and
``rejected`` as one turn each, ``tools`` as JSON text. Alpaca (``instruction``, ``input``,
``system``, ``history``, and two answers in text) is only read. A turn holds one text, and users and
tools must take turns with the model. What does not fit is refused.

A turn lacks the ids of calls, names, and the difference between JSON text and JSON. If ``from`` and
``value`` alone would read back as another message, the turn also carries the message, as JSON text
under the key ``agentpref``, which LLaMA-Factory ignores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentpref.errors import ExchangeError, described
from agentpref.prefer.formats import (
    Fields,
    Format,
    PreferenceRecord,
    chosen_and_rejected,
    parse,
    record_of_row,
    require,
    require_no_arguments,
)
from agentpref.record.messages import as_json, kept
from agentpref.types import Message

CARRIED = "agentpref"
"""The key of a turn under which it carries its message."""

_SIDES = ("chosen", "rejected")
_INSTEAD = "export it in the format 'preference', or leave it out with --skip-bad"

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}
_NAMES = {role: name for name, role in _ROLES.items()}
_NAMES |= {"developer": "system", "function": "observation"}
_SPEAKERS = (("human", "observation"), ("gpt", "function_call"))
"""Who takes turns after a system prompt. LLaMA-Factory drops other conversations silently."""


def read(row: Fields) -> PreferenceRecord:
    """Read a row of ShareGPT, or of Alpaca if it has no ``conversations``."""
    if "conversations" in row:
        given = row["conversations"]
        require(isinstance(given, list), "'conversations'", given, "write a list of turns")
        messages = [_message(turn, f"turn {index}") for index, turn in enumerate(given)]
        answers = [_message(row[side], repr(side)) for side in _SIDES]
    else:
        rounds = row.get("history", [])
        if isinstance(rounds, str) and rounds.startswith("["):  # as tables of text hold it
            rounds = parse(rounds, "'history'", "write a list of ['question', 'answer']")
        fits = isinstance(rounds, list) and all(
            isinstance(texts, list) and [*map(type, texts)] == [str, str] for texts in rounds
        )
        require(fits, "'history'", rounds, "write a list of ['question', 'answer']")
        messages = []
        for question, answer in rounds:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        asked = filter(None, (_text(row, "instruction"), _text(row, "input")))
        messages.append({"role": "user", "content": "\n".join(asked)})
        answers = [{"role": "assistant", "content": _text(row, side)} for side in _SIDES]
    briefed = messages and messages[0].get("role") in ("system", "developer")
    if not briefed and (system := _text(row, "system")):
        messages.insert(0, {"role": "system", "content": system})
    return record_of_row(row, messages, answers)


def write(record: PreferenceRecord) -> dict[str, Any]:
    """Write a pair as a row of ShareGPT; ``ExchangeError`` names a message it cannot hold."""
    require_no_arguments(record)
    chosen, rejected = chosen_and_rejected(record)
    turns = [_turn(message, f"message {i}") for i, message in enumerate(record.prompt.messages)]
    first = int(turns[0]["from"] == "system")
    for index, turn in enumerate(turns[first:]):
        if turn["from"] not in _SPEAKERS[index % 2]:
            raise _cannot_hold(
                f"message {first + index} is from {turn['from']!r}, but after a system prompt "
                "users and tools must take turns with the model"
            )
    if (len(turns) - first) % 2 == 0:
        raise _cannot_hold("the prompt does not end with a user or a tool")
    row = {
        "conversations": turns,
        "chosen": _turn(chosen, "the chosen answer"),
        "rejected": _turn(rejected, "the rejected answer"),
        "tag": record.tag,
    }
    tools = {"tools": as_json(record.prompt.tools)} if record.prompt.tools else {}
    return row | tools


def _text(row: Fields, key: str) -> str:
    text: str = row.get(key, "")
    require(isinstance(text, str), repr(key), text, "write text")
    return text


def _message(turn: Any, name: str) -> Message:
    """Read a turn; a message that the turn carries must be the one that it shows."""
    shown = {key: turn.get(key) for key in ("from", "value")} if isinstance(turn, dict) else {}
    fits = [*map(type, shown.values())] == [str, str]
    require(fits, name, turn, "write {'from': 'human', 'value': '…'}")
    carried = turn.get(CARRIED)
    if carried is None:
        return _shown_message(turn, name)
    cure = f"remove {CARRIED!r} from the turn"
    message: Any = parse(carried, f"the message that {name} carries", cure)
    if not isinstance(message, dict) or _shown(message, name) != shown:
        raise ExchangeError(f"{name} carries another message than it shows; {cure}")
    return message


def _shown_message(turn: Mapping[str, str], name: str) -> Message:
    """Read the message that ``from`` and ``value`` show.

    Tool calls get OpenAI's shape, without ids. Arguments become JSON text as chat templates'
    ``tojson`` writes it. Text stays as it is.
    """
    if turn["from"] in _ROLES:
        return {"role": _ROLES[turn["from"]], "content": turn["value"]}
    if turn["from"] != "function_call":
        known = ", ".join(map(repr, (*_ROLES, "function_call")))
        raise ExchangeError(f"{name} is from {described(turn['from'])}; use one of {known}")
    cure = "write {'name': …, 'arguments': {…}}, or a list of such calls"
    value = parse(turn["value"], f"the value of {name}", cure)
    calls = value if isinstance(value, list) else [value]
    fits = calls and all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls)
    require(fits, f"the value of {name}", value, cure)
    functions = [
        {"name": call["name"], "arguments": _as_text(call.get("arguments", {}))} for call in calls
    ]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _turn(message: Message, name: str) -> dict[str, str]:
    """Write a message as a turn, which carries the message if it would read back changed."""
    turn = _shown(message, name)
    if kept(_shown_message(turn, name)) == kept(message):
        return turn
    return {**turn, CARRIED: as_json(message)}


def _shown(message: Message, name: str) -> dict[str, str]:
    """Write a message as LLaMA-Factory reads it: one text, or tool calls and nothing else."""
    role, text, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if isinstance(text, (list, tuple)):
        if not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in text):
            raise _cannot_hold(f"{name} has parts that are not text")
        text = "".join(part["text"] for part in text)
    if role == "assistant" and calls:
        if text:
            raise _cannot_hold(f"{name} holds text and tool calls, a turn one of them")
        given = calls if isinstance(calls, (list, tuple)) else [calls]
        shown = [_shown_call(call, name) for call in given]
        return {"from": "function_call", "value": _as_text(shown if len(shown) > 1 else shown[0])}
    if not isinstance(text, str) or not isinstance(role, str) or role not in _NAMES:
        raise _cannot_hold(f"{name} has no text")
    return {"from": _NAMES[role], "value": text}


def _shown_call(call: object, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _cannot_hold(f"{name} holds a call that names no function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        whose = f"the argument text with which {name} calls {function['name']!r}"
        arguments = parse(arguments, whose, _INSTEAD)
    return {"name": function["name"], "arguments": arguments}


def _cannot_hold(what: str) -> ExchangeError:
    return ExchangeError(f"{what}; {_INSTEAD}")


_TURN = {"from": "text", "value": "text", CARRIED: "text"}

LLAMAFACTORY = Format(
    shapes=(("conversations", "chosen", "rejected"), ("instruction", "chosen", "rejected")),
    read=read,
    write=write,
    columns={
        "conversations": [_TURN],
        "chosen": _TURN,
        "rejected": _TURN,
        "tools": "text",
        "tag": "text",
    },
    optional=("input", "history", "system"),
)
