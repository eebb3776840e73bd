"""A chat over a router and a log: it answers, records what it answered, and takes the feedback.

>>> chat = agentpref.Chat(log, router)                                          # doctest: +SKIP
>>> reply = chat.reply([{"role": "user", "content": "Hello!"}], thread_id="t1")  # doctest: +SKIP
>>> chat.thumbs(reply.run_id, up=True)                                          # doctest: +SKIP

A run is recorded with the revision that wrote the answer, its token ids, their log-probabilities
and the sampling settings, so the record says what was served, and how likely that was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentpref.errors import ConfigError, InvalidMessage, described
from agentpref.record.log import Log
from agentpref.serve.backend import FinishReason, GenerationRequest, Reply
from agentpref.serve.router import Router
from agentpref.types import Message, Tool

# What a request says beside its messages and tools. The latter ones are recorded where they say
# something.
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed", "stop")
_UNSAID: Mapping[str, Any] = {
    "chat_template_kwargs": {},
    "tool_choice": "auto",
    "response_format": None,
    "best_of": 1,
}
_SETTINGS = (*_SAMPLING, *_UNSAID)


@dataclass(frozen=True, slots=True)
class ChatReply:
    """An answer, the run that it was recorded as, and the revision that wrote it."""

    run_id: str
    revision: str
    message: Message
    finish_reason: FinishReason

    @property
    def text(self) -> str:
        """What the model wrote for the user; empty if it only calls tools."""
        return str(self.message.get("content") or "")


class Chat:
    """Answers requests with what the router serves, and records each answer in the log.

    Recording never delays an answer and never fails it, unless the log is ``strict``. Closing the
    log and the router stays with the caller. All methods may be called from any thread.

    Args:
        log: where runs and feedback go.
        router: what answers; it serves the same home and namespace as the log.
        model: the base model's name, for the record.

    Raises:
        ConfigError: the log and the router are of different homes or namespaces, so that feedback
            would never reach the model that is judged.
    """

    def __init__(self, log: Log, router: Router, *, model: str | None = None) -> None:
        served = router.registry
        if log.namespace != served.namespace or not log.home.path.samefile(served.home.path):
            raise ConfigError(
                f"{log!r} records for another home or namespace than {served!r} serves; open both "
                f"with the same ones"
            )
        self.log, self.router, self.model = log, router, model

    def reply(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        thread_id: str | None = None,
        trace_id: str | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> ChatReply:
        """Answer a conversation and record the answer.

        Args:
            messages: the conversation so far, in OpenAI's shape.
            tools: what the model may call, in OpenAI's shape.
            thread_id: the conversation; during a canary, one revision answers all of it.
            trace_id: the task of an agent, of which this call is a part.
            user_id: who asks.
            tags: domains; pairs made from this run belong to the first.
            metadata: anything else.
            sampling: ``max_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``,
                ``chat_template_kwargs``, ``tool_choice``, ``response_format`` and ``best_of``, as
                in :class:`~agentpref.serve.backend.GenerationRequest`.

        Raises:
            InvalidMessage: there is no message, or one has not the shape of a message.
            ConfigError: a sampling setting is out of range, no answer fulfils the schema that is
                asked for, or ``tags`` is a string.
            ServingError: the engine failed; nothing is recorded.
        """
        request = _request(messages, tools, tags, sampling)
        about: dict[str, Any] = {"trace_id": trace_id, "user_id": user_id, "tags": tags}
        reply = self.router.generate(request, thread_id=thread_id)
        return self._record(request, reply, thread_id=thread_id, metadata=metadata, **about)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        thread_id: str | None = None,
        trace_id: str | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Iterator[str | ChatReply]:
        """Yield pieces of text as they come, then the recorded answer; arguments as for ``reply``.

        The request is checked and admitted when the first piece is asked for. A stream that is
        closed early stops the engine, and its answer is not recorded.
        """
        request = _request(messages, tools, tags, sampling)
        about: dict[str, Any] = {"trace_id": trace_id, "user_id": user_id, "tags": tags}
        for piece in self.router.stream(request, thread_id=thread_id):
            if isinstance(piece, Reply):
                yield self._record(request, piece, thread_id=thread_id, metadata=metadata, **about)
            else:
                yield piece

    def thumbs(
        self, run_id: str, *, up: bool, comment: str | None = None, user_id: str | None = None
    ) -> str:
        """Say whether an answer was good, as ``log.thumbs``; return the feedback's id."""
        return self.log.thumbs(run_id, up=up, comment=comment, user_id=user_id)

    def correct(
        self,
        run_id: str,
        output: str | Message,
        *,
        comment: str | None = None,
        user_id: str | None = None,
    ) -> str:
        """Say what an answer should have been, as ``log.correct``; return the feedback's id."""
        return self.log.correct(run_id, output, comment=comment, user_id=user_id)

    def _record(
        self,
        request: GenerationRequest,
        reply: Reply,
        *,
        metadata: Mapping[str, Any] | None,
        **about: Any,
    ) -> ChatReply:
        scored = {} if reply.score is None else {"score": reply.score}
        run_id = self.log.record(
            request.messages,
            reply.message,
            model=self.model,
            revision=reply.revision,
            tools=request.tools,
            params=_params(request),
            token_ids=reply.token_ids,
            logprobs=reply.logprobs,
            metadata={"finish_reason": reply.finish_reason, **scored, **(metadata or {})},
            **about,
        )
        return ChatReply(run_id, reply.revision, reply.message, reply.finish_reason)


def _params(request: GenerationRequest) -> dict[str, Any]:
    params = {name: getattr(request, name) for name in _SAMPLING}
    said = {name: getattr(request, name) for name in _UNSAID}
    return params | {name: value for name, value in said.items() if value != _UNSAID[name]}


def _request(
    messages: Sequence[Message] | str,
    tools: Sequence[Tool],
    tags: Sequence[str],
    sampling: Mapping[str, Any],
) -> GenerationRequest:
    if isinstance(messages, str):
        raise InvalidMessage(
            f"messages is {described(messages)}; pass a list such as "
            "[{'role': 'user', 'content': …}]"
        )
    if isinstance(tags, str):
        raise ConfigError(f"tags is {described(tags)}; pass a list of strings, such as ['support']")
    if unknown := sorted(sampling.keys() - set(_SETTINGS)):
        raise ConfigError(f"{unknown[0]!r} is no sampling setting; known: {', '.join(_SETTINGS)}")
    return GenerationRequest(tuple(messages), tuple(tools), **sampling)
