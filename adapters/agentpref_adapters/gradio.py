"""Gradio: the thumbs, edits and retries of a chat become feedback on the runs that it shows.

>>> feedback = ChatFeedback(log)                                                # doctest: +SKIP
>>> def answer(message, history):                                               # doctest: +SKIP
...     …                                        # your model; the run is recorded with log.record
...     feedback.note(run_id, [*history, message], text)
...     return text
>>> demo = gr.ChatInterface(answer)                                             # doctest: +SKIP
>>> feedback.connect(demo)                                                      # doctest: +SKIP

Gradio names the message that was judged by its place in the chat. Places move when answers are
asked for again, undone, cleared or loaded from a history, so an answer is found by the texts that
the chat shows up to it, among the answers of the same session. No id of a run reaches the browser.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

from agentpref.errors import ConfigError, MissingDependency
from agentpref.record.log import Log
from agentpref.serve.chat import Chat, ChatReply
from agentpref.types import Message

try:
    import gradio as gr
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.gradio needs gradio, which is not installed: "
        "run pip install 'agentpref[gradio]'"
    ) from error

from gradio.context import LocalContext

from agentpref_adapters._chats import ASKED_AGAIN, as_shown, say_asked_again, saying_what_fails

__all__ = ["ASKED_AGAIN", "FLAG", "ChatFeedback", "chat_interface"]

FLAG = "flag"
"""The key of a click on one of the chatbot's ``feedback_options`` that is no thumb."""

MAX_ANSWERS = 100_000
"""How many answers can be judged, of all sessions together; the oldest are forgotten first."""

NOT_AN_ANSWER = "This message is not the answer of a recorded run: your feedback was not kept."
CORRECTED = "You corrected this answer: your correction counts, and this click does not."
IN_PARTS = "This answer is shown in several parts and cannot be corrected: your edit was not kept."

Shown: TypeAlias = "Sequence[Any]"
"""Messages as Gradio has them; a string stands for a message of that text."""

_logger = logging.getLogger(__name__)


