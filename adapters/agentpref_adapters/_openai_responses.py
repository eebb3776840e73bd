"""OpenAI's Responses API, as the log holds it: chat messages.

A request has items where a chat has messages, and may leave out all that came before it: it then
names the response, or the conversation, that it continues. :class:`Memory` keeps what a client has
seen of those. What a chat message cannot express, such as a web search, stays among its content as
the item that it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from agentpref.types import INCOMPLETE, Message
from agentpref_adapters._openai_chat import Answer, Asked

MOST_KEPT = 10_000
MOST_BYTES = 64 * 1024 * 1024
"""How many turns, and how many bytes of them, a client remembers; the oldest are forgotten."""

RUNNING = ("queued", "in_progress")
"""The states of a response that answers in the background."""

_REASONS = {"max_output_tokens": "length"}  # what chat completions call it


class _Turn(NamedTuple):
    """What a response adds to the turn before it; a conversation has no messages of its own."""

    previous: str | None
    unknown: str | None  # what it continues and nobody here has seen
    thread_id: str
    messages: list[Message]
    size: int


class Memory:
    """The turns of conversations that continue, newest last; the caller holds a lock."""

    def __init__(self, most: int = MOST_KEPT, most_bytes: int = MOST_BYTES) -> None:
        self._turns: OrderedDict[str, _Turn] = OrderedDict()
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0

    def add(
        self,
        name: str,
        previous: str | None,
        thread_id: str,
        messages: list[Message],
        size: int = 0,
    ) -> None:
        """Remember what a response, or a conversation, has beside what it continues."""
        before = self._turns.get(previous) if previous else None
        unknown = previous if before is None else None
        if before is None:
            previous = None
        elif not before.messages:
            previous = before.previous
        self._drop(name)
        self._turns[name] = _Turn(previous, unknown, thread_id, messages, size)
        self._bytes += size
        while len(self._turns) > 1 and (
            len(self._turns) > self._most or self._bytes > self._most_bytes
        ):
            self._drop(next(iter(self._turns)))

    def before(self, name: str) -> tuple[list[Message], str | None, str | None]:
        """All that was said up to a response: its messages, its thread, and what is unknown."""
        turns: dict[str, _Turn] = {}
        at: str | None = name
        while at is not None and at not in turns and (turn := self._turns.get(at)) is not None:
            self._turns.move_to_end(at)  # a conversation is forgotten as a whole, if at all
            turns[at] = turn
            at = turn.previous
        if not turns:
            return [], None, name
        newest, *_ = turns.values()
        *_, oldest = turns.values()
        messages = [message for turn in reversed(turns.values()) for message in turn.messages]
        return messages, newest.thread_id, at or oldest.unknown

    def _drop(self, name: str) -> None:
        if (turn := self._turns.pop(name, None)) is not None:
            self._bytes -= turn.size


def continues(body: Mapping[str, Any]) -> str | None:
    """The response or the conversation that a request continues."""
    conversation = body.get("conversation")
    if isinstance(conversation, Mapping):
        conversation = conversation.get("id")
    return body.get("previous_response_id") or conversation


def asked(body: Mapping[str, Any], memory: Memory) -> Asked:
    """What the body of a request asks, after all that it continues.

    Instructions hold for one request, and so do stored prompts, whose text the server knows alone.
    """
    before = continues(body)
    said, thread_id, unknown = memory.before(before) if before else ([], None, None)
    first: list[Message] = []
    if prompt := body.get("prompt"):
        first.append({"role": "developer", "content": [{"type": "prompt", **prompt}]})
        unknown = unknown or prompt.get("id")
    if instructions := body.get("instructions"):
        if isinstance(instructions, str):
            first.append({"role": "system", "content": instructions})
        else:
            first += messages_of(instructions)
    tools = [_tool(tool) for tool in body.get("tools") or ()]
    return Asked([*first, *said, *new_messages(body)], tools, thread_id, unknown)


def new_messages(body: Mapping[str, Any]) -> list[Message]:
    """What a request adds to what it continues."""
    return messages_of(body.get("input") or ())


def answers(reply: Mapping[str, Any]) -> list[Answer]:
    """The answer of a response; none, if it says nothing or is still to come."""
    output = messages_of(reply.get("output") or ())
    if not output or reply.get("status") in RUNNING:
        return []
    return [Answer(0, output[0], _finish_reason(reply, output[0]), None, _logprobs(reply))]


def messages_of(given: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """Items as chat messages; what an assistant thought, wrote and called in a row is one."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    turn: list[Mapping[str, Any]] = []
    for item in given:
        role, kind = item.get("role"), item.get("type") or "message"
        is_result = kind.endswith("_output") and isinstance(item.get("call_id"), str)
        if (role and role != "assistant") or is_result:
            messages += _assistant(turn)
            turn = []
            if is_result:
                said = _content(item.get("output"))
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": said})
            else:
                messages.append({"role": role, "content": _content(item.get("content"))})
        else:
            turn.append(item)
    return [*messages, *_assistant(turn)]


