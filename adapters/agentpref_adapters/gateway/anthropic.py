"""``/v1/messages``: Anthropic's wire format, over the same core.

A request becomes one in OpenAI's shape, so that runs are logged alike whichever library an app
uses; the answer is turned back. What has no counterpart is refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse

from agentpref.errors import described
from agentpref_adapters._http import BAD_REQUEST, HttpError, as_json
from agentpref_adapters.gateway.calls import Call, as_failure
from agentpref_adapters.gateway.openai import EVENTS, Streamed

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
          "content_filter": "refusal"}  # fmt: skip
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip
_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")
_KNOWN = frozenset(
    {*_SAME, "messages", "system", "stop_sequences", "tools", "tool_choice", "metadata"}
)
_HINTS = frozenset({
    "cache_control", "context_management", "diagnostics", "inference_geo", "output_config",
    "service_tier", "speed", "thinking", "user_profile_id", "workspace_id",
})  # fmt: skip
"""Fields that agents always send, and that change how Anthropic works, not what is asked for. They
are left out, and named in the run's metadata."""


def as_openai(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request in OpenAI's shape.

    Raises:
        HttpError: 400, which names what is wrong or has no counterpart.
    """
    for name, value in body.items():
        if name not in _KNOWN | _HINTS and value is not None:
            raise _bad(f"{name} is not supported here; leave it out", name)
    found: dict[str, Any] = {name: body[name] for name in _SAME if body.get(name) is not None}
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": _text(body["system"], "system")})
    for number, message in enumerate(_list(body.get("messages"), "messages")):
        messages += _messages(message, f"messages.{number}")
    found["messages"] = messages
    if body.get("stop_sequences"):
        found["stop"] = body["stop_sequences"]
    if body.get("tools"):
        found["tools"] = [_tool(tool, n) for n, tool in enumerate(_list(body["tools"], "tools"))]
    if body.get("tool_choice"):
        found |= _tool_choice(body["tool_choice"])
    if body.get("stream"):
        found["stream_options"] = {"include_usage": True}
    output = body.get("output_config")
    if isinstance(output, Mapping) and isinstance(output.get("format"), Mapping):
        schema = {"name": "answer", "schema": output["format"].get("schema"), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    metadata = body.get("metadata")
    if not isinstance(metadata, Mapping | None):
        raise _bad(f"metadata is {described(metadata)}, but must be an object", "metadata")
    kept = dict(metadata) if isinstance(metadata, Mapping) else {}
    kept = {key: value for key, value in kept.items() if value is not None}
    if left_out := sorted(name for name in body if name in _HINTS - {"output_config"}):
        kept["left_out"] = left_out
    if kept:
        found["metadata"] = kept
    return found


def whole(completion: dict[str, Any], headers: dict[str, str]) -> Response:
    """A whole answer: the first choice, as there is never another."""
    choice = _first(completion.get("choices"))
    blocks = _blocks(_mapping(choice.get("message")))
    reason, stop = _ending(choice, calls=any(block["type"] == "tool_use" for block in blocks))
    message = {
        "id": completion["id"],
        "type": "message",
        "role": "assistant",
        "model": completion.get("model"),
        "content": blocks,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": _usage(_mapping(completion.get("usage"))),
    }
    return as_json(message, headers=headers)


def streamed(call: Call) -> Response:
    """An answer as Anthropic's events."""
    return Streamed(call, _events(call.pieces(), call.asked.run_id, call.asked.body.get("model")))


def replayed(completion: dict[str, Any], headers: dict[str, str]) -> Response:
    """An answer that was given before, as a stream of one piece."""

    async def pieces() -> AsyncIterator[dict[str, Any]]:
        choice = _first(completion.get("choices"))
        message = _mapping(choice.get("message"))
        calls = [{"index": n, **c} for n, c in enumerate(_mappings(message.get("tool_calls")))]
        delta = {**message, "tool_calls": calls}
        yield {**completion, "choices": [{**choice, "delta": delta}]}

    return StreamingResponse(
        _events(pieces(), completion["id"], completion.get("model")),
        media_type="text/event-stream",
        headers={**headers, **EVENTS},
    )


def failed(error: HttpError) -> Response:
    """A request that failed before its first piece."""
    return as_json(_error(error), error.status, error.headers)


async def _events(
    pieces: AsyncIterator[dict[str, Any]], run_id: str, model: Any
) -> AsyncIterator[bytes]:
    """Anthropic's events of an answer: blocks of text and of tool use, one after the other."""
    start = {"id": run_id, "type": "message", "role": "assistant", "model": model, "content": [],
             "stop_reason": None, "stop_sequence": None, "usage": _usage({})}  # fmt: skip
    yield _event("message_start", message=start)
    last: Mapping[str, Any] = {}
    writer, usage = _Blocks(), _usage({})
    try:
        async for piece in pieces:
            usage = _usage(_mapping(piece["usage"])) if piece.get("usage") else usage
            for choice in _mappings(piece.get("choices")):
                for event in writer.write(_mapping(choice.get("delta"))):
                    yield event
                last = choice if choice.get("finish_reason") else last
    except Exception as error:  # a stream ends with an event, whatever broke
        yield _event("error", error=_error(as_failure(error))["error"])
        return
    for event in writer.end():
        yield event
    reason, stop = _ending(last, calls=writer.called)
    delta = {"stop_reason": reason, "stop_sequence": stop}
    yield _event("message_delta", delta=delta, usage=usage)
    yield _event("message_stop")


class _Blocks:
    """Writes deltas as blocks; one is open at a time."""

    def __init__(self) -> None:
        self.called = False
        self._last: Any = 0  # the call that came last
        self._count, self._open = 0, ""  # what is open: "text", "thinking", or a call's number

    def write(self, delta: Mapping[str, Any]) -> list[bytes]:
        """The events of one delta."""
        events: list[bytes] = []
        if delta.get("reasoning_content"):
            thought = delta["reasoning_content"]
            events += self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events.append(self._delta({"type": "thinking_delta", "thinking": thought}))
        if text := _joined(delta.get("content")):
            events += self._begin("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": text}))
        for call in _mappings(delta.get("tool_calls")):
            self.called = True
            function = _mapping(call.get("function"))
            which = call.get("index")
            self._last = which if which is not None else call.get("id") or self._last
            name = f"call {self._last}"
            if name != self._open:
                block = {"type": "tool_use", "id": call.get("id"), "name": function.get("name")}
                block["input"] = {}
                events += self._begin(name, block)
            if function.get("arguments"):
                part = {"type": "input_json_delta", "partial_json": function["arguments"]}
                events.append(self._delta(part))
        return events

    def end(self) -> list[bytes]:
        """The event that ends the open block, if one is."""
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._count - 1)]

    def _begin(self, what: str, block: Mapping[str, Any]) -> list[bytes]:
        if what == self._open:
            return []
        ended = self.end()
        self._open, self._count = what, self._count + 1
        return [*ended, _event("content_block_start", index=self._count - 1, content_block=block)]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._count - 1, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def _error(error: HttpError) -> dict[str, Any]:
    kind = _ERRORS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    def count(name: str) -> int:
        return usage[name] if type(usage.get(name)) is int else 0

    return {"input_tokens": count("prompt_tokens"), "output_tokens": count("completion_tokens")}


