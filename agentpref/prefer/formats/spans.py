"""Spans of model calls: what their attributes say, by the conventions that instrumentations follow.

OpenTelemetry's GenAI attributes and events, in the present form and the older ones, OpenInference's
``llm.*`` (Phoenix) and MLflow's ``mlflow.*``. OTLP, Phoenix and MLflow write the same spans in
different envelopes; their formats take these off and share what follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.formats.chat import (
    Answer,
    answers_of,
    finished,
    kept,
    mapping,
    maybe_id,
    messages_of,
    parsed,
    tools_of,
)
from agentpref.prefer.logged import LeftOut, Logged, LoggedRun
from agentpref.types import INCOMPLETE, Message

_CALLS = {"chat", "text_completion", "generate_content", "completion"}
_KINDS = {"LLM", "CHAT_MODEL"}
_USAGE = {
    "prompt_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens",
                      "llm.token_count.prompt", "mlflow.chat.tokenUsage.input_tokens"),
    "completion_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens",
                          "llm.token_count.completion", "mlflow.chat.tokenUsage.output_tokens"),
}  # fmt: skip
_READ = ("gen_ai", "llm", "mlflow", "openinference", "session", "user", "enduser", "input",
         "output", "tag", "metadata", "traceloop", "server", "error")  # fmt: skip
"""The first words of attributes that are read, or say nothing of the answer."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span without its envelope. ``events`` are names and attributes.

    ``in_trace`` is false where scores name a span by its own id alone.
    """

    trace_id: str
    span_id: str
    started_at: float
    name: str
    attributes: Mapping[str, Any]
    events: Sequence[tuple[str, Mapping[str, Any]]] = ()
    failed: bool = False
    metadata: Mapping[str, Any] | None = None
    thread_id: str | None = None
    user_id: str | None = None
    in_trace: bool = True

    @property
    def id(self) -> str:
        """The id of its run: a span's own is unique only in its trace."""
        return f"{self.trace_id}/{self.span_id}" if self.in_trace else self.span_id


def runs_of(span: Span) -> Iterator[Logged]:
    """Read the runs of a span, one for each answer; any other span is left out."""
    tree = nested(span.attributes)
    kind = at(tree, "openinference.span.kind") or at(tree, "mlflow.spanType")
    operation = at(tree, "gen_ai.operation.name") or at(tree, "llm.request.type")
    if str(operation) not in _CALLS and str(kind).strip('"').upper() not in _KINDS:
        yield LeftOut(f"span of kind {operation or kind}" if operation or kind else "span")
        return
    found = _conversation(tree, span)
    if found is None:
        yield LeftOut("model call without its messages")
        return
    asked, answers, tools = found
    reasons = parsed(at(tree, "gen_ai.response.finish_reasons"))
    reasons = reasons if isinstance(reasons, list) else []
    thread = at(tree, "gen_ai.conversation.id") or at(tree, "session.id") or span.thread_id
    user = at(tree, "user.id") or at(tree, "enduser.id") or span.user_id
    unread = sorted({key for key in span.attributes if key.split(".")[0] not in _READ})
    for number, answer in enumerate(answers):
        reason = finished(reasons[number]) if number < len(reasons) else None
        reason = answer.finish_reason or reason or finished(at(tree, "llm.finish_reason"))
        yield LoggedRun(
            id=f"{span.id}:{number}" if number else span.id,
            created_at=span.started_at,
            messages=asked,
            output=answer.message,
            tools=tools_of(tools),
            model=_first(tree, _MODELS),
            thread_id=maybe_id(thread, "the id of the conversation"),
            trace_id=span.trace_id,
            user_id=maybe_id(user, "the id of the user"),
            params=_params(tree),
            tags=tuple(map(str, parsed(at(tree, "tag.tags")) or ())),
            metadata=kept(
                **{str(key): value for key, value in mapping(at(tree, "metadata")).items()}
                | {
                    "finish_reason": INCOMPLETE if span.failed else reason,
                    "usage": {
                        name: used
                        for name, places in _USAGE.items()
                        if (used := _first(tree, places)) is not None
                    },
                    "name": span.name,
                    "provider": at(tree, "gen_ai.provider.name") or at(tree, "gen_ai.system"),
                    "response_id": at(tree, "gen_ai.response.id"),
                }
                | {**(span.metadata or {})}
            ),
            unread=tuple(f"attributes.{key}" for key in unread),
        )


