"""Converts LangChain's messages, answers and tools to the OpenAI shapes that agentpref stores.

The callback and the chat model share it, so a message has one form everywhere. No block of a
message stops its conversion: what LangChain cannot express in OpenAI's shape stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.utils.function_calling import convert_to_openai_tool

_CALLS = {"tool_use", "tool_call", "tool_call_chunk", "function_call", "invalid_tool_call"}
"""The blocks in which providers and LangChain repeat the calls of ``tool_calls``."""

_REASONING = {"thinking", "redacted_thinking", "reasoning", "reasoning_content"}
"""The blocks that hold what a model thought before it answered."""

_REASONING_TEXT = ("reasoning", "thinking", "reasoning_content", "text", "summary", "content")
"""The keys under which such a block has its text; the first that has any counts."""


def openai_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Convert messages to OpenAI's shape; one with several tool results becomes several.

    Content that is all text becomes one string; other content stays a list of blocks. What an
    assistant thought becomes the string ``reasoning_content``, without signatures and encrypted
    parts. Each call is in ``tool_calls`` once, also one whose arguments are no JSON.
    """
    return [body for message in messages for body in _bodies(message)]


_ENDS = ("finish_reason", "stop_reason", "done_reason")
"""Where providers say why an answer ended; the first that says something counts."""

_ENDED: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "eos": "stop",
    "complete": "stop",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "safety": "content_filter",
    "refusal": "content_filter",
    "recitation": "content_filter",
}
"""OpenAI's words for the reasons of other providers."""


def answered(answer: Generation, model: str | None) -> dict[str, Any]:
    """The output of a generation, and who wrote it in which tokens."""
    if not isinstance(answer, ChatGeneration):
        return {"output": answer.text}
    reply = answer.message.response_metadata
    ours = reply if "revision" in reply else {}  # elsewhere, "logprobs" has other shapes
    return {
        "output": openai_messages([answer.message])[0],
        "model": reply.get("model_name") or reply.get("model") or model,
        "revision": ours.get("revision"),
        "token_ids": ours.get("token_ids"),
        "logprobs": ours.get("logprobs"),
    }


def finish_reason(answer: Generation) -> str | None:
    """Why an answer ended, in OpenAI's words where it has one; ``None`` if nothing says so."""
    places = [answer.generation_info or {}]
    if isinstance(answer, ChatGeneration):
        places.insert(0, answer.message.response_metadata)
    said = (place.get(key) for place in places for key in _ENDS)
    reason = next((str(value) for value in said if value), None)
    return None if reason is None else _ENDED.get(reason.lower(), reason.lower())


def openai_tool(tool: Any) -> dict[str, Any]:
    """Describe a tool in OpenAI's shape; a provider's built-in tool stays as it is."""
    try:
        return convert_to_openai_tool(tool)
    except (AttributeError, LookupError, TypeError, ValueError):
        if isinstance(tool, Mapping):
            return dict(tool)
        raise


def first_id(name: str, *places: Mapping[str, Any] | None) -> str | None:
    """The id of that name from the first place that has it, as a string."""
    found = (place[name] for place in places if place and place.get(name) is not None)
    value = next(found, None)
    return None if value is None else str(value)


def _bodies(message: BaseMessage) -> Iterator[dict[str, Any]]:
    """The message in OpenAI's shape, and the tool results among its blocks, in their order."""
    calls = _calls(message)
    bare = message
    if calls or not isinstance(message.content, str):  # a copy takes twice as long as the rest
        without: dict[str, Any] = {"content": ""} | ({"tool_calls": []} if calls else {})
        bare = message.model_copy(update=without)
    (body,) = convert_to_openai_messages([bare])
    speaks = body["role"] == "assistant"
    known = [call["id"] for call in calls if call["id"] is not None]
    parts: list[dict[str, Any]] = []
    sooner: list[BaseMessage] = []  # results come first, where they follow their calls
    later: list[BaseMessage] = []
    thoughts: list[str] = []
    for given in [message.content] if isinstance(message.content, str) else message.content:
        block = {"type": "text", "text": given} if isinstance(given, str) else given
        kind = str(block.get("type"))
        if kind == "text" and isinstance(block.get("text"), str):
            parts.append({"type": "text", "text": block["text"]})
        elif speaks and kind in _REASONING:
            thoughts.append(_reasoning(block))
        elif kind in _CALLS and (block.get("id") in known or block.get("call_id") in known):
            continue
        elif kind == "tool_call":
            calls.append(_call(block.get("name"), block.get("args"), block.get("id")))
        elif kind == "tool_result" and not speaks and isinstance(block.get("tool_use_id"), str):
            said = ToolMessage(block.get("content") or "", tool_call_id=block["tool_use_id"])
            (later if parts else sooner).append(said)
        else:
            converted = _converted(bare, block)
            calls += converted.get("tool_calls", ())
            parts += () if "tool_calls" in converted else converted["content"]
    # An answer has no separators: providers split one sentence into several blocks to cite sources.
    texts = [part.get("text") if part.get("type") == "text" else None for part in parts]
    is_text = all(isinstance(text, str) for text in texts) and (speaks or len(texts) < 2)
    body["content"] = "".join(map(str, texts)) if is_text else parts
    if speaks and (reasoning := _thought(message.additional_kwargs, "".join(thoughts))):
        body["reasoning_content"] = reasoning
    if calls:
        body["tool_calls"] = calls
    yield from openai_messages(sooner)
    if parts or calls or not (sooner or later):
        yield body
    yield from openai_messages(later)


def _converted(bare: BaseMessage, block: dict[Any, Any]) -> dict[str, Any]:
    """A body that has one block in its content, or the call that the block is."""
    try:
        alone = bare.model_copy(update={"content": [block]})
        (body,) = convert_to_openai_messages([alone], text_format="block")
    except (AttributeError, LookupError, TypeError, ValueError):  # OpenAI has no such block
        return {"content": [dict(block)]}
    for part in body["content"]:
        file = part.get("file")
        if isinstance(file, dict) and file.get("filename") == "LC_AUTOGENERATED":
            part["file"] = {key: value for key, value in file.items() if key != "filename"}
    return body


def _calls(message: BaseMessage) -> list[dict[str, Any]]:
    """The calls of a message, also those that LangChain calls invalid: the model wrote them."""
    if not isinstance(message, AIMessage):
        return []
    calls = [*message.tool_calls, *message.invalid_tool_calls]
    return [_call(call["name"], call["args"], call["id"]) for call in calls]


def _call(name: str | None, arguments: Any, call_id: str | None) -> dict[str, Any]:
    if not isinstance(arguments, str):
        # What JSON cannot hold stays as it is: the log makes JSON of it, and counts that.
        with suppress(RecursionError, TypeError, ValueError):
            arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": name or "", "arguments": arguments}
    return {"type": "function", "id": call_id, "function": function}


def _thought(beside: Mapping[str, Any], thought: str) -> str:
    """What an assistant thought, by its blocks and by what its provider put beside them."""
    keys = ("reasoning_content", "reasoning")
    other = next(filter(None, (_reasoning(beside.get(key)) for key in keys)), "")
    return thought if other in thought else other + thought


def _reasoning(value: Any) -> str:
    """The text of some reasoning; empty where its provider sends it encrypted."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):  # the paragraphs of a summary
        return "\n\n".join(filter(None, map(_reasoning, value)))
    if isinstance(value, Mapping):
        texts = (_reasoning(value.get(key)) for key in _REASONING_TEXT)
        return next(filter(None, texts), "")
    return ""