class ChatFeedback:
    """Takes the feedback that people give in a Gradio chat, for runs that were logged.

    A like or dislike is a thumb, and one taken back is withdrawn. Another of the chatbot's
    ``feedback_options`` is feedback under the key ``"flag"``. An edited answer is a correction. An
    answer asked for again, by retry or by undo and the same question, is feedback of score 0 on the
    first one, under the key ``"asked_again"``: it trains nothing, unless ``log.declare`` says so.

    Feedback that cannot be kept is said to the reader in a warning, and to the operator in the
    logger ``agentpref_adapters.gradio``; the chat goes on. Readers are named as in Gradio's login.
    Each chat has an object of its own.

    Args:
        log: where the feedback goes: the log of the runs.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._answers = _Answers()
        self._chatbot = gr.Chatbot(render=False)  # before connect: how texts are shown by default

    def connect(self, chat: gr.ChatInterface | gr.Chatbot) -> None:
        """Listen to a chat. A ``gr.Chatbot`` is connected inside its ``with gr.Blocks()``.

        Answers can be corrected if the chatbot was made with ``editable="all"``. In a
        ``ChatInterface``, a question that is edited then goes back to the text box.

        Raises:
            ConfigError: a ``ChatInterface`` with ``editable=True`` would ask corrections, too.
        """
        if isinstance(chat, gr.Chatbot):
            self._listen(chat, self._edited, None)
            return
        if chat.editable and chat.chatbot.editable == "all":
            raise ConfigError(
                "gr.ChatInterface(editable=True) asks whatever is edited, and so would ask the "
                "corrections of gr.Chatbot(editable='all') as questions; leave editable=True out"
            )
        with chat:
            outputs = [chat.chatbot_value, chat.textbox]
            self._listen(chat.chatbot, self._edited_in_interface, outputs)

    def note(
        self, run_id: str, asked: Shown, answer: str, *, request: gr.Request | None = None
    ) -> None:
        """Say which run wrote an answer, before the chat shows the end of it.

        Args:
            run_id: the run, as ``log.record`` returned it.
            asked: what the chat shows before the answer; in a ``ChatInterface``,
                ``[*history, message]``.
            answer: the text that the chat shows.
            request: the reader's; it is needed in threads of your own only.
        """
        reader = request or LocalContext.request.get(None)
        before, parts = self._texts(asked), self._texts([answer])
        made = _Answer(run_id, in_parts=len(parts) > 1)
        earlier = self._answers.find(reader, "asked", before)
        self._answers.put(reader, "asked", before, made)
        self._answers.put(reader, "shown", [*before, *parts], made)
        if earlier is not None and earlier.run_id != run_id:
            with saying_what_fails(gr.Warning):
                say_asked_again(self.log, earlier.run_id, run_id, _user(reader))

    def _listen(self, chatbot: gr.Chatbot, edited: Callable[..., Any], outputs: Any) -> None:
        self._chatbot = chatbot
        how: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        chatbot.like(self._liked, [chatbot], None, **how)
        if chatbot.editable == "all":  # else listening would offer readers to edit their questions
            chatbot.edit(edited, [chatbot], outputs, **how)

    def _liked(self, shown: Shown, data: gr.LikeData, request: gr.Request) -> None:
        """Take a click on a thumb or on another option; "" takes the last one back."""
        liked, user_id = data.liked, _user(request)
        answer = self._judged(shown, data.index, request)
        known = isinstance(liked, bool) or liked in ("", *(self._chatbot.feedback_options or ()))
        if answer is None or not known:
            return _refuse(NOT_AN_ANSWER)
        if answer.written is not None and liked != "":
            return _refuse(CORRECTED)
        key = None if liked == "" else "thumbs" if isinstance(liked, bool) else FLAG
        with saying_what_fails(gr.Warning):
            if answer.said not in (None, key):
                self.log.retract(answer.run_id, key=answer.said, user_id=user_id)
            if isinstance(liked, bool):
                self.log.thumbs(answer.run_id, up=liked, user_id=user_id)
            elif key is not None:
                self.log.feedback(answer.run_id, key=key, value=liked, user_id=user_id)
            answer.said = key
        return None

    def _edited(self, shown: Shown, data: gr.EditData, request: gr.Request) -> None:
        """Take a correction; ``shown`` has the new text already."""
        at: Any = data.index
        if shown[at]["role"] == "user":
            return None  # a listener of the app's own knows what becomes of a question
        before = [*shown]
        before[at] = {**shown[at], "content": data.previous_value}
        answer = self._judged(before, at, request)
        if answer is None or answer.in_parts:
            return _refuse(IN_PARTS if answer else NOT_AN_ANSWER)
        for end in range(at + 1, len(shown) + 1):  # the answers below are still to be found
            if below := self._answers.find(request, "shown", self._texts(before[:end])):
                self._answers.put(request, "shown", self._texts(shown[:end]), below)
        wrote = answer.written if answer.written is not None else str(data.previous_value)
        with saying_what_fails(gr.Warning):
            if data.value == wrote:
                self.log.retract(answer.run_id, key="correction", user_id=_user(request))
            else:
                self.log.correct(answer.run_id, data.value, user_id=_user(request))
            answer.written = None if data.value == wrote else wrote
        return None

    def _edited_in_interface(
        self, shown: Shown, data: gr.EditData, request: gr.Request
    ) -> tuple[Any, Any]:
        """Take a correction, and go on from what is shown now, which Gradio does not by itself."""
        at: Any = data.index
        if shown[at]["role"] == "user":
            return shown[:at], data.value
        self._edited(shown, data, request)
        return shown, gr.skip()

    def _judged(self, shown: Shown, index: Any, request: gr.Request) -> _Answer | None:
        """The answer that a click on the message at ``index`` means.

        Gradio shows messages of one side in a row as one, and names the first of them: where that
        is a thought, the answer comes after it.
        """
        if not isinstance(index, int) or not 0 <= index < len(shown):
            return None
        grouped, end = self._chatbot.group_consecutive_messages, index
        while end < len(shown) and shown[end]["role"] == "assistant" and (grouped or end == index):
            end += 1
        ends = (self._texts(shown[:stop]) for stop in range(end, index, -1))
        found = (self._answers.find(request, "shown", texts) for texts in ends)
        return next((answer for answer in found if answer is not None), None)

    def _texts(self, shown: Shown) -> list[str]:
        """The texts that the chat shows, without thoughts; spaces do not count."""
        messages: list[Any] = [
            {"role": "user", "content": text} for one in shown if (text := _text(one))
        ]
        rows: Any = self._chatbot.postprocess(
            messages
        ).root  # which tells thoughts by reasoning_tags
        texts = (row.content[0].text for row in rows if not (row.metadata or {}).get("title"))
        return [" ".join(text.split()) for text in texts]


@dataclass(slots=True)
class _Answer:
    """An answer that a chat shows, and what its reader has said of it."""

    run_id: str
    in_parts: bool
    said: str | None = None
    """The key of the click that counts."""
    written: str | None = None
    """What the model wrote, where the reader has put other words in its place."""


class _Answers:
    """The newest answers, by their reader's session and by the texts that lead to them."""

    def __init__(self) -> None:
        self._by_texts: OrderedDict[tuple[str | None, str], _Answer] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, reader: gr.Request | None, what: str, texts: list[str]) -> _Answer | None:
        """Find an answer of the reader's session, or of none, as an example that was cached."""
        with self._lock:
            found = self._by_texts.get((_session(reader), _digest(what, texts)))
            return found or self._by_texts.get((None, _digest(what, texts)))

    def put(self, reader: gr.Request | None, what: str, texts: list[str], made: _Answer) -> None:
        """Keep an answer, and forget the oldest."""
        key = (_session(reader), _digest(what, texts))
        with self._lock:
            self._by_texts[key] = made
            self._by_texts.move_to_end(key)
            while len(self._by_texts) > 2 * MAX_ANSWERS:  # each is kept under two keys
                self._by_texts.popitem(last=False)


