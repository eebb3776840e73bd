"""What agentpref asks of an inference engine, and the values that pass between them.

A backend loads revisions under their own, never reused names and generates with exactly the one it
is told. It does not know which revision is live, who is asking, or why: that is the router's.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from agentpref.errors import ConfigError, InvalidMessage
from agentpref.types import Message, Tool

FinishReason = Literal["stop", "length"]

_SEEDS = 2**63

IN_PROCESS = "process:"
"""How the places of engines begin that end with their process."""


@dataclass(frozen=True, slots=True)
class Revision:
    """An immutable, content-addressed adapter, ``rev-000042-<sha12>``, and the folder it is in.

    ``tainted_at`` is when it was found that its training saw what a user has had forgotten;
    ``quarantined_at`` is since when it must not serve, for the ``quarantine_reason``; and
    ``pruned_at`` is when its folder was removed, to make room.
    """

    revision_id: str
    namespace: str
    parent: str | None
    created_at: float
    path: Path
    manifest: dict[str, Any]
    tainted_at: float | None = None
    quarantined_at: float | None = None
    quarantine_reason: str | None = None
    pruned_at: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call to a model. ``temperature`` 0 is greedy; ``seed`` fixes a sampled answer.

    Raises:
        InvalidMessage: there is no message.
        ConfigError: a setting is out of range.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no engine could answer."""
        if not self.messages:
            raise InvalidMessage("a request has no messages; give at least one")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _require(0 <= self.temperature < inf, "temperature", self.temperature, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        if self.seed is not None:
            _require(-_SEEDS <= self.seed < _SEEDS, "seed", self.seed, "a whole number of 64 bits")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")


@dataclass(frozen=True, slots=True)
class Reply:
    """What one revision answered. ``logprobs`` are natural logs, one per token of ``token_ids``."""

    revision: str
    message: Message
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, and where.

    ``places`` says where loaded revisions are, each server for itself: a place is equal for two
    backends that share it, and unique to the process for an engine inside it. ``max_loaded`` is
    how many revisions fit beside each other.
    """

    engine: str
    streaming: bool
    places: tuple[str, ...]
    max_loaded: int | None = None


def place_in_process() -> str:
    """Name an engine of this process that no other process can reach."""
    return f"{IN_PROCESS}{os.getpid()}-{uuid.uuid4().hex[:12]}"


@runtime_checkable
class ServingBackend(Protocol):
    """An inference engine that can hold several revisions of one base model."""

    def capabilities(self) -> Capabilities:
        """Say what the engine can do, without touching the model."""

    def validate(self, revision: Revision) -> None:
        """Refuse a revision that this engine could not serve, before the engine sees it.

        Raises:
            InvalidAdapter: for a broken, unsupported or edited adapter.
            WrongBase: for one trained on another base model, tokenizer or chat template.
        """

    def load(self, revision: Revision) -> None:
        """Make a revision ready to generate; loading one that is loaded does nothing."""

    def probe(self, revision_id: str) -> Reply:
        """Answer one fixed prompt greedily.

        Raises:
            ProbeFailed: a log-probability is not finite; the revision is to blame.
            SwapFailed: there was no answer; the engine is.
        """

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Give back a revision's memory; unloading one that is not loaded does nothing.

        Args:
            revision_id: the revision.
            places: only there; ``None``: everywhere.
        """

    def list_loaded(self) -> tuple[str, ...]:
        """Name the revisions that are ready, in the order they were loaded."""

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request with one revision (or ``"base"``), every token of it."""

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces of text as they come, then the whole :class:`Reply` last."""

    def close(self) -> None:
        """Stop the engine; calls after this raise ``BackendClosed``."""


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}")


PROBE = GenerationRequest(
    messages=({"role": "user", "content": "Hello! What can you do for me?"},), max_tokens=8
)
"""What engines ask a revision before it may serve."""
