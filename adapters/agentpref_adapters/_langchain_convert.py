"""Between LangChain's messages, tools and configs and the OpenAI shapes that agentpref keeps.

Both halves of the LangChain integration use these pure functions, so that a message has one form
whether it is logged, served or part of the next prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.utils.function_calling import convert_to_openai_tool

_PARAMS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_sequences", "tool_choice",
    "max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "reasoning_effort",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
_STEP_TAG = re.compile(
    r"(seq|graph):step:\d+|map:key:.*|condition:\d+|branch:(\d+|default)|langsmith:.*"
)
# "langgraph_node" stays: it names the part of a graph that called the model.
_FRAMEWORK_KEY = re.compile(
    r"(?!langgraph_node$)(ls|lc|langgraph|checkpoint)_.*|__.*|thread_id|user_id"
)


def openai_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Convert messages to OpenAI's shape; one with several tool results becomes several.

    Content that is all text becomes one string; multimodal content stays a list of blocks.
    """
    return [body for message in messages for body in _bodies(message)]


def openai_message(message: BaseMessage) -> dict[str, Any]:
    """Convert one message, such as a model's output, to OpenAI's shape."""
    return _bodies(message)[0]


def openai_tool(tool: Any) -> dict[str, Any]:
    """Describe a tool in OpenAI's shape; a provider's built-in tool stays as it is."""
    try:
        return convert_to_openai_tool(tool)
    except ValueError:
        if isinstance(tool, Mapping):
            return dict(tool)
        raise


def sampling_params(invocation: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the sampling parameters only; others may be endpoints, headers and keys."""
    return {name: invocation[name] for name in _PARAMS if invocation.get(name) is not None}


def user_tags(tags: Sequence[str]) -> list[str]:
    """Drop the tags with which LangChain numbers the steps of a chain."""
    return [tag for tag in tags if not _STEP_TAG.fullmatch(tag)]


def user_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what the frameworks add to every run, and the thread and user ids."""
    return {key: value for key, value in metadata.items() if not _FRAMEWORK_KEY.fullmatch(key)}


def first_id(name: str, *places: Mapping[str, Any] | None) -> str | None:
    """The id of that name from the first place that has it, as a string."""
    found = (place[name] for place in places if place and place.get(name) is not None)
    value = next(found, None)
    return None if value is None else str(value)


def _bodies(message: BaseMessage) -> list[dict[str, Any]]:
    bodies = convert_to_openai_messages([message], text_format="block")
    for body in bodies:
        body["content"] = _joined(body["content"])
    if isinstance(message, AIMessage) and message.invalid_tool_calls:
        # LangChain leaves these out, but the model wrote them.
        calls = [_raw_call(call) for call in message.invalid_tool_calls]
        bodies[0].setdefault("tool_calls", []).extend(calls)
    return bodies


def _joined(content: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    # No separator: providers split one sentence into several blocks to cite sources.
    if all(block.get("type") == "text" for block in content):
        return "".join(block["text"] for block in content)
    return content


def _raw_call(call: InvalidToolCall) -> dict[str, Any]:
    function = {"name": call["name"] or "", "arguments": call["args"] or ""}
    return {"type": "function", "id": call["id"], "function": function}