def chat_interface(
    chat: Chat,
    *,
    system: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    **options: Any,
) -> gr.ChatInterface:
    """A chat with what the router serves: streamed, recorded, with thumbs, retry, undo and edits.

    >>> chat_interface(agentpref.Chat(log, router)).launch()                    # doctest: +SKIP

    Args:
        chat: what answers.
        system: the system message.
        sampling: as for :meth:`agentpref.Chat.stream`; at the default temperature of 0, a retry
            gives the same answer again.
        options: those of ``gr.ChatInterface``, for a chat of text alone.

    Raises:
        ConfigError: ``multimodal`` or ``additional_inputs`` is among the options.
    """
    for name in ("multimodal", "additional_inputs"):
        if options.get(name):
            raise ConfigError(
                f"chat_interface takes no {name}, which it would not pass to the model; write the "
                f"function for gr.ChatInterface yourself, and connect it with ChatFeedback"
            )
    feedback = ChatFeedback(chat.log)
    instructions = [{"role": "system", "content": system}] if system else []

    def answer(message: str, history: list[Any]) -> Iterator[str]:
        reader, asked = LocalContext.request.get(None), [*history, message]
        said = [{"role": one["role"], "content": _text(one)} for one in history if _text(one)]
        messages: list[Message] = [*instructions, *said, {"role": "user", "content": message}]
        # One side of a canary for a conversation, which Gradio gives no name.
        thread_id = _digest(_session(reader), [_text(asked[0])])[:32]
        about: dict[str, Any] = {"thread_id": thread_id, "user_id": _user(reader)}
        about |= sampling or {}
        text = ""
        with closing(chat.stream(messages, **about)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if isinstance(piece, ChatReply):
                    text = as_shown(piece.message)
                    feedback.note(piece.run_id, asked, text, request=reader)
                else:
                    text += piece
                yield text

    options.setdefault("chatbot", gr.Chatbot(editable="all", scale=1, render=False))
    interface = gr.ChatInterface(answer, **options)
    feedback.connect(interface)
    return interface


def _text(message: Any) -> str:
    """The text of a message, "" if it is a thought or a system message."""
    if isinstance(message, gr.ChatMessage):
        message = {name: getattr(message, name) for name in ("role", "content", "metadata")}
    if isinstance(message, str):
        return message
    if (message.get("metadata") or {}).get("title") or message.get("role") == "system":
        return ""
    content = message.get("content", message.get("text"))  # a multimodal question has "text"
    parts: Iterable[Any] = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str))


def _session(reader: gr.Request | None) -> str | None:
    return reader.session_hash if reader else None


def _user(reader: gr.Request | None) -> str | None:
    return (reader.username or None) if reader else None


def _digest(what: Any, texts: list[str]) -> str:
    return hashlib.sha256(json.dumps([what, *texts]).encode()).hexdigest()


def _refuse(reason: str) -> None:
    _logger.warning("%s", reason)
    gr.Warning(reason)
