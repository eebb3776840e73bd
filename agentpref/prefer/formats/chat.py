"""Prompts and answers as other products log them, in OpenAI's shape.

Products keep what an app or its framework gave them: messages of OpenAI, Anthropic or LangChain,
items of OpenAI's Responses, parts of OpenTelemetry's GenAI conventions, or text. A value that is
none of these is refused, so that no prompt is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import orjson
from pydantic import TypeAdapter, ValidationError

from agentpref.errors import ExchangeError, described
from agentpref.prefer.formats import normalized, require
from agentpref.record.ingest.checks import tidy
from agentpref.types import INCOMPLETE, Message

_ROLES = {
    "human": "user", "HumanMessage": "user", "HumanMessageChunk": "user",
    "ai": "assistant", "model": "assistant", "AIMessage": "assistant",
    "AIMessageChunk": "assistant", "SystemMessage": "system", "ToolMessage": "tool",
    "FunctionMessage": "function",
}  # fmt: skip
_SPEAKERS = {"user", "assistant", "system", "developer", "tool", "function", *_ROLES}
_FINISHED = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "tool_call": "tool_calls", "error": INCOMPLETE,
}  # fmt: skip
"""Words for why a model stopped, and OpenAI's for the same."""

_REPLY = ("choices", "generations", "role", "lc", "parts", "content", "output", "text",
          "completion", "messages")  # fmt: skip
_CURE = "agentpref reads text, and messages of OpenAI, Anthropic, LangChain or OpenTelemetry"


class Answer(NamedTuple):
    """What a model answered, and why it stopped, in OpenAI's words."""

    message: Message
    finish_reason: str | None = None


def messages_of(value: Any, name: str) -> list[Message]:
    """Read a prompt; ``name`` is what an error calls it."""
    value = parsed(value)
    if isinstance(value, str):
        require(value.strip(), name, value, "log the prompt")
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        return _prompt(value, name)
    require(isinstance(value, list) and value, name, value, _CURE)
    if isinstance(value[0], list):  # what LangChain sends is a batch of prompts
        require(len(value) == 1, name, value, "it is a batch; log each prompt as a run")
        return messages_of(value[0], name)
    if len(value) == 1 and isinstance(value[0], str):
        return messages_of(value[0], name)
    found: list[Message] = []
    for turn in value:
        for message, joins in _turn(turn, name):
            last = found[-1] if found else {}
            if joins and last.get("role") == message["role"] == "assistant":
                calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
                said = last.get("content") or message.get("content")
                found[-1] = {**last, **message, "content": said, "tool_calls": calls}
            else:
                found.append(message)
    return [_clean(message) for message in found]


def _prompt(value: Mapping[str, Any], name: str) -> list[Message]:
    """Read the arguments of a call, or a single message."""
    for key in ("messages", "prompts", "input", "prompt", "question", "query", "contents"):
        if value.get(key):
            asked = messages_of(value[key], f"{key!r} of {name}")
            brief = value.get("system") or value.get("instructions")
            told = [{"role": "system", "content": _text(brief)}] if brief else []
            return [*told, *asked]
    return messages_of([value], name)


def answers_of(value: Any, name: str) -> list[Answer]:
    """Read what a model answered: one answer, or more where several were asked for."""
    found = parsed(value)
    if isinstance(value, str) and not _is_reply(found):
        found = value  # an answer that happens to be JSON
    if isinstance(found, str):
        return [Answer({"role": "assistant", "content": found})]
    if isinstance(found, list):
        return _listed(found, name)
    require(isinstance(found, Mapping), name, found, _CURE)
    if isinstance(found.get("choices"), list):
        return [answer for choice in found["choices"] for answer in _choice(choice, name)]
    if isinstance(found.get("generations"), list):
        batch = found["generations"]
        nested = batch[0] if batch and isinstance(batch[0], list) else batch
        return [answer for one in nested for answer in _generation(one, name)]
    if not _speaker(found):
        for key in ("messages", "output", "text", "completion", "response", "answer"):
            if found.get(key):
                return answers_of(found[key], f"{key!r} of {name}")
        if "content" in found:
            found = {**found, "role": "assistant"}
    require(_speaker(found), name, found, _CURE)
    return [_said([found], found, name)]


def _listed(found: list[Any], name: str) -> list[Answer]:
    """Answers in a list: choices, the blocks of one answer, or a conversation that ends with it."""
    require(found and all(isinstance(one, Mapping) for one in found), name, found, _CURE)
    if all(_speaker(one) and "parts" in one for one in found):
        return [_said([one], one, name) for one in found]
    if not any(map(_speaker, found)) and found[-1].get("type") != "function_call":
        return answers_of({"role": "assistant", "content": found}, name)
    return [_said(found, found[-1], name)]


