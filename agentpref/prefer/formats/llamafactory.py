"""LLaMA-Factory's ranking formats.

ShareGPT is read and written: ``conversations`` of turns ``{"from", "value"}``, ``chosen`` and
``rejected`` as one turn each, ``tools`` as JSON text. Alpaca (``instruction``, ``input``,
``system``, ``history``, and two answers in text) is only read. A turn is one text, and people and
tools must take turns with the model: what does not go into that is refused.

A turn says less than a message: no ids of calls, no names, no telling JSON text from JSON. Where
``from`` and ``value`` alone would not give the same message back, the turn carries the message too,
as JSON text under ``agentpref``. LLaMA-Factory passes over keys that it does not know.

Pure functions from rows to values and back.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import orjson

from agentpref.errors import ExchangeError
from agentpref.prefer.rows import Fields, PreferenceRow, answer_of, parse, tag_of, tools_of
from agentpref.record.messages import kept, plain, prompt_of
from agentpref.types import Message, Pair

Turn: TypeAlias = "dict[str, str]"

CARRIED = "agentpref"
"""The key of a turn under which it carries its message."""

_TURN = {"from": "text", "value": "text", CARRIED: "text"}
COLUMNS = {
    "conversations": [_TURN],
    "chosen": _TURN,
    "rejected": _TURN,
    "tools": "text",
    "tag": "text",
}

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}
_NAMES = {
    "user": "human",
    "assistant": "gpt",
    "system": "system",
    "developer": "system",
    "tool": "observation",
    "function": "observation",
}
_ASKING, _ANSWERING = ("human", "observation"), ("gpt", "function_call")
_TURN_KEYS = ("from", "value")
_ELSE = "export it in the format 'preference', or leave it out with --skip-bad"


def read_sharegpt(row: Fields) -> PreferenceRow:
    """Read a conversation and two ways to go on.

    Raises:
        ExchangeError, InvalidMessage: something in the row is not what it should be.
    """
    given = row["conversations"]
    if not isinstance(given, list):
        raise ExchangeError(f"'conversations' is {reprlib.repr(given)}; write a list of turns")
    messages = [_message(turn, f"turn {index}") for index, turn in enumerate(given)]
    if not messages or messages[0].get("role") not in ("system", "developer"):
        messages = [*_system(row), *messages]
    chosen, rejected = (_message(row[side], repr(side)) for side in ("chosen", "rejected"))
    prompt = prompt_of(messages, tools_of(row))
    return PreferenceRow(prompt, answer_of([chosen]), answer_of([rejected]), tag_of(row))


def read_alpaca(row: Fields) -> PreferenceRow:
    """Read an instruction and two answers; errors as in :func:`read_sharegpt`."""
    asked = [text for key in ("instruction", "input") if (text := _text(row, key))]
    messages = [*_system(row), *_history(row), {"role": "user", "content": "\n".join(asked)}]
    chosen, rejected = (
        {"role": "assistant", "content": _text(row, side)} for side in ("chosen", "rejected")
    )
    prompt = prompt_of(messages, tools_of(row))
    return PreferenceRow(prompt, answer_of([chosen]), answer_of([rejected]), tag_of(row))


def write(pair: Pair) -> dict[str, Any]:
    """Write a pair as a row of ShareGPT.

    Raises:
        ExchangeError: the format cannot hold it; the message at fault is named.
    """
    turns = [_turn(message, f"message {i}") for i, message in enumerate(pair.prompt.messages)]
    _require_order([turn["from"] for turn in turns])
    row: dict[str, Any] = {
        "conversations": turns,
        "chosen": _turn(pair.chosen, "the chosen answer"),
        "rejected": _turn(pair.rejected, "the rejected answer"),
        "tag": pair.tag,
    }
    if pair.prompt.tools:
        row["tools"] = orjson.dumps(pair.prompt.tools, default=plain).decode()
    return row


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in _TURN_KEYS):
        raise ExchangeError(
            f"{name} is {reprlib.repr(turn)}; write {{'from': 'human', 'value': '…'}}"
        )
    carried = turn.get(CARRIED)
    return _told(turn, name) if carried is None else _carried(turn, carried, name)


def _told(turn: Mapping[str, str], name: str) -> Message:
    """Read what ``from`` and ``value`` say."""
    if turn["from"] == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(turn["value"], name)}
    if turn["from"] not in _ROLES:
        known = ", ".join(map(repr, (*_ROLES, "function_call")))
        raise ExchangeError(f"{name} is from {turn['from']!r}; use one of {known}")
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _carried(turn: Mapping[str, str], text: object, name: str) -> Message:
    """Read the message that a turn carries, which must be the one that it shows."""
    cure = f"take {CARRIED!r} out of the turn"
    if not isinstance(text, str):
        raise ExchangeError(f"{name} carries {reprlib.repr(text)}, no text; {cure}")
    message = parse(text, f"what {name} carries", cure)
    shown = {key: turn[key] for key in _TURN_KEYS}
    if not isinstance(message, dict) or _shown(message, name) != shown:
        raise ExchangeError(f"{name} carries another message than it shows; {cure}")
    return message


def _calls(text: str, name: str) -> list[dict[str, Any]]:
    """Read calls as OpenAI shapes them: arguments are JSON text; ids there are none."""
    cure = "write {'name': …, 'arguments': {…}}, or a list of such calls"
    given = parse(text, f"the value of {name}", cure)
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise ExchangeError(f"{name} calls {reprlib.repr(given)}; {cure}")
    return [{"type": "function", "function": _function(call)} for call in calls]


def _function(call: Mapping[str, Any]) -> dict[str, str]:
    """Write arguments as the chat templates' ``tojson`` does; text stays as it is."""
    given = call.get("arguments", {})
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {"name": call["name"], "arguments": text}


