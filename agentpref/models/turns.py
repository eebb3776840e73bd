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

from agentpref.types import Message, Prompt

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where messages carry their reasoning, and where templates look for it."""

_HEAD = frozenset({"system", "developer"})
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
START_OF_THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
_DEEPEST = 100
"""How deep arguments may be nested; no template writes them deeper without running out of stack."""


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

    def with_thought_apart(self, *, opened: bool = False) -> Turn:
        """The same answer, with reasoning that is written into its content taken out of it.

        The content begins with ``<think>``, or the prompt has ``opened`` the thought. An answer may
        also speak of ``</think>``.
        """
        thought, closed, text = self.text.partition(END_OF_THOUGHT)
        begins = thought.lstrip().startswith(START_OF_THOUGHT)
        if self.reasoning or not closed or not (begins or opened):
            return self
        thought = thought.strip().removeprefix(START_OF_THOUGHT).strip()
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
    foreign = "tool_calls" if None in calls else None
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
    if isinstance(message.get("refusal"), str):
        texts.append(message["refusal"])
    role = message["role"]
    return Turn(
        role="tool" if role == "function" else role,
        texts=tuple(texts),
        in_parts=in_parts,
        reasoning=thoughts[0] if len(thoughts) == 1 else "\n".join(dict.fromkeys(thoughts)),
        calls=tuple(call for call in calls if call is not None),
        foreign=foreign,
        others={k: v for k, v in message.items() if k not in _READ and v is not None},
    )


def _kind(part: Any) -> str:
    """The type of a part; Bedrock's texts name none."""
    if not isinstance(part, Mapping):
        return type(part).__name__
    return str(part.get("type", "text" if "text" in part else None))


def _calls_of(message: Message) -> Iterator[Any]:
    calls = message.get("tool_calls")
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping) and not calls:
        calls = [{"type": "function", "function": legacy}]
    for call in calls if isinstance(calls, (list, tuple)) else [calls] if calls else ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            yield None
            continue
        arguments = _parsed(function.get("arguments"))
        if _depth(arguments) > _DEEPEST:
            yield None
        elif function is call:
            yield {**call, "arguments": arguments}
        else:
            yield {**call, "function": {**function, "arguments": arguments}}


def _parsed(arguments: Any) -> Any:
    """Parse arguments; text that is not a JSON object stays as the model wrote it.

    Providers send an empty text, or none, where there are no arguments. An escape such as
    ``\\ud83d``, half of a character, becomes U+FFFD: no tokenizer takes it.
    """
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
        if "\\u" in arguments:
            text = json.dumps(parsed, ensure_ascii=False)
            parsed = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _depth(value: Any) -> int:
    """How deep a value is nested, or a little more than is allowed."""
    depth, level = 0, [value]
    while level and depth <= _DEEPEST:
        depth += 1
        level = [
            inner
            for item in level
            if isinstance(item, (Mapping, list, tuple))
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
    return depth


def shorter(prompt: Prompt) -> list[Prompt]:
    """The same prompt without its oldest turn, without its two oldest, and so on to its last one.

    A turn is what a user said and everything that followed, tool calls and their results included,
    so no result is left without its call. Messages before the first turn are dropped with it; a
    system message stays.
    """
    messages = prompt.messages
    head = next((i for i, m in enumerate(messages) if m["role"] not in _HEAD), len(messages))
    starts = [i for i in range(head, len(messages)) if _begins_turn(messages, i)]
    return [replace(prompt, messages=(*messages[:head], *messages[i:])) for i in starts if i > head]


def _begins_turn(messages: Sequence[Message], at: int) -> bool:
    by_user = messages[at]["role"] == "user"
    return by_user and (at == 0 or messages[at - 1]["role"] != "user")
