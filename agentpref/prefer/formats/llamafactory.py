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
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import orjson

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import (
    Fields,
    Format,
    PreferenceRecord,
    chosen_and_rejected,
    parse,
    record_of_row,
)
from agentpref.record.messages import kept, plain
from agentpref.types import Message

Turn: TypeAlias = "dict[str, str]"

CARRIED = "agentpref"
"""The key of a turn under which it carries its message."""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}
_NAMES = {role: name for name, role in _ROLES.items()} | {
    "developer": "system",
    "function": "observation",
}
_SIDES = ("chosen", "rejected")
_INSTEAD = "export it in the format 'preference', or leave it out with --skip-bad"


def read(row: Fields) -> PreferenceRecord:
    """Read a row of ShareGPT, or of Alpaca if it has no ``conversations``."""
    if "conversations" not in row:
        return _read_alpaca(row)
    given = row["conversations"]
    if not isinstance(given, list):
        raise ExchangeError(f"'conversations' is {reprlib.repr(given)}; write a list of turns")
    messages = [_message(turn, f"turn {index}") for index, turn in enumerate(given)]
    if not messages or messages[0].get("role") not in ("system", "developer"):
        messages = [*_system(row), *messages]
    return record_of_row(row, messages, [_message(row[side], repr(side)) for side in _SIDES])


def write(record: PreferenceRecord) -> dict[str, Any]:
    """Write a pair as a row of ShareGPT.

    Raises:
        ExchangeError: the format cannot hold a message, which the error names.
    """
    chosen, rejected = chosen_and_rejected(record)
    turns = [_turn(message, f"message {i}") for i, message in enumerate(record.prompt.messages)]
    _require_order([turn["from"] for turn in turns])
    row: dict[str, Any] = {
        "conversations": turns,
        "chosen": _turn(chosen, "the chosen answer"),
        "rejected": _turn(rejected, "the rejected answer"),
        "tag": record.tag,
    }
    if record.prompt.tools:
        row["tools"] = orjson.dumps(record.prompt.tools, default=plain).decode()
    return row


def _read_alpaca(row: Fields) -> PreferenceRecord:
    rounds = row.get("history", [])
    if not isinstance(rounds, list) or not all(
        isinstance(said, list) and [type(text) for text in said] == [str, str] for said in rounds
    ):
        raise ExchangeError(
            f"'history' is {reprlib.repr(rounds)}; write a list of ['question', 'answer']"
        )
    asked = [text for key in ("instruction", "input") if (text := _text(row, key))]
    messages = _system(row)
    for question, answer in rounds:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": "\n".join(asked)})
    answers = [{"role": "assistant", "content": _text(row, side)} for side in _SIDES]
    return record_of_row(row, messages, answers)


def _system(row: Fields) -> list[Message]:
    text = _text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _text(row: Fields, key: str) -> str:
    text = row.get(key, "")
    if not isinstance(text, str):
        raise ExchangeError(f"{key!r} is {reprlib.repr(text)}; write text")
    return text


def _message(turn: object, name: str) -> Message:
    """Read a turn; a message that the turn carries must be the one that it shows."""
    if not isinstance(turn, dict) or not all(
        isinstance(turn.get(k), str) for k in ("from", "value")
    ):
        raise ExchangeError(
            f"{name} is {reprlib.repr(turn)}; write {{'from': 'human', 'value': '…'}}"
        )
    carried = turn.get(CARRIED)
    if carried is None:
        return _shown_message(turn, name)
    cure = f"remove {CARRIED!r} from the turn"
    if not isinstance(carried, str):
        raise ExchangeError(f"{name} carries {reprlib.repr(carried)}, which is not text; {cure}")
    message = parse(carried, f"the message that {name} carries", cure)
    shown = {"from": turn["from"], "value": turn["value"]}
    if not isinstance(message, dict) or _shown(message, name) != shown:
        raise ExchangeError(f"{name} carries another message than it shows; {cure}")
    return message


def _shown_message(turn: Mapping[str, str], name: str) -> Message:
    """Read the message that ``from`` and ``value`` show."""
    if turn["from"] == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(turn["value"], name)}
    if turn["from"] not in _ROLES:
        known = ", ".join(map(repr, (*_ROLES, "function_call")))
        raise ExchangeError(f"{name} is from {turn['from']!r}; use one of {known}")
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _calls(text: str, name: str) -> list[dict[str, Any]]:
    """Read tool calls in OpenAI's shape, without ids.

    Arguments become JSON text as chat templates' ``tojson`` writes it. Text stays as it is.
    """
    cure = "write {'name': …, 'arguments': {…}}, or a list of such calls"
    given = parse(text, f"the value of {name}", cure)
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise ExchangeError(f"{name} calls {reprlib.repr(given)}; {cure}")
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": _as_text(call.get("arguments", {}))},
        }
        for call in calls
    ]


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _turn(message: Message, name: str) -> Turn:
    """Write a message as a turn, which carries the message if it would read back changed."""
    turn = _shown(message, name)
    if kept(_shown_message(turn, name)) == kept(message):
        return turn
    return {**turn, CARRIED: kept(message).decode()}


def _shown(message: Message, name: str) -> Turn:
    """Write a message as LLaMA-Factory reads it: one text, or tool calls and nothing else."""
    role, calls = message.get("role"), message.get("tool_calls")
    text = _text_of(message.get("content"), name)
    if role == "assistant" and calls:
        if text:
            raise ExchangeError(f"{name} holds text and tool calls, a turn one of them; {_INSTEAD}")
        given = calls if isinstance(calls, (list, tuple)) else [calls]
        shown = [_shown_call(call, name) for call in given]
        return {"from": "function_call", "value": _as_text(shown if len(shown) > 1 else shown[0])}
    if text is None or not isinstance(role, str) or role not in _NAMES:
        raise ExchangeError(f"{name} is {reprlib.repr(message)}, which has no text; {_INSTEAD}")
    return {"from": _NAMES[role], "value": text}


def _text_of(content: object, name: str) -> str | None:
    """Join the parts of a content, all of which must be text."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ExchangeError(f"{name} has parts that are not text; {_INSTEAD}")
    return "".join(map(str, texts))


def _shown_call(call: object, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ExchangeError(
            f"{name} holds the call {reprlib.repr(call)}, which names no function; {_INSTEAD}"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        whose = f"the argument text with which {name} calls {function['name']!r}"
        arguments = parse(arguments, whose, _INSTEAD)
    return {"name": function["name"], "arguments": arguments}


def _require_order(names: Sequence[str]) -> None:
    """Refuse a conversation that LLaMA-Factory would leave out without a warning."""
    first = 1 if names[0] == "system" else 0
    turns = (("human", "observation"), ("gpt", "function_call"))
    for index, name in enumerate(names[first:]):
        if name not in turns[index % 2]:
            raise ExchangeError(
                f"message {first + index} is from {name!r}, but after a system prompt users and "
                f"tools must take turns with the model; {_INSTEAD}"
            )
    if (len(names) - first) % 2 == 0:
        raise ExchangeError(f"the prompt does not end with a user or a tool; {_INSTEAD}")


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
