"""One rating of Open WebUI, as its API gives it and its export lists it.

A rating says ``data.rating`` (1 or -1) of one message of one chat, with a comment, a reason and
tags. It comes with a snapshot of the whole chat, a tree of messages. Where the question had several
answers, ``data.sibling_model_ids`` names their models, and Open WebUI counts the rating as won or
lost against each of them. Which messages they are is in the snapshot alone.

The snapshot is what people saw, which is not always what the model saw: files, retrieved sources
and the results of tools are not in it, nor is the system prompt of a model. So each part that
cannot be trusted has the reason in its place. Nothing here reads a file or a network.

A message that was changed has what it was before in ``originalContent``. People change answers in
the page, and outlet filters change them too: a footer about usage, names that are masked. The
snapshot does not say which it was. Text that surrounds the original is a footer, and no edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentpref.errors import ExchangeError, described
from agentpref.prefer.formats import require
from agentpref.types import Message, Winner

_THOUGHT = re.compile(r"<details\b[^>]*\btype=\"reasoning\".*?</details>\s*", re.DOTALL)
_TOOLS = re.compile(r"<details\b[^>]*\btype=\"(?:tool_calls|code_interpreter)\"")
_DEEPEST = 10_000
"""Messages from a question back to the first one; more are a circle."""

APP = "open_webui"
"""The key of Open WebUI's ids in the metadata of runs and in the values of feedback."""

WORDS = "open_webui"
"""The key of feedback without a thumb: words alone, or on an answer that the person edited."""

_ABOUT = ("reason", "details", "tags")


@dataclass(frozen=True, slots=True)
class Shown:
    """A message of the snapshot, and what the model wrote of it.

    ``text`` is the model's, as far as the snapshot shows it. ``edited`` is what a person or an
    outlet filter put in its place. ``left_out`` is why the text is not all that the model wrote.
    """

    message_id: str
    text: str = ""
    edited: str | None = None
    model: str | None = None
    liked: bool | None = None
    at: float | None = None
    is_whole: bool = True
    left_out: str | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """What a person said of the message ``answer`` of a chat, and what the chat was by then.

    ``liked`` is None for words alone. ``about`` has the reason, the details (a grade of 1 to 10)
    and the tags, where they were given. ``prompt`` is empty if the snapshot does not show what the
    model was asked, and ``prompt_left_out`` says why.
    """

    feedback_id: str
    user_id: str | None
    chat_id: str
    question_id: str | None
    answer: Shown
    liked: bool | None
    comment: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    updated_at: float = 0.0
    prompt: tuple[Message, ...] = ()
    prompt_left_out: str | None = None
    siblings: tuple[Shown, ...] = ()

    @property
    def voter(self) -> str:
        """Whom the judgements belong to: the rating itself.

        A message has one rating, which its author changes and an admin can delete. Homes hold names
        of users that cannot be read back, so a deletion could not be said to be theirs.
        """
        return voter_of(self.feedback_id)

    @property
    def jury(self) -> str:
        """Whom the comparisons belong to: the question, whose answers have a rating each.

        So a later rating of one answer supersedes what an earlier one of another said of both.
        """
        return f"open-webui {self.question_id}"

    @property
    def said(self) -> Mapping[str, Any]:
        """What the log keeps of a rating beside the thumb and the words, under :data:`APP`."""
        return {
            "feedback_id": self.feedback_id,
            "message_id": self.answer.message_id,
            **self.about,
            "updated_at": self.updated_at,
        }

    def named(self, shown: Shown) -> Mapping[str, Any]:
        """What a run that was recorded from the snapshot is known by, under :data:`APP`."""
        return {"chat_id": self.chat_id, "message_id": shown.message_id, "from": "snapshot"}

    @property
    def comparisons(self) -> Iterator[tuple[Shown, Winner]]:
        """Each other answer to the same question, and what won: ``"a"`` is the rated one.

        Two answers that are both liked, or both disliked, are a tie.
        """
        for other in self.siblings:
            if self.liked is not None:
                winner: Winner = "a" if self.liked else "b"
                yield other, "tie" if other.liked is self.liked else winner


def run_id_of(message_id: str) -> str:
    """The run that an answer is recorded as which no log has seen."""
    return f"open-webui-{message_id}"


def voter_of(feedback_id: str) -> str:
    """Whom the judgements of a rating belong to, see :attr:`Rating.voter`."""
    return f"open-webui {feedback_id}"


