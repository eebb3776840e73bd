"""Streamlit: thumbs and edits below the answers of a chat become feedback on their runs.

>>> for message in st.session_state.messages:                                   # doctest: +SKIP
...     with st.chat_message(message["role"]):
...         st.markdown(message["content"])
...         feedback_bar(log, message)                  # where the message has a "run_id"

Streamlit names a widget by its key, which has the run's id in it. It runs the script of a page
again for every click: open the log and the router in a function with ``st.cache_resource``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import closing
from typing import Any, cast
from uuid import uuid4

from agentpref.errors import MissingDependency
from agentpref.record.log import Log
from agentpref.serve.chat import Chat, ChatReply
from agentpref.types import Message

try:
    import streamlit as st
except ImportError as error:
    raise MissingDependency(
        "agentpref_adapters.streamlit needs streamlit, which is not installed: "
        "run pip install 'agentpref[streamlit]'"
    ) from error

from agentpref_adapters._chats import (
    ASKED_AGAIN,
    as_shown,
    say_asked_again,
    say_thumb,
    saying_what_fails,
)

__all__ = ["ASKED_AGAIN", "chat_page", "feedback_bar"]

THUMBS = {None: None, 0: False, 1: True}
"""What the values of ``st.feedback("thumbs")`` say; it gives None when a thumb is taken back."""


def feedback_bar(
    log: Log, message: MutableMapping[str, Any], *, edit: bool = True, user_id: str | None = None
) -> None:
    """Show thumbs and an edit button below an answer, and log what people do with them.

    A thumb taken back is withdrawn. An edit is a correction, and puts the new text into the
    message; thumbs can then no longer be given. Feedback that cannot be kept is said to
    the reader, and to the operator in the logger ``agentpref_adapters.streamlit``.

    Args:
        log: where the feedback goes: the log of the run.
        message: the answer as the page keeps it in ``st.session_state``, with ``run_id`` and
            ``content``; for a message without a run nothing is shown.
        edit: whether people may correct the answer.
        user_id: who judges; by default the email address, or else the ``sub``, of ``st.user``.
    """
    run_id = message.get("run_id")
    if run_id is None:
        return
    about: dict[str, Any] = {"log": log, "message": message, "user_id": user_id or _user()}
    with st.container(horizontal=True):
        key, edited = f"agentpref-thumbs-{run_id}", message.get("written") is not None
        how: dict[str, Any] = {"on_change": _judged, "kwargs": {"key": key, **about}}
        st.feedback("thumbs", key=key, disabled=edited, **how)
        if edit:
            with st.popover("Edit"), st.form(f"agentpref-edit-{run_id}", border=False):
                key = f"agentpref-text-{run_id}"
                st.text_area("The answer as it should be", value=message["content"], key=key)
                st.form_submit_button("Save", on_click=_corrected, kwargs={"key": key, **about})


def chat_page(
    chat: Chat, *, system: str | None = None, sampling: Mapping[str, Any] | None = None
) -> None:
    """A page with a chat: answers of the router, streamed, recorded, with thumbs, edit and retry.

    An answer asked for again is feedback of score 0 on the first one, under the key
    ``"asked_again"``: it trains nothing, unless ``log.declare`` says so.

    Args:
        chat: what answers; made in a function with ``st.cache_resource``.
        system: the system message.
        sampling: as for :meth:`agentpref.Chat.stream`; at the default temperature of 0, a retry
            gives the same answer again.
    """
    state = st.session_state.setdefault(
        "agentpref-chat", {"messages": [], "thread_id": str(uuid4()), "instead_of": None}
    )
    messages: list[dict[str, Any]] = state["messages"]
    if question := st.chat_input("Ask something"):
        messages.append({"role": "user", "content": question})
    for message in messages:
        with st.chat_message(message["role"]):
            st.markdown(message["content"])
            feedback_bar(chat.log, message)
    if not messages:
        return
    if messages[-1]["role"] == "assistant":
        st.button("Retry", key="agentpref-retry", on_click=_take_back, args=(state,))
        return
    said = [{"role": one["role"], "content": one["content"]} for one in messages]
    instructions = [{"role": "system", "content": system}] if system else []
    with st.chat_message("assistant"):
        reply = _answered(
            chat,
            [*instructions, *said],
            thread_id=state["thread_id"],
            user_id=_user(),
            **(sampling or {}),
        )
    messages.append(
        {"role": "assistant", "content": as_shown(reply.message), "run_id": reply.run_id}
    )
    if state["instead_of"] is not None:
        with saying_what_fails(st.toast):
            say_asked_again(chat.log, state["instead_of"], reply.run_id, _user())
        state["instead_of"] = None
    st.rerun()  # which shows the answer in its place, with its thumbs


def _answered(chat: Chat, messages: list[Message], **about: Any) -> ChatReply:
    """Show an answer as it comes, and return it."""
    replies = []

    def texts() -> Iterator[str]:
        with closing(chat.stream(messages, **about)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if isinstance(piece, ChatReply):
                    replies.append(piece)
                else:
                    yield piece

    st.write_stream(texts())
    return replies[0]


def _take_back(state: dict[str, Any]) -> None:
    """Drop the last answer, so that the page asks for another."""
    state["instead_of"] = state["messages"].pop()["run_id"]


def _judged(key: str, log: Log, message: Mapping[str, Any], user_id: str | None) -> None:
    with saying_what_fails(st.toast):
        say_thumb(log, message["run_id"], THUMBS[st.session_state[key]], user_id)


def _corrected(key: str, log: Log, message: MutableMapping[str, Any], user_id: str | None) -> None:
    """Log a correction; the text that the model wrote takes it back."""
    text, wrote = st.session_state[key], message.get("written") or message["content"]
    with saying_what_fails(st.toast):
        if text != wrote:
            log.correct(message["run_id"], text, user_id=user_id)
        elif message.get("written") is not None:
            log.retract(message["run_id"], key="correction", user_id=user_id)
        message["content"], message["written"] = text, wrote if text != wrote else None


def _user() -> str | None:
    """The person that Streamlit has logged in."""
    return cast("str | None", st.user.get("email") or st.user.get("sub"))
