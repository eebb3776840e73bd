"""Tool calls in what a model wrote, in the Hermes form that Qwen and many others are trained on:

    <tool_call>
    {"name": "search", "arguments": {"query": "tide tables"}}
    </tool_call>

Calls that parse become OpenAI-shaped ``tool_calls``. Calls that do not parse stay in the text, so
that a reader sees what the model wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from agentpref.types import Message

CALL_BEGINS, CALL_ENDS = "<tool_call>", "</tool_call>"

# The second group is empty where the model stopped before the end of the call.
_BLOCK = re.compile(rf"{CALL_BEGINS}(.*?)({CALL_ENDS}|\Z)", re.DOTALL)


def assistant_message(text: str, *, turn: int = 0) -> Message:
    """Turn generated text into an assistant message, with ``tool_calls`` where there are any.

    ``turn`` is the number of messages before this one. It is part of each call's id, so that ids
    are the same whenever the same answer is generated, and differ within a conversation.
    """
    calls: list[dict[str, Any]] = []

    def take(block: re.Match[str]) -> str:
        call = _parse(block[1], f"{turn}_{len(calls)}") if block[2] else None
        if call is None:
            return block[0]
        calls.append(call)
        return ""

    content = _BLOCK.sub(take, text)
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": content.strip(), "tool_calls": calls}


def parse_rate(texts: Sequence[str]) -> float | None:
    """Share of the tool calls in generated texts that are JSON objects, finished or not.

    >>> parse_rate(['<tool_call>{"name": "search"}</tool_call>', '<tool_call>{"name":'])
    0.5

    Returns:
        ``None`` where no call was written.
    """
    calls = [block[1] for text in texts for block in _BLOCK.finditer(text)]
    return sum(map(_is_object, calls)) / len(calls) if calls else None


def has_broken_call(text: str) -> bool:
    """Whether a generated text has a tool call that is empty, or begins as JSON and is none.

    Calls in another notation, as some templates have it, are none of JSON's and not broken.

    >>> has_broken_call('<tool_call>{"name":</tool_call>'), has_broken_call("<tool_call><f=lamp>")
    (True, False)
    """
    calls = [block[1].strip() for block in _BLOCK.finditer(text)]
    return any(not _is_object(call) for call in calls if call[:1] in ("", "{", "["))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parse(block: str, place: str) -> dict[str, Any] | None:
    """Read one call; ``None`` if it is not one, or cannot be written as JSON again.

    Arguments are written as the chat templates' ``tojson`` writes them, so that a conversation
    renders as the model wrote it.
    """
    try:
        call = json.loads(block, parse_constant=_refuse)
        name, arguments = call["name"], call.get("arguments", {})
        encoded = json.dumps(arguments, ensure_ascii=False)
        digest = hashlib.blake2b(f"{name}\n{encoded}".encode(), digest_size=4).hexdigest()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    function = {"name": name, "arguments": encoded}
    return {"id": f"call_{place}_{digest}", "type": "function", "function": function}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class CallStream:
    """The text of an answer and its tool calls, while the answer comes in pieces.

    Text comes out as soon as it is certainly none of a call, and a call once it is complete. The
    pieces together are what :func:`assistant_message` reads from the whole, for the same ``turn``.
    """

    def __init__(self, *, turn: int = 0) -> None:
        self._turn = turn
        self._text = ""
        self._sent = ""
        self._calls = 0

    def push(self, piece: str) -> Iterator[str | dict[str, Any]]:
        """Add a piece of the answer; give the text and the calls that are now certain."""
        self._text += piece
        ends = self._text.rfind(CALL_ENDS) + len(CALL_ENDS)
        if CALL_ENDS in self._text[-len(piece) - len(CALL_ENDS) :]:
            yield from self._new_calls(assistant_message(self._text[:ends], turn=self._turn))
        yield from self._new_text(self._certain())

    def finish(self) -> Iterator[str | dict[str, Any]]:
        """End the answer; give what was withheld."""
        message = assistant_message(self._text, turn=self._turn)
        yield from self._new_text(message["content"])
        yield from self._new_calls(message)

    def _certain(self) -> str:
        """The start of the content that no further piece can change."""
        if self._text[:1].isspace():  # it is cut off if a call follows
            return ""
        content = self._text
        if self._calls:
            content = assistant_message(self._text, turn=self._turn)["content"]
        begun = content.find(CALL_BEGINS)
        if begun < 0:
            tails = range(min(len(CALL_BEGINS), len(content)), 0, -1)
            begun = next(
                (len(content) - n for n in tails if CALL_BEGINS.startswith(content[-n:])), -1
            )
        return (content if begun < 0 else content[:begun]).rstrip()

    def _new_text(self, content: str) -> Iterator[str]:
        fresh = content[len(self._sent) :]
        if fresh and content.startswith(self._sent):
            self._sent = content
            yield fresh

    def _new_calls(self, message: Message) -> Iterator[dict[str, Any]]:
        calls = message.get("tool_calls", [])
        yield from calls[self._calls :]
        self._calls = max(self._calls, len(calls))
