"""The protocol of an inference engine, and the values that are passed to it and from it.

A backend loads revisions under their own names, which are never reused, and generates with exactly
the one that it is given. The router decides which one that is.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from agentpref.errors import ConfigError, GenerationFailed, TemplateRefused, described
from agentpref.models.grammar import ANY_TOOL, AnswerGrammars, function_of
from agentpref.models.instructions import instructed
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import Ids, encode_prompt
from agentpref.models.tool_calls import CallStream, assistant_message
from agentpref.record.messages import check_shapes, check_tool_shapes
from agentpref.types import Message, Prompt, Tool

FinishReason = Literal["stop", "length"]

_SEEDS = 2**63

MAX_TOKENS = 1 << 17
"""The most tokens that one request may ask for."""

MAX_CHARACTERS = 8_000_000
"""The most characters that the messages and tools of one request may have together."""

MAX_BEST_OF = 64
"""Of how many answers, at most, one request may ask for the best."""

MAX_STOPS = 32
"""The most stop strings of one request."""

CLOSED = (
    "the backend was closed, or belongs to the process that this one was forked from; make a new "
    "one to continue serving"
)
"""The message of ``BackendClosed``."""

IN_PROCESS = "process:"
"""The start of each place whose engine ends with its process."""


@dataclass(frozen=True, slots=True)
class Revision:
    """An immutable, content-addressed adapter, ``rev-000042-<sha12>``, and its folder.

    Times are in seconds since 1970. ``tainted_at`` is when something that it was trained on was
    forgotten; ``quarantined_at`` is since when it must not serve, for the ``quarantine_reason``;
    ``pruned_at`` is when its folder was removed to make room.
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

    @property
    def instructions(self) -> str:
        """What the model is told before each conversation."""
        return str(self.manifest.get("instructions", ""))


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call to a model. ``temperature`` 0 is greedy; ``seed`` makes sampling reproducible.

    ``chat_template_kwargs`` are arguments of the chat template for this call, such as
    ``{"enable_thinking": False}``. Sizes are bounded before an engine sees the request:
    :data:`MAX_TOKENS`, :data:`MAX_CHARACTERS` and :data:`MAX_STOPS`.

    ``tool_choice`` is ``"auto"`` (the model decides), ``"none"`` (as if no tools were offered:
    ``tools`` is then empty), ``"any"`` or ``"required"`` (one call or more), or the name of the
    tool to call. ``response_format`` is ``{"type": "json_object"}``, or ``{"type": "json_schema",
    "json_schema": {"name": …, "schema": {…}}}``. The engine enforces both; where a model may also
    call tools, its answer is calls or JSON.

    ``best_of`` asks for the best of so many answers by a reward model; see
    :mod:`agentpref.serve.best`.

    Raises:
        InvalidMessage: there is no message, or one has not the shape of a message.
        ConfigError: a setting has the wrong type, or is out of range.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tool_choice: str = "auto"
    response_format: Mapping[str, Any] | None = None
    best_of: int = 1

    def __post_init__(self) -> None:
        check_shapes(self.messages)
        check_tool_shapes(self.tools)
        is_stop = isinstance(self.stop, (list, tuple)) and len(self.stop) <= MAX_STOPS
        for name, is_allowed, allowed in (
            (
                "max_tokens",
                _is(Integral, self.max_tokens) and 1 <= self.max_tokens <= MAX_TOKENS,
                f"a whole number from 1 to {MAX_TOKENS:,}",
            ),
            (
                "temperature",
                _is(Real, self.temperature) and 0 <= self.temperature < inf,
                "a number, 0 or more",
            ),
            ("top_p", _is(Real, self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "seed",
                self.seed is None or (_is(Integral, self.seed) and -_SEEDS <= self.seed < _SEEDS),
                "a whole number of 64 bits, or None",
            ),
            (
                "stop",
                is_stop and all(isinstance(one, str) and one for one in self.stop),
                f"a list of at most {MAX_STOPS} strings that are not empty, such as ['END']",
            ),
            (
                "best_of",
                _is(Integral, self.best_of) and 1 <= self.best_of <= MAX_BEST_OF,
                f"a whole number from 1 to {MAX_BEST_OF}",
            ),
            (
                "chat_template_kwargs",
                isinstance(self.chat_template_kwargs, Mapping),
                "a mapping of names to values",
            ),
        ):
            if not is_allowed:
                value = described(getattr(self, name))
                raise ConfigError(f"{name} is {value}, but must be {allowed}")
        if self.best_of > 1 and not self.temperature:
            raise ConfigError(
                f"best_of is {self.best_of} with temperature 0, which writes one answer "
                f"{self.best_of} times; set temperature to .8, say"
            )
        _check_tool_choice(self.tool_choice, self.tools)
        _check_response_format(self.response_format)
        if self.tool_choice == "none":
            object.__setattr__(self, "tools", ())
        if (
            size := sum(map(_length, (self.messages, self.tools, self.response_format)))
        ) > MAX_CHARACTERS:
            raise ConfigError(
                f"the messages, tools and schemas have {size:,} characters, but must have at most "
                f"{MAX_CHARACTERS:,}; shorten them"
            )


def _check_tool_choice(choice: object, tools: Sequence[Tool]) -> None:
    """Refuse a choice that is no word for one, and no tool's name."""
    if choice in ("auto", "none"):
        return
    functions = map(function_of, tools)
    names = [str(function["name"]) for function in functions if function is not None]
    if not isinstance(choice, str):
        raise ConfigError(
            f"tool_choice is {described(choice)}, but must be 'auto', 'none', 'any', 'required' or "
            "the name of a tool"
        )
    if choice in ANY_TOOL and not names:
        raise ConfigError(f"tool_choice is {choice!r}, but no tool is offered; offer one in tools")
    if choice not in ANY_TOOL and choice not in names:
        offered = ", ".join(names) or "none"
        raise ConfigError(
            f"tool_choice is {choice[:80]!r}, but must be 'auto', 'none', 'any', 'required' or the "
            f"name of a tool; the tools offered are: {offered[:300]}"
        )


def _check_response_format(value: object) -> None:
    """Refuse a response format that has not OpenAI's shape."""
    if value is None:
        return
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in ("text", "json_object"):
        return
    given = value.get("json_schema") if isinstance(value, Mapping) else None
    schema = given.get("schema", {}) if isinstance(given, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        shown = described(value) if kind is None else f"of the type {described(kind)}"
        if isinstance(kind, str) and kind.isidentifier():
            shown = f"of the type {kind[:80]!r}"
        raise ConfigError(
            f"response_format is {shown}, but must be {{'type': 'json_object'}} or {{'type': "
            "'json_schema', 'json_schema': {'name': …, 'schema': {…}}}"
        )


def _is(kind: type, value: object) -> bool:
    """Whether a value is a number of a kind, numpy's too; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _length(value: object) -> int:
    """How many characters the texts inside a value have."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, (list, tuple)) else 0


def encode_request(
    request: GenerationRequest, template: ChatTemplate, model: str, instructions: str = ""
) -> Ids:
    """The tokens to continue for a request: those that training has for the same messages.

    ``instructions`` are those of the revision that answers.

    Raises:
        ConfigError: it asks for the best of several answers, which an engine does not choose.
        GenerationFailed: the chat template does not render the messages, or loses some of them.
    """
    if request.best_of > 1:
        raise ConfigError(
            f"best_of is {request.best_of}, which needs a reward model; wrap the backend in "
            "agentpref.serve.best.BestOf, or start the gateway with --reward"
        )
    template.require_arguments(request.chat_template_kwargs)
    messages = instructed(request.messages, instructions)
    prompt = Prompt("", messages, request.tools, request.chat_template_kwargs)
    try:
        return encode_prompt(prompt, template)
    except (TemplateRefused, TypeError, ValueError) as error:  # the latter two of a tokenizer
        raise GenerationFailed(f"{model!r} cannot be asked: {error}") from error


def write_grammar(request: GenerationRequest, grammars: AnswerGrammars, model: str) -> str | None:
    """The grammar that the answer to a request is held to; ``None`` if it may be anything.

    Raises:
        ConfigError: no answer fulfils the schemas, or they use what cannot be enforced.
        GenerationFailed: the model cannot do what is asked, such as call tools.
        MissingDependency: llguidance is not installed.
    """
    prompt = Prompt("", request.messages, request.tools, request.chat_template_kwargs)
    try:
        return grammars.write(prompt, request.tool_choice, request.response_format)
    except TemplateRefused as error:
        raise GenerationFailed(f"{model!r} cannot be held to this answer: {error}") from error


def read_answer(request: GenerationRequest, text: str) -> Message:
    """What a model wrote as a message, with its tool calls where it may make some."""
    if reads_calls(request):
        return assistant_message(text, turn=len(request.messages))
    return {"role": "assistant", "content": text}


def reads_calls(request: GenerationRequest) -> bool:
    """Whether tool calls are read from an answer: not from JSON, nor where none are wanted."""
    is_json = (request.response_format or {}).get("type", "text") != "text"
    return request.tool_choice != "none" and (bool(request.tools) or not is_json)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of one revision. ``logprobs`` are natural logs, one per token of ``token_ids``.

    ``prompt_tokens`` is how many tokens the engine was given, where it says so. ``score`` is what
    the best of several answers was chosen by.
    """

    revision: str
    message: Message
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int | None = None
    score: float | None = None


class AnswerStream:
    """What is certain of an answer while it comes: text, and tool calls as they are complete.

    All items together are the message of the reply, which has the last word on its calls.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._reader = CallStream(turn=len(request.messages)) if reads_calls(request) else None
        self._calls = 0

    def of(self, piece: str | Reply) -> Iterator[str | Mapping[str, Any]]:
        """What is certain after a piece of text, or after the reply."""
        if self._reader is None:
            if isinstance(piece, str):
                yield piece
            return
        if isinstance(piece, str):
            found: Iterator[Any] = self._reader.push(piece)
        else:
            texts = (item for item in self._reader.finish() if isinstance(item, str))
            found = chain(texts, (piece.message.get("tool_calls") or [])[self._calls :])
        for item in found:
            self._calls += not isinstance(item, str)
            yield item


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, and where.

    ``places`` names where revisions are loaded, one place per server: equal for two backends that
    share a server, unique for an engine inside a process. ``max_loaded`` is how many revisions fit
    beside each other.
    """

    engine: str
    streaming: bool
    places: tuple[str, ...]
    max_loaded: int | None = None


def place_in_process() -> str:
    """Make a place for an engine inside this process."""
    return f"{IN_PROCESS}{os.getpid()}-{uuid.uuid4().hex[:12]}"


@runtime_checkable
class ServingBackend(Protocol):
    """An inference engine that can hold several revisions of one base model."""

    def capabilities(self) -> Capabilities:
        """Say what the engine can do, without using the model."""

    def validate(self, revision: Revision) -> None:
        """Refuse a revision that this engine cannot serve, before it is loaded.

        Raises:
            InvalidAdapter: the adapter is broken, unsupported or edited.
            WrongBase: it was trained on another base model, tokenizer or chat template.
        """

    def load(self, revision: Revision) -> None:
        """Make a revision ready to generate; loading it again does nothing."""

    def probe(self, revision_id: str) -> Reply:
        """Answer one fixed prompt greedily.

        Raises:
            ProbeFailed: a log-probability is not finite, so the revision is broken.
            SwapFailed: there was no answer, so the engine is at fault.
        """

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Free a revision's memory at ``places`` (``None``: all); if not loaded, do nothing."""

    def list_loaded(self) -> tuple[str, ...]:
        """Name the loaded revisions, in the order they were loaded."""

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request with one revision (or ``"base"``), every token of it."""

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces of text as they come, and the whole :class:`Reply` last."""

    def close(self) -> None:
        """Stop the engine; calls after this raise ``BackendClosed``."""


PROBE = GenerationRequest(
    messages=({"role": "user", "content": "Hello! What can you do for me?"},), max_tokens=8
)
"""What an engine asks a revision before it may serve."""
