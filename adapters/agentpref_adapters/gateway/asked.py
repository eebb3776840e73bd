"""What an app asks for: a chat completion in OpenAI's shape, and whose it is.

Apps say who asks, and in which conversation, in many ways: in the body's ``metadata`` and ``user``,
in headers that Open WebUI and LibreChat can send, or not at all. Then the beginning of the
conversation names its thread, so that a canary answers all of it or nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from agentpref.errors import described
from agentpref.models.grammar import function_of
from agentpref.record.messages import check_shapes, check_tool_shapes, new_id
from agentpref.types import Message, Tool
from agentpref_adapters._http import BAD_REQUEST, HttpError

MAX_CHOICES = 16
"""The most answers to one call."""

_THREAD_HEADERS = ("x-thread-id", "x-openwebui-chat-id", "x-librechat-conversation-id")
_TRACE_HEADERS = ("x-trace-id",)
_USER_HEADERS = ("x-user-id", "x-openwebui-user-id", "x-librechat-user-id")
_MESSAGE_HEADERS = {"open_webui": "x-openwebui-message-id", "librechat": "x-librechat-message-id"}
_TASK_HEADERS = {"open_webui": "x-openwebui-task", "librechat": "x-librechat-task"}
_CHAT_HEADERS = {"open_webui": "x-openwebui-chat-id", "librechat": "x-librechat-conversation-id"}
_OURS = ("thread_id", "trace_id", "user_id", "tags", "left_out")
"""The keys of ``metadata`` that are for the gateway, and go no further."""

_LONGEST = 256
"""Characters of an id in a header or in metadata."""

SAMPLING = (
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n",
    "stop", "presence_penalty", "frequency_penalty", "logit_bias", "reasoning_effort",
    "response_format", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "best_of",
)  # fmt: skip
"""The parameters of a call that are logged with its run."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One call. ``body`` is the request in OpenAI's shape, without what is for the gateway."""

    body: Mapping[str, Any]
    run_id: str
    thread_id: str
    trace_id: str | None = None
    user_id: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_named: bool = False
    """Whether the app said who asks, or in which conversation."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self.body["messages"])

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model may call."""
        return tuple(self.body.get("tools") or ())

    @property
    def n(self) -> int:
        """How many answers are wanted."""
        return int(self.body.get("n") or 1)

    @property
    def params(self) -> dict[str, Any]:
        """The sampling parameters, for the log."""
        return {name: self.body[name] for name in SAMPLING if self.body.get(name) is not None}

    def run_of(self, index: int) -> str:
        """The run of one of several answers."""
        return f"{self.run_id}:{index}" if index else self.run_id


def read(body: dict[str, Any], headers: Mapping[str, str], *, run_id: str | None = None) -> Asked:
    """Check a request, and find out whose it is.

    Raises:
        HttpError: 400, which names the field.
        InvalidMessage: a message or a tool has no such shape.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", f"is {described(messages)}, but must be a list of messages")
    check_shapes(messages)
    if body.get("tools") is not None:
        if not isinstance(body["tools"], list):
            raise _bad("tools", f"is {described(body['tools'])}, but must be a list")
        check_tool_shapes(body["tools"])
        for number, tool in enumerate(body["tools"]):
            if tool.get("type", "function") == "function" and function_of(tool) is None:
                raise _bad(f"tools.{number}", "needs a function with a name")
    n = body.get("n")
    if n is not None and not (type(n) is int and 1 <= n <= MAX_CHOICES):
        raise _bad("n", f"is {described(n)}, but must be a whole number from 1 to {MAX_CHOICES}")
    if body.get("stream") not in (None, True, False):
        raise _bad("stream", "must be true or false")
    if body.get("logprobs") not in (None, True, False):
        raise _bad("logprobs", "must be true or false")
    if not isinstance(body.get("stop") or [], str | list):
        raise _bad("stop", "must be a text or a list of texts")
    if not isinstance(body.get("stream_options") or {}, dict):
        raise _bad("stream_options", "must be an object")
    given = body.get("metadata")
    if given is not None and not isinstance(given, dict):
        raise _bad("metadata", f"is {described(given)}, but must be an object")
    own = {key: value for key, value in (given or {}).items() if key in _OURS}
    rest = {key: value for key, value in (given or {}).items() if key not in _OURS}
    sent = {key: value for key, value in body.items() if key != "metadata"}
    if rest:
        sent["metadata"] = rest
    user = _id(own.get("user_id"), "metadata.user_id") or _id(body.get("user"), "user")
    user = user or _first(headers, _USER_HEADERS)
    thread = _id(own.get("thread_id"), "metadata.thread_id") or _first(headers, _THREAD_HEADERS)
    trace = _id(own.get("trace_id"), "metadata.trace_id") or _first(headers, _TRACE_HEADERS)
    about, message = _of_chat_app(headers)
    return Asked(
        sent,
        run_id or new_id(),
        # Who asks is no conversation, yet better than nothing: one person sees one revision.
        thread or _id(body.get("user"), "user") or _beginning(messages),
        trace or (_trace_of_message(message) if message else None),
        user,
        _tags(own.get("tags")),
        {**rest, **about, **({"left_out": own["left_out"]} if "left_out" in own else {})},
        bool(user or thread or trace or message),
    )


def _of_chat_app(headers: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """What Open WebUI or LibreChat say of a chat and its message.

    A ``task`` is a call of the app's own, such as for a title: no answer that anybody sees.
    """
    for app, name in _MESSAGE_HEADERS.items():
        message, chat = headers.get(name), headers.get(_CHAT_HEADERS[app])
        found = {"message_id": message, "chat_id": chat, "task": headers.get(_TASK_HEADERS[app])}
        found = {key: value[:_LONGEST] for key, value in found.items() if value}
        if found:
            return {app: found}, message if app == "librechat" else None
    return {}, None


def _trace_of_message(message_id: str) -> str:
    """The trace under which LibreChat sends a message's thumb."""
    return hashlib.sha256(message_id.encode()).hexdigest()[:32]


def _beginning(messages: list[Message]) -> str:
    """A thread's name by its first turns: all up to the first thing that a user said."""
    end = next((at for at, message in enumerate(messages) if message.get("role") == "user"), 0)
    first = orjson.dumps(messages[: end + 1], option=orjson.OPT_SORT_KEYS)
    return f"first-{hashlib.blake2b(first, digest_size=12).hexdigest()}"


def _tags(value: Any) -> tuple[str, ...]:
    """Tags are a list, or as OpenAI's metadata holds text only, words between commas."""
    parts = value.split(",") if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise _bad("metadata.tags", "must be a list of texts, or texts between commas")
    return tuple(part.strip() for part in parts if part.strip())


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((_id(headers[name], name) for name in names if headers.get(name)), None)


def _id(value: Any, name: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _bad(name, f"is {described(value)}, but must be a text")
    text = str(value)
    if len(text) > _LONGEST or not text.isprintable():
        raise _bad(name, f"must be printable text of at most {_LONGEST} characters")
    return text


def _bad(name: str, message: str) -> HttpError:
    return HttpError(BAD_REQUEST, f"{name} {message}", param=name, code="invalid_value")