def _ending(choice: Mapping[str, Any], *, calls: bool) -> tuple[str, str | None]:
    """Why an answer ended, and at which stop sequence, where the server says so, as vLLM does."""
    if isinstance(stop := choice.get("stop_reason"), str):
        return "stop_sequence", stop
    reason = _STOPS.get(str(choice.get("finish_reason")), "end_turn")
    return "tool_use" if calls and reason == "end_turn" else reason, None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _first(choices: Any) -> Mapping[str, Any]:
    return next(iter(_mappings(choices)), {})


def _joined(content: Any) -> str:
    """A content as text; some servers write it in parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in _mappings(content))


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        thought = message["reasoning_content"]
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if text := _joined(message.get("content")):
        blocks.append({"type": "text", "text": text})
    for call in _mappings(message.get("tool_calls")):
        function = _mapping(call.get("function"))
        name, written = function.get("name"), function.get("arguments") or "{}"
        try:
            given = orjson.loads(written)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            given = {"arguments": written}  # what the model wrote, though it is no object of JSON
        blocks.append({"type": "tool_use", "id": call.get("id"), "name": name, "input": given})
    return blocks


def _messages(message: Any, where: str) -> list[dict[str, Any]]:
    """The messages in OpenAI's shape that one of Anthropic's stands for."""
    if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant"):
        raise _bad(f"{where} needs a role, user or assistant", where)
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for number, block in enumerate(_list(content, f"{where}.content")):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            parts.append({"type": "text", "text": str(block.get("text", ""))})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _address(block, where)}})
        elif kind == "tool_use":
            arguments = orjson.dumps(block.get("input") or {}).decode()
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = _text(block.get("content") or "", where)
            text = f"Error: {text}" if block.get("is_error") else text
            call = block.get("tool_use_id")
            results.append({"role": "tool", "tool_call_id": call, "content": text})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            name = f"{where}.content.{number}"
            raise _bad(f"{name} is a block of type {_word(kind)}, which is not supported", name)
    found: dict[str, Any] = {"role": role, "content": _plain(parts)}
    if calls:
        found["tool_calls"] = calls
    if thoughts:
        found["reasoning_content"] = "".join(thoughts)
    return [*results, found] if parts or calls else results or [found]


def _plain(parts: list[dict[str, Any]]) -> Any:
    """Parts that are all text as one text, which every chat template takes."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _address(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    if not isinstance(source, Mapping):
        raise _bad(f"{where} has an image without a source", where)
    if source.get("type") == "url":
        return str(source.get("url"))
    return f"data:{source.get('media_type')};base64,{source.get('data')}"


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    blocks = _list(content, where)
    texts = [block.get("text") for block in blocks if isinstance(block, Mapping)]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) != len(blocks):
        raise _bad(f"{where} has a block that is no text", where)
    return "\n".join(known)


def _tool(tool: Any, number: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not tool.get("name"):
        raise _bad(f"tools.{number} needs a name", "tools")
    if tool.get("type") not in (None, "custom"):
        raise _bad(
            f"tools.{number} is of type {_word(tool['type'])}, which only Anthropic's own "
            "servers run; leave it out",
            "tools",
        )
    function = {"name": tool["name"], "parameters": tool.get("input_schema") or {}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "tool":
        found: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _CHOICES:
        found = _CHOICES[kind]
    else:
        raise _bad("tool_choice needs a type: auto, any, tool or none", "tool_choice")
    one = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    return {"tool_choice": found, **one}


def _word(value: Any) -> str:
    """A word that is no user's text, so that the client sees which it is."""
    return repr(value) if isinstance(value, str) and len(value) <= 40 else described(value)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(f"{name} is {described(value)}, but must be a list", name)
    return value


def _bad(message: str, param: str) -> HttpError:
    return HttpError(BAD_REQUEST, message, param=param, code="invalid_value")
