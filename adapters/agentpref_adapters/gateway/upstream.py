"""What answers a call: the protocol of an upstream, and the answer as it comes.

An upstream speaks OpenAI's chat completions, whatever is behind it: ``routed.py`` answers with the
live revision of a home, ``proxied.py`` asks another server. Either is entered for each call, which
admits it, and left when the last piece is out or the client has gone, which ends the work behind.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from agentpref.types import INCOMPLETE, Message
from agentpref_adapters.gateway.asked import Asked


class Tokens(NamedTuple):
    """The tokens of one answer, as the engine wrote them, with their natural log-probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Exchange(Protocol):
    """One call that was admitted. ``revision`` is what answers it, if that is known."""

    revision: str | None

    async def whole(self) -> dict[str, Any]:
        """Wait for all of it: a ``chat.completion``.

        Raises:
            HttpError: the upstream failed or refused.
        """

    def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Give it piece by piece: ``chat.completion.chunk``; raises as :meth:`whole` does."""

    def tokens(self, index: int) -> Tokens | None:
        """The tokens of an answer that is complete, if the engine tells them."""


class Upstream(Protocol):
    """What answers."""

    def admit(self, asked: Asked, *, streaming: bool) -> AbstractAsyncContextManager[Exchange]:
        """Admit a call. Where it can be known before the first piece, a refusal is raised here."""

    async def models(self) -> list[dict[str, Any]]:
        """The models that may be asked for, in OpenAI's shape."""

    async def problem(self) -> str | None:
        """Why it cannot answer now; ``None`` if it can."""

    async def aclose(self) -> None:
        """Let go of what it holds."""


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    finish_reason: str = INCOMPLETE
    logprobs: list[float] = field(default_factory=list)

    @property
    def says_something(self) -> bool:
        """Whether there is anything to record."""
        return any(value for key, value in self.message.items() if key != "role")


class Answer:
    """Puts the pieces of an answer together, and reads whole ones.

    Pieces come from servers of any kind: what has not the expected shape is passed on to the client
    and left out here.
    """

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}
        self.model: str | None = None
        self.usage: Mapping[str, Any] = {}

    @classmethod
    def of(cls, completion: Mapping[str, Any]) -> Answer:
        """Read a whole ``chat.completion``."""
        found = cls()
        found._read_head(completion)
        for choice in _mappings(completion.get("choices")):
            own = found._choice(choice)
            message = choice.get("message")
            if isinstance(message, Mapping):
                own.message = {"role": "assistant", **message}
            found._read_tail(own, choice)
        return found

    def add(self, piece: Mapping[str, Any]) -> None:
        """Read one ``chat.completion.chunk``."""
        self._read_head(piece)
        for choice in _mappings(piece.get("choices")):
            own = self._choice(choice)
            delta = choice.get("delta")
            if isinstance(delta, Mapping):
                _merge(own.message, delta)
            self._read_tail(own, choice)

    def completion(self) -> dict[str, Any]:
        """What came in pieces as a whole ``chat.completion``."""
        choices = [
            {"index": index, "message": choice.message, "finish_reason": choice.finish_reason}
            for index, choice in sorted(self.choices.items())
        ]
        found = {"object": "chat.completion", "created": int(time.time()), "model": self.model}
        return {**found, "choices": choices, "usage": dict(self.usage) or None}

    def messages(self) -> list[tuple[int, Choice, Message]]:
        """The answers that ended, or say something, by their number."""
        return [
            (index, choice, _cleaned(choice.message))
            for index, choice in sorted(self.choices.items())
            if choice.says_something or choice.finish_reason != INCOMPLETE
        ]

    def _choice(self, choice: Mapping[str, Any]) -> Choice:
        index = choice.get("index")
        return self.choices.setdefault(index if type(index) is int else 0, Choice())

    def _read_head(self, given: Mapping[str, Any]) -> None:
        if isinstance(given.get("model"), str):
            self.model = given["model"]
        if isinstance(given.get("usage"), Mapping):
            self.usage = given["usage"]

    def _read_tail(self, own: Choice, choice: Mapping[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            own.finish_reason = reason
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, Mapping):
            content = _mappings(logprobs.get("content"))
            own.logprobs += [
                float(token["logprob"])
                for token in content
                if isinstance(token.get("logprob"), int | float)
            ]


def _merge(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a delta to a message: texts are joined, and tool calls by their number."""
    for key, value in delta.items():
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for part in _mappings(value):
                at, name = part.get("index"), part.get("id")
                if type(at) is not int and name and calls and calls[-1].get("id") != name:
                    at = len(calls)  # some servers number none of them
                at = at if type(at) is int and 0 <= at <= len(calls) else max(0, len(calls) - 1)
                if at == len(calls):
                    calls.append({})
                _merge(calls[at], {k: v for k, v in part.items() if k != "index"})
        elif isinstance(value, str) and key not in ("role", "type", "id"):
            before = message.get(key)
            message[key] = (before if isinstance(before, str) else "") + value
        elif isinstance(value, Mapping):
            inside = message.setdefault(key, {})
            if isinstance(inside, dict):
                _merge(inside, value)
        elif value is not None:
            message[key] = value


def _cleaned(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message to record: without what is null, and with content where it calls nothing."""
    kept = {key: value for key, value in message.items() if value not in (None, [], "")}
    return {
        "role": "assistant",
        "content": "",
        **kept,
    }


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