def _system(row: Fields) -> list[Message]:
    text = _text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _history(row: Fields) -> list[Message]:
    rounds = row.get("history", [])
    if not isinstance(rounds, list) or not all(map(_is_round, rounds)):
        raise ExchangeError(
            f"'history' is {reprlib.repr(rounds)}; write a list of ['question', 'answer']"
        )
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for said in rounds
        for role, text in zip(roles, said, strict=True)
    ]


def _is_round(said: object) -> bool:
    return isinstance(said, list) and len(said) == 2 and all(isinstance(t, str) for t in said)


def _text(row: Fields, key: str) -> str:
    text = row.get(key, "")
    if not isinstance(text, str):
        raise ExchangeError(f"{key!r} is {reprlib.repr(text)}; write text")
    return text


def _turn(message: Message, name: str) -> Turn:
    """Write a message as a turn, which carries it where it would else come back changed."""
    turn = _shown(message, name)
    if kept(_told(turn, name)) == kept(message):
        return turn
    return {**turn, CARRIED: kept(message).decode()}


def _shown(message: Message, name: str) -> Turn:
    """Write a message as LLaMA-Factory sees it: one text, or calls and nothing else."""
    role, calls = message.get("role"), message.get("tool_calls")
    text = _text_of(message.get("content"), name)
    if role == "assistant" and calls:
        if text:
            raise ExchangeError(f"{name} holds text and tool calls, a turn one of them; {_ELSE}")
        return {"from": "function_call", "value": _shown_calls(calls, name)}
    if text is None or not isinstance(role, str) or role not in _NAMES:
        raise ExchangeError(f"{name} is {reprlib.repr(message)}, which holds no text; {_ELSE}")
    return {"from": _NAMES[role], "value": text}


def _text_of(content: object, name: str) -> str | None:
    """Join a content's parts, all of which must be text."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ExchangeError(f"{name} has parts that are no text; {_ELSE}")
    return "".join(map(str, texts))


def _shown_calls(calls: object, name: str) -> str:
    given = calls if isinstance(calls, (list, tuple)) else [calls]
    shown = [_shown_call(call, name) for call in given]
    return json.dumps(shown if len(shown) > 1 else shown[0], ensure_ascii=False)


def _shown_call(call: object, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ExchangeError(f"{name} holds the call {reprlib.repr(call)}, of no function; {_ELSE}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse(arguments, f"the text that {name} calls {function['name']!r} with", _ELSE)
    return {"name": function["name"], "arguments": arguments}


def _require_order(names: Sequence[str]) -> None:
    """Refuse a conversation that LLaMA-Factory would pass over in silence."""
    first = 1 if names[0] == "system" else 0
    for index, name in enumerate(names[first:]):
        if name not in (_ANSWERING if index % 2 else _ASKING):
            raise ExchangeError(
                f"message {first + index} is from {name!r}, but after a system prompt people and "
                f"tools must take turns with the model; {_ELSE}"
            )
    if (len(names) - first) % 2 == 0:
        raise ExchangeError(f"the prompt does not end with a person or a tool; {_ELSE}")