def rating_of(feedback: Any) -> Rating:
    """Read one feedback object.

    Raises:
        ExchangeError: it is none, or does not name its message; the message names the field.
    """
    cure = "pass an object of GET /api/v1/evaluations/feedback/{id}, or of an export of feedback"
    require(isinstance(feedback, Mapping), "the feedback", feedback, cure)
    require(feedback.get("type") == "rating", "type", feedback.get("type"), "ratings are read only")
    data, meta = (_mapping(feedback, name) for name in ("data", "meta"))
    ids = [_text(feedback, "id"), _text(meta, "chat_id"), _text(meta, "message_id")]
    for name, value in zip(("id", "meta.chat_id", "meta.message_id"), ids, strict=True):
        require(value, name, value, cure)
    feedback_id, chat_id, message_id = map(str, ids)
    chat = _chat(feedback)
    messages = _mapping(_mapping(chat, "history"), "messages")
    rated = _mapping(messages, message_id)
    answer = _shown(message_id, rated, model=_text(data, "model_id"))
    prompt, why = _prompt(chat, messages, rated.get("parentId")) if rated else ((), "no snapshot")
    has_siblings = bool(data.get("sibling_model_ids"))
    siblings = tuple(_siblings(messages, rated, message_id)) if has_siblings else ()
    comment = _text(data, "comment")
    return Rating(
        feedback_id=feedback_id,
        user_id=_text(feedback, "user_id"),
        chat_id=chat_id,
        question_id=_text(rated, "parentId"),
        answer=answer,
        liked=_liked(data.get("rating")),
        comment=comment.strip() or None if comment else None,
        about={name: data[name] for name in _ABOUT if data.get(name)},
        created_at=_time(feedback, "created_at"),
        updated_at=_time(feedback, "updated_at"),
        prompt=prompt,
        prompt_left_out=why,
        siblings=siblings,
    )


def _chat(feedback: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chat of a snapshot: what the API gives for one has it in ``chat`` once more."""
    chat = _mapping(_mapping(feedback, "snapshot"), "chat")
    return _mapping(chat, "chat") or chat


def _prompt(
    chat: Mapping[str, Any], messages: Mapping[str, Any], last: Any
) -> tuple[tuple[Message, ...], str | None]:
    """What the model was asked, or why that is not known."""
    turns: list[Message] = []
    while last is not None:
        message = _mapping(messages, last) if isinstance(last, str) else {}
        role = message.get("role")
        if role not in ("user", "assistant", "system") or len(turns) > _DEEPEST:
            return (), "the snapshot lacks a message of the chat"
        text, why = _read(message)  # changed or not, it is what the chat went on with
        if why:
            return (), why
        turns.append({"role": role, "content": text})
        last = message.get("parentId")
    system = _text(_mapping(chat, "params"), "system") or _text(chat, "system")
    if system:
        turns.append({"role": "system", "content": system})
    if not turns or turns[0]["role"] != "user":
        return (), "the snapshot lacks the question"
    return tuple(reversed(turns)), None


def _shown(message_id: str, message: Mapping[str, Any], model: str | None = None) -> Shown:
    text, why = _read(message)
    original, edited = message.get("originalContent"), None
    if isinstance(original, str) and (before := _THOUGHT.sub("", original).strip()):
        now = _THOUGHT.sub("", str(message.get("content") or "")).strip()
        text, edited = before, now if before not in now else None
        why = why or ("it used tools" if _TOOLS.search(original) else None)
    if edited is not None:
        why = why or "it was changed, and the snapshot does not say what the model wrote"
    rating = _mapping(message, "annotation").get("rating")
    at = message.get("timestamp")
    return Shown(
        message_id,
        text,
        edited,
        model or _text(message, "selectedModelId") or _text(message, "model"),
        _liked(rating) if str(rating) in _RATINGS else None,
        float(at) if isinstance(at, int | float) and not isinstance(at, bool) else None,
        message.get("done") is not False,
        why,
    )


def _read(message: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of a message as it is now, and why that is not all there is to it."""
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    items = [item for item in _list(message, "output") if isinstance(item, Mapping)]
    said = [part for item in items if item.get("type") == "message" for part in _texts(item)]
    text = "\n".join(said) if said else _THOUGHT.sub("", text)
    calls = any("call" in str(item.get("type")) for item in items) or _TOOLS.search(text)
    why = (
        "it had files" if message.get("files")
        else "it had sources that are not in the snapshot" if message.get("sources")
        else "it used tools" if calls
        else "the model failed" if message.get("error")
        else None if text.strip()
        else "it is empty, or not in the snapshot"
    )  # fmt: skip
    return text.strip(), why


def _siblings(
    messages: Mapping[str, Any], rated: Mapping[str, Any], message_id: str
) -> Iterator[Shown]:
    """The other answers to the same question."""
    asked = _mapping(messages, str(rated.get("parentId")))
    for child in _list(asked, "childrenIds"):
        message = _mapping(messages, child) if isinstance(child, str) else {}
        if child != message_id and message.get("role") == "assistant":
            yield _shown(child, message)


_RATINGS = {"1": True, "-1": False}


def _liked(rating: Any) -> bool | None:
    """Open WebUI gives the rating as a number or as text, and old versions had 0 for none."""
    if rating in (None, 0, "0", ""):
        return None
    liked = _RATINGS.get(str(rating))
    if liked is None:
        raise ExchangeError(f"data.rating is {described(rating)}; a rating is 1 or -1")
    return liked


def _texts(item: Mapping[str, Any]) -> Iterator[str]:
    for part in _list(item, "content"):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part["text"].strip():
            yield part["text"]


def _mapping(within: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = within.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(within: Mapping[str, Any], name: str) -> list[Any]:
    value = within.get(name)
    return value if isinstance(value, list) else []


def _text(within: Mapping[str, Any], name: str) -> str | None:
    value = within.get(name)
    return value if isinstance(value, str) and value else None


def _time(within: Mapping[str, Any], name: str) -> float:
    value = within.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
