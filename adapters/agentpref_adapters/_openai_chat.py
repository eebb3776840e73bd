"""Chat completions, as the log holds them: what was asked, and each answer.

It reads the JSON that went over the wire, so that an answer is logged as its server wrote it: with
the reasoning, and without what a client's helpers parsed of it. A stream's chunks are put together
to the reply that would have come in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agentpref.types import INCOMPLETE, Message, Tool

PARAMS = frozenset(
    (
        "max_tokens", "max_completion_tokens", "max_output_tokens", "temperature", "top_p", "top_k",
        "min_p", "seed", "n", "stop", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "reasoning_effort", "reasoning", "verbosity", "text",
        "response_format", "tool_choice", "parallel_tool_calls", "chat_template_kwargs",
    )
)  # fmt: skip
"""What is logged of a request beside its messages and tools; never keys, headers and addresses."""

_REVISION = re.compile(r"rev-\d{6,}-[0-9a-f]{12}")
_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")


class Asked(NamedTuple):
    """A request: what the model was given, as far as it is known.

    ``thread_id`` is the conversation that it belongs to by itself. ``unknown`` names what came
    before it and is not among the messages, because this client has not seen it.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool]
    thread_id: str | None = None
    unknown: str | None = None


class Answer(NamedTuple):
    """One answer of a reply; ``number`` counts several to the same request from 0."""

    number: int
    output: Message
    finish_reason: str | None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None


def asked(body: Mapping[str, Any]) -> Asked:
    """What the body of a request asks; tools of the old form become tools."""
    functions = body.get("functions") or ()
    older = [{"type": "function", "function": function} for function in functions]
    messages = [
        _said(message) if message.get("role") == "assistant" else message
        for message in body["messages"]
    ]
    return Asked(messages, [*(body.get("tools") or ()), *older])


def answers(reply: Mapping[str, Any]) -> list[Answer]:
    """The answers of a reply; one that says nothing at all is none."""
    found = []
    for place, choice in enumerate(reply["choices"]):
        message = _said(choice["message"])
        reason = choice.get("finish_reason")
        if not (reason or any(message.get(key) for key in (*_TEXTS, "tool_calls", "audio"))):
            continue
        if reason == INCOMPLETE and not (
            message.keys() - {"role", "content"} or message["content"]
        ):
            continue
        tokens = (choice.get("logprobs") or {}).get("content") or ()
        found.append(
            Answer(
                choice.get("index", place),
                {"role": "assistant", "content": None, **message},
                reason,
                choice.get("token_ids"),
                [token["logprob"] for token in tokens] or None,
            )
        )
    return found


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """An assistant's message without what says nothing.

    Empty lists of annotations come and go between a whole answer, a streamed one and a history.
    """
    return {key: value for key, value in message.items() if value or key == "content"}


def is_of_gateway(reply: Mapping[str, Any]) -> bool:
    """Whether the fingerprint of a reply names a revision, as only a gateway writes it."""
    return _REVISION.search(reply.get("system_fingerprint") or "") is not None


class Pieces:
    """Puts the chunks of a stream together; ``number`` is how many answers were asked for."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._reply: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._ended = 0

    def add(self, chunk: Any) -> bool:
        """Add a chunk; say whether all answers have ended."""
        if not self._reply:
            self._reply = {
                "id": chunk.id,
                "model": chunk.model,
                "system_fingerprint": chunk.system_fingerprint,
            }
        for choice in chunk.choices or ():
            found = self._choices.setdefault(choice.index, _empty())
            extra = choice.model_extra or {}
            found["token_ids"] += extra.get("token_ids") or ()
            if choice.delta is not None:
                _add_delta(found["message"], choice.delta)
            if (logprobs := choice.logprobs) is not None:
                found["logprobs"] += [token.logprob for token in logprobs.content or ()]
            if choice.finish_reason:
                self._ended += found["finish_reason"] is None
                found["finish_reason"] = choice.finish_reason
        return self._ended >= self._number

    def reply(self) -> dict[str, Any]:
        """The reply so far; answers that have not ended are incomplete."""
        choices = []
        for index, found in sorted(self._choices.items()):
            message = {key: "".join(texts) or None for key, texts in found["message"].items()
                       if key in _TEXTS}  # fmt: skip
            calls = [_call(call) for _, call in sorted(found["message"]["tool_calls"].items())]
            function = found["message"]["function_call"]
            older = {"function_call": {k: "".join(v) for k, v in function.items()}}
            choices.append(
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        **message,
                        **({"tool_calls": calls} if calls else {}),
                        **(older if any(function.values()) else {}),
                    },
                    "finish_reason": found["finish_reason"] or INCOMPLETE,
                    "logprobs": {"content": [{"logprob": value} for value in found["logprobs"]]},
                    "token_ids": found["token_ids"] or None,
                }
            )
        return {**self._reply, "choices": choices}


def _empty() -> dict[str, Any]:
    texts: dict[str, Any] = {key: [] for key in _TEXTS}
    message = texts | {"tool_calls": {}, "function_call": {"name": [], "arguments": []}}
    return {"message": message, "finish_reason": None, "logprobs": [], "token_ids": []}


def _add_delta(message: dict[str, Any], delta: Any) -> None:
    if delta.content:
        message["content"].append(delta.content)
    if delta.refusal:
        message["refusal"].append(delta.refusal)
    for key, value in (delta.model_extra or {}).items():
        if key in _TEXTS and isinstance(value, str):
            message[key].append(value)
    for call in delta.tool_calls or ():
        found = message["tool_calls"].setdefault(
            call.index, {"id": None, "type": "function", "name": [], "arguments": []}
        )
        found["id"] = call.id or found["id"]
        found["type"] = call.type or found["type"]
        if call.function is not None:
            _add_function(found, call.function)
    if delta.function_call is not None:
        _add_function(message["function_call"], delta.function_call)


def _add_function(found: dict[str, Any], function: Any) -> None:
    if function.name:
        found["name"].append(function.name)
    if function.arguments:
        found["arguments"].append(function.arguments)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": "".join(call["name"]), "arguments": "".join(call["arguments"])}
    return {"id": call["id"], "type": call["type"], "function": function}