_MODELS = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name", "mlflow.llm.model")

_Found = tuple[list[Message], list[Answer], Any]


def _conversation(tree: Mapping[str, Any], span: Span) -> _Found | None:
    """The messages of a span, its answers and tools; None if it did not capture them."""
    for read in (_present, _in_events, _numbered, _openinference, _mlflow):
        found = read(tree, span)
        if found is not None and found[0] and found[1]:
            return found
    return None


def _present(tree: Mapping[str, Any], span: Span) -> _Found | None:
    """The attributes of today, on the span or on the event with the details of its operation."""
    places = [tree]
    details = ("gen_ai.client.inference.operation.details", "gen_ai.content")
    places += [nested(attributes) for name, attributes in span.events if name in details]
    for place in places:
        asked = parsed(at(place, "gen_ai.input.messages"))
        answered = parsed(at(place, "gen_ai.output.messages"))
        if not asked or not answered:
            continue
        brief = parsed(at(place, "gen_ai.system_instructions"))
        told = [{"role": "system", "parts": brief}] if brief else []
        told = [{"role": "system", "content": brief}] if isinstance(brief, str) and brief else told
        messages = messages_of([*told, *_listed(asked)], "gen_ai.input.messages")
        answers = answers_of(answered, "gen_ai.output.messages")
        return messages, answers, at(place, "gen_ai.tool.definitions")
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [{"role": "user", "content": value}]


def _in_events(tree: Mapping[str, Any], span: Span) -> _Found | None:
    """One event for each message, as until version 1.36, or all in two, as until 1.28."""
    asked: list[Message] = []
    answers: list[Answer] = []
    for name, attributes in span.events:
        if name == "gen_ai.content.prompt":
            asked = messages_of(attributes.get("gen_ai.prompt"), "gen_ai.prompt")
        elif name == "gen_ai.content.completion":
            answers = answers_of(attributes.get("gen_ai.completion"), "gen_ai.completion")
        elif name == "gen_ai.choice":
            body = mapping(attributes.get("message")) or {
                key: parsed(value) for key, value in attributes.items() if "." not in key
            }
            said = answers_of({"role": "assistant", "content": None} | body, name)
            reason = finished(attributes.get("finish_reason"))
            answers += [answer._replace(finish_reason=reason) for answer in said]
        elif name in _MESSAGES:
            body = {key: parsed(value) for key, value in attributes.items() if "." not in key}
            body = {"role": _MESSAGES[name], "content": None} | body
            if body["role"] == "tool" and "id" in body:
                body["tool_call_id"] = body.pop("id")
            asked += messages_of([body], name)
    return (asked, answers, at(tree, "gen_ai.tool.definitions")) if asked and answers else None


_MESSAGES = {
    f"gen_ai.{role}.message": role for role in ("system", "user", "assistant", "tool")
}  # fmt: skip


def _numbered(tree: Mapping[str, Any], span: Span) -> _Found | None:
    """``gen_ai.prompt.0.content``, as OpenLLMetry writes it, or the whole prompt in one."""
    asked, answered = at(tree, "gen_ai.prompt"), at(tree, "gen_ai.completion")
    if not asked or not answered:
        return None
    replies = [answer for one in _rows(answered) for answer in answers_of(one, "gen_ai.completion")]
    functions = at(tree, "llm.request.functions")
    return messages_of(_rows(asked), "gen_ai.prompt"), replies, _rows(functions or [])


def _openinference(tree: Mapping[str, Any], span: Span) -> _Found | None:
    asked, answered = at(tree, "llm.input_messages"), at(tree, "llm.output_messages")
    if not asked or not answered:
        return None
    messages = messages_of([_unwrapped(one) for one in _rows(asked)], "llm.input_messages")
    said = [_unwrapped(one) for one in _rows(answered)]
    answers = [answer for one in said for answer in answers_of(one, "llm.output_messages")]
    tools = [at(one, "tool.json_schema") for one in _rows(at(tree, "llm.tools") or [])]
    return messages, answers, [parsed(tool) for tool in tools if tool]


