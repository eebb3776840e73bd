"""The records that flow through agentpref, as plain immutable values.

A *run* is one model call. *Feedback* and *comparisons* say what people, judges and programs
thought of runs. An *example* is what is trained or held out: a prompt and one or more completions.

Messages are OpenAI-shaped mappings: ``{"role": …, "content": …}`` plus, where there are any,
``tool_calls``, ``tool_call_id`` and ``name``. They are never changed once recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Message: TypeAlias = Mapping[str, Any]
Tool: TypeAlias = Mapping[str, Any]
Winner: TypeAlias = Literal["a", "b", "tie"]
Source: TypeAlias = Literal["human", "model", "code"]
SOURCES: tuple[Source, ...] = get_args(Source)
WINNERS: tuple[Winner, ...] = get_args(Winner)
Origin: TypeAlias = Literal["correction", "comparison", "thumbs", "judge", "thumb"]
"""What an example is made of: ``thumbs`` are opposed ones on one prompt, ``thumb`` is lone."""

BASE = "base"
"""The revision name of the bare base model, with no adapter."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""The ranks of adapters that vLLM loads; others are neither trained nor served."""

HELD_OUT = 0.2
"""The share of the prompts that is held out where no setting says another."""

Progress: TypeAlias = Callable[[str, int, int], object]
"""A callback of long work: the name of the stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model was asked. ``id`` is the content address of tools and messages together."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One model call: a prompt in, one assistant message out."""

    run_id: str
    namespace: str
    created_at: float
    prompt: Prompt
    output: Message
    model: str | None = None
    revision: str | None = None
    thread_id: str | None = None
    trace_id: str | None = None
    user_id: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """The domain tag that a run is filed under: its first one, or ``"untagged"``."""
        return self.tags[0] if self.tags else "untagged"


@dataclass(frozen=True, slots=True)
class Feedback:
    """A signal on one run. ``correction`` is the output as it should have been, if it is one."""

    feedback_id: str
    run_id: str
    created_at: float
    key: str
    score: float | None = None
    value: Any = None
    comment: str | None = None
    source: Source = "human"
    user_id: str | None = None
    correction: Message | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of the same prompt and which of them was better."""

    comparison_id: str
    created_at: float
    run_a: str
    run_b: str
    winner: Winner
    source: Source = "human"
    user_id: str | None = None
    comment: str | None = None

    def swap(self) -> Comparison:
        """The same judgement with the two runs named in the other order."""
        flipped: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
        return replace(self, run_a=self.run_b, run_b=self.run_a, winner=flipped[self.winner])


class Stratum(NamedTuple):
    """A slice of examples that the gate protects separately."""

    namespace: str
    tag: str
    origin: str
    age: str = "any"

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt, and what is known of it.

    ``label`` says how good it is: 1 for preferred or liked, 0 for rejected or disliked, or any
    score or return, where larger is better. ``token_ids`` and ``logprobs`` are the tokens as the
    engine wrote them, with their natural log-probabilities; ``loss_mask`` says which of these
    tokens are trained (``None``: all). ``author`` is the revision that wrote it; ``None`` is a
    person, or unknown.
    """

    message: Message
    label: float | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    loss_mask: tuple[bool, ...] | None = None
    author: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What is trained, or held out to prove adapters: a prompt and n ≥ 1 completions of it.

    A pair has two completions, the chosen one first, labelled 1 and 0. A lone thumb has one. A
    judged group has as many as were judged, best first. The examples of one trace share its
    ``trace_id``; ``run_at`` (POSIX seconds) orders them.

    ``example_id`` is the content address of prompt, completions and labels. ``noise`` is the
    probability ε that the label is flipped. ``provenance`` names the rows of feedback and
    comparisons that the example was made of.
    """

    example_id: str
    namespace: str
    created_at: float
    prompt: Prompt
    completions: tuple[Completion, ...]
    origin: Origin
    tag: str = "untagged"
    weight: float = 1.0
    noise: float = 0.05
    held_out: bool = False
    provenance: tuple[str, ...] = ()
    trace_id: str | None = None
    run_at: float = 0.0

    @property
    def lone(self) -> bool:
        """Whether there is a single completion, with nothing to compare it to."""
        return len(self.completions) == 1
