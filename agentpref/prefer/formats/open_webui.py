"""open-webui's feedback, as its administrators export it, with the chat at that time.

A rating of 1 or -1 is a thumb on the message that it names. Its siblings, the other answers to the
same message, were compared with it: it won against each of the ``sibling_model_ids``, or lost. The
rating from 1 to 10 of the details is feedback under the key ``rating``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import Fields, require
from agentpref.prefer.formats.chat import an_id, kept, mapping, maybe_id, when
from agentpref.prefer.logged import (
    LeftOut,
    LogFormat,
    Logged,
    LoggedComparison,
    LoggedRun,
    LoggedScore,
)
from agentpref.types import INCOMPLETE, THUMBS, Message

_CURE = "export the feedback again from Admin Panel > Evaluations > Feedback"
_MOST_TURNS = 10_000


def read(row: Fields) -> Iterator[Logged]:
    """Read one feedback: the runs that it judges, and what it says of them."""
    if row["type"] != "rating":
        yield LeftOut(f"feedback of type {row['type']}")
        return
    data, meta = mapping(row["data"]), mapping(row["meta"])
    rating = str(data.get("rating"))
    if rating not in ("1", "-1"):
        yield LeftOut("feedback without a rating")
        return
    chat, messages = _chat(row)
    judged = an_id(meta.get("message_id"), "'message_id' of 'meta'")
    message = messages.get(judged)
    require(message, "the rated message in 'snapshot'", message, _CURE)
    assert isinstance(message, Mapping)
    yield _run(judged, messages, chat, row)
    said = {key: data.get(key) for key in ("reason", "tags")}
    feedback_id, at = an_id(row["id"], "'id'"), _said_at(row)
    by = maybe_id(row.get("user_id"), "'user_id'")
    words = " ".join(str(data[key]).strip() for key in ("reason", "comment") if data.get(key))
    score = float(rating)
    yield LoggedScore(
        feedback_id, at, judged, None, THUMBS, score, kept(**said) or None, words or None,
        "human", by, None, (-1.0, 1.0),
    )  # fmt: skip
    detail = mapping(data.get("details")).get("rating")
    if isinstance(detail, int | float) and not isinstance(detail, bool):
        yield LoggedScore(
            f"{feedback_id}/details", at, judged, None, "rating", float(detail), None, None,
            "human", by, None, (1.0, 10.0),
        )  # fmt: skip
    opponents = data.get("sibling_model_ids")
    opponents = [*map(str, opponents)] if isinstance(opponents, list) else []
    for other in _siblings(judged, message, messages):
        written_by = _model(messages[other])
        if written_by not in opponents or not messages[other].get("content"):
            continue
        opponents.remove(written_by)
        yield _run(other, messages, chat, row)
        better, worse = (judged, other) if score > 0 else (other, judged)
        yield LoggedComparison(f"{feedback_id}/{other}", at, better, worse, "human", by)


def _chat(row: Fields) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The chat of a snapshot, and its messages by their ids."""
    outer = mapping(mapping(row.get("snapshot")).get("chat"))
    inner = mapping(outer.get("chat")) or outer
    messages = mapping(mapping(inner.get("history")).get("messages"))
    if not messages:
        raise ExchangeError(f"it has no 'snapshot' of the chat; {_CURE}")
    return inner, {key: value for key, value in messages.items() if isinstance(value, Mapping)}


def _run(
    message_id: str, messages: Mapping[str, Any], chat: Mapping[str, Any], row: Fields
) -> LoggedRun:
    message, meta = messages[message_id], mapping(row["meta"])
    asked: list[Message] = []
    above = _parent(message)
    seen = {message_id}
    while above is not None and above in messages and len(asked) < _MOST_TURNS:
        require(above not in seen, "the chain of messages", above, f"it goes in a circle; {_CURE}")
        seen.add(above)
        asked.append(_message(messages[above]))
        above = _parent(messages[above])
    asked.reverse()
    params = mapping(chat.get("params"))
    system = params.pop("system", None) or chat.get("system")
    if isinstance(system, str) and system.strip():
        asked.insert(0, {"role": "system", "content": system})
    broke = message.get("done") is False or message.get("error")
    return LoggedRun(
        id=message_id,
        created_at=when(message.get("timestamp") or row["created_at"], "'timestamp'"),
        messages=asked,
        output=_message(message),
        model=_model(message),
        thread_id=maybe_id(meta.get("chat_id"), "'chat_id'"),
        user_id=maybe_id(row.get("user_id"), "'user_id'"),
        params=params,
        tags=_tags(meta),
        metadata=kept(
            finish_reason=INCOMPLETE if broke else None,
            usage=message.get("usage") or mapping(message.get("info")).get("usage"),
            arena=meta.get("arena") or None,
            title=chat.get("title"),
        ),
    )


def _message(message: Mapping[str, Any]) -> Message:
    """A message as the model saw it: its text, and the pictures among its files."""
    said = message.get("content")
    files = message.get("files")
    pictures = [
        {"type": "image_url", "image_url": {"url": one["url"]}}
        for one in (files if isinstance(files, list) else ())
        if isinstance(one, Mapping) and one.get("type") == "image" and one.get("url")
    ]
    content: Any = [{"type": "text", "text": said}, *pictures] if pictures else said
    return {"role": message.get("role"), "content": content}


def _siblings(
    judged: str, message: Mapping[str, Any], messages: Mapping[str, Any]
) -> Iterator[str]:
    """The other answers to the same message, the newest first: a model may have answered twice."""
    children = mapping(messages.get(_parent(message) or "")).get("childrenIds")
    named = map(str, children if isinstance(children, list) else ())
    found = [key for key in named if key in messages]
    yield from (key for key in reversed(found) if key != judged)


def _parent(message: Mapping[str, Any]) -> str | None:
    above = message.get("parentId")
    return None if above is None else str(above)


def _model(message: Mapping[str, Any]) -> str:
    return str(message.get("selectedModelId") or message.get("model"))


def _tags(meta: Mapping[str, Any]) -> tuple[str, ...]:
    tags = meta.get("tags")
    return tuple(map(str, tags)) if isinstance(tags, list) else ()


def _said_at(row: Fields) -> float:
    return when(row.get("updated_at") or row["created_at"], "'updated_at'")


OPEN_WEBUI = LogFormat(
    shapes=(("id", "type", "data", "meta", "created_at"),),
    read=read,
    optional=("user_id", "snapshot", "updated_at", "version", "user"),
)