def _unwrapped(row: Any) -> dict[str, Any]:
    """A message of OpenInference, whose fields have ``message.`` before their names."""
    message = mapping(at(mapping(row), "message")) or mapping(row)
    keys = ("role", "content", "name", "tool_call_id")
    found: dict[str, Any] = {key: message.get(key) for key in keys}
    parts = [mapping(at(mapping(one), "message_content")) for one in _rows(message.get("contents"))]
    if parts:
        found["content"] = [
            {"type": "text", "text": part["text"]} if "text" in part
            else {"type": "image_url", "image_url": {"url": at(part, "image.image.url")}}
            for part in parts
        ]  # fmt: skip
    calls = [mapping(at(mapping(one), "tool_call")) for one in _rows(message.get("tool_calls"))]
    if calls:
        found["tool_calls"] = [
            {"id": call.get("id"), "function": mapping(call.get("function"))} for call in calls
        ]
    return {key: value for key, value in found.items() if value is not None}


def _mlflow(tree: Mapping[str, Any], span: Span) -> _Found | None:
    """The arguments and the result of the call that MLflow traced, as JSON."""
    asked = parsed(at(tree, "mlflow.spanInputs"))
    answered = parsed(at(tree, "mlflow.spanOutputs"))
    if not asked or not answered:
        return None
    tools = at(tree, "mlflow.chat.tools") or (
        asked.get("tools") if isinstance(asked, dict) else None
    )
    messages = messages_of(asked, "mlflow.spanInputs")
    return messages, answers_of(answered, "mlflow.spanOutputs"), tools


def _params(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked of the model beside the messages."""
    request = mapping(at(tree, "gen_ai.request"))
    names = {"stop_sequences": "stop", "choice": "n"}
    asked = {names.get(key, key): value for key, value in request.items() if key != "model"}
    if isinstance(asked.get("n"), Mapping):
        asked["n"] = asked["n"].get("count")
    given = asked or mapping(at(tree, "llm.invocation_parameters"))
    for key in ("tools", "messages", "model"):
        given.pop(key, None)
    return given


def _first(tree: Mapping[str, Any], places: Sequence[str]) -> Any:
    found = (at(tree, place) for place in places)
    return next((value for value in found if value not in (None, "")), None)


# Attributes: names with dots, perhaps with numbers, or objects inside one another


def nested(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Put attributes whose names have dots inside one another; JSON text stays text.

    >>> nested({"llm.tools.0.name": "weather", "llm": {"model_name": "m"}})
    {'llm': {'tools': {'0': {'name': 'weather'}}, 'model_name': 'm'}}
    """
    tree: dict[str, Any] = {}
    for name in sorted(attributes, key=len, reverse=True):
        *branches, leaf = name.split(".")
        place = tree
        for branch in branches:
            below = place.setdefault(branch, {})
            if not isinstance(below, dict):
                break
            place = below
        else:
            value = attributes[name]
            if isinstance(value, Mapping):
                value = nested(value)
            if not isinstance(place.get(leaf), dict):
                place[leaf] = value
            elif isinstance(value, dict):
                place[leaf] |= value
    return tree


def at(tree: Mapping[str, Any], name: str) -> Any:
    """What attributes have under a name; objects inside them may be written as JSON text."""
    value: Any = tree
    for branch in name.split("."):
        value = mapping(value).get(branch)
    return value


def _rows(value: Any) -> list[Any]:
    """The items of a list, or of the numbers that attributes have for one, in their order."""
    found = parsed(value)
    if isinstance(found, Mapping):
        if not all(key.isdigit() for key in found):
            raise ExchangeError("a list of messages has names where numbers should be")
        return [_unfolded(found[key]) for key in sorted(found, key=int)]
    if isinstance(found, list):
        return [nested(one) if isinstance(one, Mapping) else one for one in found]
    return [] if found is None else [found]


def _unfolded(value: Any) -> Any:
    """A message whose lists are numbered, with lists."""
    if not isinstance(value, Mapping):
        return value
    numbered = bool(value) and all(key.isdigit() for key in value)
    if numbered:
        return [_unfolded(value[key]) for key in sorted(value, key=int)]
    return {key: _unfolded(inner) for key, inner in value.items()}
