"""Reads messages in the shapes that providers send, and writes them in the shape of chat templates.

A message's words are in its content, a string or a list of parts; in its reasoning, which providers
send under three names or as parts; and in its tool calls. :func:`read_turn` gathers them, so that
the rest of the code knows one shape, and :meth:`Turn.write` hands a template what it can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentpref.types import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where messages carry their reasoning, and where templates look for it."""

_READ = frozenset({"role", "content", "tool_calls", "function_call", "refusal", *REASONING_KEYS})
_CALLS = frozenset({"tool_use", "tool_call", "function_call", "server_tool_call"})
"""Types of parts that repeat a call of ``tool_calls``."""
_THOUGHTS: Mapping[str, Sequence[str]] = {
    "thinking": ("thinking",),
    "reasoning": ("reasoning", "text"),
    "redacted_thinking": (),
    "reasoning_content": ("text",),
}
_TEXTS: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "text-plain": "text",
    "refusal": "refusal",
}
END_OF_THOUGHT = "</think>"


@dataclass(frozen=True, slots=True)
class Turn:
    """A message's words.

    ``texts`` are those of its content: one for a string, one for each part of a list (then
    ``in_parts``). ``calls`` have arguments that are parsed, where they are a JSON object.
    ``foreign`` is the type of a part that is no text, such as an image. ``others`` are the keys
    without words of the speaker: ``name``, ``tool_call_id``.
    """

    role: str
    texts: tuple[str, ...]
    in_parts: bool
    reasoning: str
    calls: tuple[Mapping[str, Any], ...]
    foreign: str | None
    others: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The content as one string.

        The parts of an answer are pieces of one text. Other parts are joined by a line break, as
        vLLM joins them.
        """
        return ("" if self.role == "assistant" else "\n").join(self.texts)

    def write(self, role: str, content: Any, *, reasoning_key: str) -> dict[str, Any]:
        """The message in the shape of chat templates.

        It differs from OpenAI's in three points. Templates join the content to other text, so it is
        never ``None``. They write arguments with ``tojson``, which would quote JSON text a second
        time, so these are parsed. A key that is there counts as said, so empty ones are left out.
        """
        turn: dict[str, Any] = {"role": role, "content": content}
        if self.reasoning:
            turn[reasoning_key] = self.reasoning
        if self.calls:
            turn["tool_calls"] = [dict(call) for call in self.calls]
        return turn | dict(self.others)

    def with_thought_apart(self) -> Turn:
        """The same answer, with reasoning that is written into its content taken out of it."""
        thought, closed, text = self.text.partition(END_OF_THOUGHT)
        if self.reasoning or not closed:
            return self
        thought = thought.strip().removeprefix("<think>").strip()
        return replace(self, reasoning=thought, texts=(text.strip(),), in_parts=False)

    def without_thought(self) -> str:
        """An answer's content without the reasoning that templates drop from earlier turns."""
        return self.text.rpartition(END_OF_THOUGHT)[2]


def read_turn(message: Message) -> Turn:
    """Gather the words of a message in OpenAI's shape, or in that of another provider."""
    content = message.get("content")
    in_parts = isinstance(content, (list, tuple))
    texts: list[str] = []
    thoughts = [value for key in REASONING_KEYS if isinstance(value := message.get(key), str)][:1]
    calls = list(_calls_of(message))
    foreign: str | None = None
    for part in content if isinstance(content, (list, tuple)) else [content or ""]:
        kind = "text" if isinstance(part, str) else _kind(part)
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXTS and isinstance(part.get(_TEXTS[kind]), str):
            texts.append(part[_TEXTS[kind]])
        elif kind in _THOUGHTS:
            thoughts += [part[k] for k in _THOUGHTS[kind] if isinstance(part.get(k), str)]
        elif kind not in _CALLS or not calls:
            foreign = foreign or kind
    if message.get("tool_calls") and not isinstance(message["tool_calls"], (list, tuple)):
        foreign = foreign or "tool_calls"
    if isinstance(message.get("refusal"), str):
        texts.append(message["refusal"])
    role = message["role"]
    return Turn(
        role="tool" if role == "function" else role,
        texts=tuple(texts),
        in_parts=in_parts,
        reasoning=thoughts[0] if len(thoughts) == 1 else "\n".join(dict.fromkeys(thoughts)),
        calls=tuple(calls),
        foreign=foreign,
        others={k: v for k, v in message.items() if k not in _READ and v is not None},
    )


def _kind(part: Any) -> str:
    """The type of a part; Bedrock's texts name none."""
    if not isinstance(part, Mapping):
        return type(part).__name__
    return str(part.get("type", "text" if "text" in part else None))


def _calls_of(message: Message) -> Iterator[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping) and not calls:
        calls = [{"type": "function", "function": legacy}]
    for call in calls if isinstance(calls, (list, tuple)) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            yield {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
        else:
            yield call


def _parsed(text: str) -> dict[str, Any] | str:
    """Parse arguments; text that is not a JSON object stays as the model wrote it."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text