def _assistant(items: Iterable[Mapping[str, Any]]) -> list[Message]:
    """One assistant's message of the items of a turn; none of no items."""
    texts: list[str] = []
    others: list[Any] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type") or "message"
        if kind == "message":
            content = _content(item.get("content"))
            parts = [content] if isinstance(content, str) else content
            said = [part if isinstance(part, str) else part.get("text") for part in parts]
            if all(isinstance(text, str) for text in said):
                texts.append("".join(said))
            else:
                others += parts
        elif kind == "reasoning":
            thoughts += [
                part["text"]
                for part in item.get("content") or item.get("summary") or ()
                if isinstance(part.get("text"), str)
            ]
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "custom_tool_call":
            custom = {"name": item["name"], "input": item["input"]}
            calls.append({"id": item["call_id"], "type": "custom", "custom": custom})
        else:
            others.append(dict(item))
    if not (texts or others or thoughts or calls):
        return []
    text = "\n\n".join(texts)
    content = [*([{"type": "text", "text": text}] if text else []), *others] if others else text
    message: dict[str, Any] = {"role": "assistant", "content": content or None}
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _content(content: Any) -> Any:
    """A content, whose parts are those of chat messages; one text is a string."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_part(part) for part in content]
    if len(parts) == 1 and parts[0].get("type") == "text":
        return parts[0]["text"]
    return parts


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.get("text") or ""}
    if kind == "input_image" and part.get("image_url"):
        image = {"url": part["image_url"], "detail": part.get("detail")}
        return {"type": "image_url", "image_url": {k: v for k, v in image.items() if v}}
    if kind == "input_file" and not part.get("file_url"):
        return {"type": "file", "file": {k: v for k, v in part.items() if k != "type" and v}}
    return dict(part)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function" or "function" in tool:
        return dict(tool)  # a tool of the server's own
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _finish_reason(reply: Mapping[str, Any], output: Message) -> str | None:
    status = reply.get("status")
    if status == "completed":
        return "tool_calls" if output.get("tool_calls") else "stop"
    if status == "incomplete":
        reason = (reply.get("incomplete_details") or {}).get("reason")
        return _REASONS.get(reason or "", reason) or INCOMPLETE
    return None if status is None else INCOMPLETE  # failed or cancelled


def _logprobs(reply: Mapping[str, Any]) -> list[float] | None:
    parts = (part for item in reply["output"] for part in item.get("content") or ()
             if item.get("type") == "message")  # fmt: skip
    return [token["logprob"] for part in parts for token in part.get("logprobs") or ()] or None


class Pieces:
    """Puts the events of a stream together."""

    def __init__(self) -> None:
        self._reply: dict[str, Any] = {}
        self._items: dict[int, dict[str, Any]] = {}
        self._texts: dict[tuple[int, int], list[str]] = {}
        self._arguments: dict[int, list[str]] = {}

    def add(self, event: Any) -> bool:
        """Add an event; say whether the response has ended."""
        kind = event.type
        if kind == "response.output_text.delta":
            place = (event.output_index, event.content_index)
            self._texts.setdefault(place, []).append(event.delta)
        elif kind == "response.function_call_arguments.delta":
            self._arguments.setdefault(event.output_index, []).append(event.delta)
        elif kind in ("response.output_item.added", "response.output_item.done"):
            if event.item is not None:
                self._items[event.output_index] = _plain(event.item)
            if kind.endswith("done"):  # it has all of its text
                self._arguments.pop(event.output_index, None)
                for place in [p for p in self._texts if p[0] == event.output_index]:
                    del self._texts[place]
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            items = self.reply()["output"]
            self._reply = _plain(event.response)
            self._reply["output"] = self._reply.get("output") or items
            return True
        elif kind == "response.created":
            self._reply = {"id": event.response.id, "model": event.response.model}
        return False

    def reply(self) -> dict[str, Any]:
        """The response so far; one that has not ended is incomplete."""
        if "output" in self._reply:
            return self._reply
        items = {index: dict(item) for index, item in sorted(self._items.items())}
        for (index, _), texts in sorted(self._texts.items()):
            item = items.setdefault(index, {"type": "message", "role": "assistant"})
            part = {"type": "output_text", "text": "".join(texts)}
            item["content"] = [*(item.get("content") or ()), part]
        for index, arguments in self._arguments.items():
            if index in items:
                items[index]["arguments"] = "".join(arguments)
        return {**self._reply, "status": "incomplete", "output": list(items.values())}


def _plain(model: Any) -> dict[str, Any]:
    plain: dict[str, Any] = model.to_dict(mode="json", warnings=False)
    return plain