def _said(turns: Sequence[Any], last: Mapping[str, Any], name: str) -> Answer:
    """The last message of some turns, which is the answer."""
    message = messages_of([*turns], name)[-1]
    body = _body(last)
    reply = body.get("response_metadata")
    places = [last, body, reply if isinstance(reply, Mapping) else {}]
    reasons = [place.get(key) for place in places for key in ("finish_reason", "stop_reason")]
    return Answer(message, finished(next(filter(None, reasons), None)))


def _choice(choice: Any, name: str) -> Iterator[Answer]:
    require(isinstance(choice, Mapping), name, choice, _CURE)
    said = choice.get("message") or choice.get("text")
    for answer in answers_of(said, name):
        yield answer._replace(finish_reason=finished(choice.get("finish_reason")))


def _generation(one: Any, name: str) -> Iterator[Answer]:
    """Read a generation of LangChain."""
    require(isinstance(one, Mapping), name, one, _CURE)
    info = one.get("generation_info")
    reason = info.get("finish_reason") if isinstance(info, Mapping) else None
    for answer in answers_of(one.get("message") or one.get("text"), name):
        yield answer._replace(finish_reason=finished(reason) or answer.finish_reason)


def finished(reason: Any) -> str | None:
    """Why a model stopped, in OpenAI's words; other words stay as they are."""
    if not isinstance(reason, str) or not reason:
        return None
    return _FINISHED.get(reason.lower(), reason.lower())


def _speaker(value: Any) -> str | None:
    """The role of a message; none if a value is no message."""
    if not isinstance(value, Mapping):
        return None
    if value.get("type") == "constructor" and isinstance(value.get("id"), list) and value["id"]:
        role = value["id"][-1]  # the class, as LangChain writes its objects
    else:
        role = value.get("role") or (value.get("type") if "role" not in value else None)
    if not isinstance(role, str) or role not in _SPEAKERS:
        return None
    return _ROLES.get(role, role)


def _is_reply(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_speaker(one) or _is_block(one) for one in value)
    if not isinstance(value, Mapping):
        return False
    return _speaker(value) == "assistant" or isinstance(value.get("choices"), list)


def _is_block(value: Any) -> bool:
    kinds = ("text", "tool_use", "thinking", "output_text", "function_call", "message", "reasoning")
    return isinstance(value, Mapping) and value.get("type") in kinds


def _body(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a message, which LangChain's formats keep one level deeper."""
    for key in ("kwargs", "data"):
        if message.get("type") and isinstance(message.get(key), Mapping):
            return message[key]  # type: ignore[no-any-return]
    return message


def _turn(turn: Any, name: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """The messages in one turn, and whether each goes on with the one before it."""
    require(isinstance(turn, Mapping), f"a message of {name}", turn, _CURE)
    kind = turn.get("type")
    if kind == "function_call":  # an item of Responses
        call = _call(turn.get("call_id"), turn.get("name"), turn.get("arguments"))
        yield {"role": "assistant", "content": None, "tool_calls": [call]}, True
        return
    if kind == "function_call_output":
        said = _text(turn.get("output"))
        yield {"role": "tool", "tool_call_id": turn.get("call_id"), "content": said}, False
        return
    if kind == "reasoning" and "role" not in turn:
        return
    role, body = _speaker(turn), _body(turn)
    if role is None:
        raise ExchangeError(f"a message of {name} is {described(turn)} without a role; {_CURE}")
    blocks = body.get("parts") if "parts" in body else body.get("content")
    if not isinstance(blocks, list):
        blocks = [] if blocks is None else [{"type": "text", "text": blocks}]
    parts: list[Any] = []
    calls = _calls(body)
    thoughts: list[str] = []
    for block in blocks:
        block = {"type": "text", "text": block} if isinstance(block, str) else block
        require(isinstance(block, Mapping), f"a part of a message of {name}", block, _CURE)
        what = block.get("type", "text")
        if what in ("text", "input_text", "output_text"):
            text = block.get("text", block.get("content"))
            require(isinstance(text, str), f"the text of a message of {name}", text, _CURE)
            parts.append({"type": "text", "text": text})
        elif what in ("tool_use", "tool_call"):
            given = block.get("input", block.get("arguments", block.get("args")))
            made = _call(block.get("id"), block.get("name"), given)
            calls += [] if made["id"] in [c["id"] for c in calls if made["id"]] else [made]
        elif what in ("thinking", "reasoning"):
            thoughts.append(_text(block.get("thinking") or block.get("reasoning")
                                  or block.get("content") or ""))  # fmt: skip
        elif what in ("tool_result", "tool_call_response"):
            given = block.get("content", block.get("response", block.get("result")))
            key = block.get("tool_use_id", block.get("id"))
            yield {"role": "tool", "tool_call_id": key, "content": _text(given)}, False
        else:
            parts.append(dict(block))  # a picture or a sound, as the product keeps it
    if role == "tool" and not parts and not calls and blocks:
        return
    texts = [part["text"] for part in parts if part.get("type") == "text"]
    plain = len(texts) == len(parts) and (role == "assistant" or len(texts) < 2)
    content = "".join(texts) if plain else parts
    if not (content or calls or thoughts) and blocks and role != "assistant":
        return  # only results of tools, which came before
    made_of: dict[str, Any] = {"role": role, "content": content}
    if calls:
        made_of |= {"content": content or None, "tool_calls": calls}
    for key in ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning"):
        if isinstance(body.get(key), str) and (key != "name" or role in ("tool", "function")):
            made_of[key] = body[key]
    if thoughts:
        made_of["reasoning_content"] = "".join(thoughts)
    yield made_of, kind == "message" and role == "assistant"


def _calls(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message of OpenAI or LangChain."""
    more = body.get("additional_kwargs")
    given = body.get("tool_calls") or (isinstance(more, Mapping) and more.get("tool_calls")) or []
    require(isinstance(given, list), "'tool_calls' of a message", given, "write a list of calls")
    found = []
    for call in given:
        require(isinstance(call, Mapping), "a call in 'tool_calls'", call, "write an object")
        function = call.get("function")
        if isinstance(function, Mapping):
            found.append(_call(call.get("id"), function.get("name"), function.get("arguments")))
        else:
            arguments = call.get("args", call.get("arguments"))
            found.append(_call(call.get("id"), call.get("name"), arguments))
    return found


def _call(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    function = {"name": _text(name), "arguments": _text({} if arguments is None else arguments)}
    return {"type": "function", "id": call_id, "function": function}


def _clean(message: Message) -> Message:
    cleaned: Message = tidy(normalized(message))
    return cleaned


def _text(value: Any) -> str:
    """A value as text; JSON if it is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_block(one) for one in value):
        return "".join(str(one.get("text", "")) for one in value)
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError as error:
        raise ExchangeError(
            f"a value is not JSON ({error}); correct it, or leave it out"
        ) from error


# Values that several products write in the same ways


def parsed(value: Any) -> Any:
    """A value that may be written as JSON text; text that is none stays text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            pass
    return value


def mapping(value: Any) -> dict[str, Any]:
    """An object, perhaps as JSON text; an empty one for anything else."""
    found = parsed(value)
    return {**found} if isinstance(found, Mapping) else {}


def tools_of(value: Any) -> list[dict[str, Any]]:
    """A list of tools in OpenAI's shape, from OpenAI, Anthropic, OpenTelemetry or JSON schemas."""
    found = parsed(value)
    if found in (None, "", {}, []):
        return []
    require(isinstance(found, list), "the list of tools", found, "write a list of tools")
    return [_tool(parsed(tool)) for tool in found]


def _tool(tool: Any) -> dict[str, Any]:
    require(isinstance(tool, Mapping), "a tool", tool, "write an object for each tool")
    if isinstance(tool.get("function"), Mapping) or not isinstance(tool.get("name"), str):
        return {**tool}
    schema = tool.get("parameters", tool.get("input_schema"))
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": schema}
    said = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": said}


_TIME = TypeAdapter(datetime)


def when(value: Any, name: str) -> float:
    """A time as POSIX seconds: ISO text, a number of seconds or milliseconds, or a datetime.

    A time without a zone is UTC.
    """
    try:
        time = _TIME.validate_python(value)
    except ValidationError:
        cure = "write a time such as 2026-11-29T08:00:00Z"
        raise ExchangeError(f"{name} is {described(value)}; {cure}") from None
    return time.replace(tzinfo=time.tzinfo or timezone.utc).timestamp()


def an_id(value: Any, name: str) -> str:
    """An id, which must be printable text."""
    text = None if value is None or isinstance(value, bool | float) else str(value)
    require(text and text.isprintable(), name, value, "write the id as text")
    return str(text)


def maybe_id(value: Any, name: str) -> str | None:
    """An id, or none where a row leaves it empty."""
    return None if value in (None, "") else an_id(value, name)


def a_score(value: Any) -> tuple[float | None, tuple[float, float] | None, Any]:
    """The score, the scale and the value that a judgement gives: a bool is a score from 0 to 1."""
    if isinstance(value, bool):
        return float(value), (0.0, 1.0), None
    if isinstance(value, int | float):
        return float(value), None, None
    return None, None, value


def is_thumb(score: float | None) -> bool:
    """Whether a score can be that of a thumb."""
    return score in (-1, 0, 1)


def thumb_scale(score: float) -> tuple[float, float]:
    """The scale that a thumb shows: a dislike is -1 on one, and 0 on the other."""
    return (-1.0, 1.0) if score < 0 else (0.0, 1.0)


def kept(**named: Any) -> dict[str, Any]:
    """What describes a run, without what is empty."""
    return {key: value for key, value in named.items() if value not in (None, "", [], {}, ())}
