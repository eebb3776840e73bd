"""The records that flow through agentpref, as plain immutable values.

A *run* is one model call. *Feedback* and *comparisons* say what people, judges and programs
thought of runs. A *pair* is what DPO trains on. A *thumb* is a lone judgement with nothing to be
compared with. Nothing here knows of SQLite, tokens, models or adapters.

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
Origin: TypeAlias = Literal["correction", "comparison", "thumbs", "judge"]

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
    """A slice of pairs that is protected separately."""

    namespace: str
    tag: str
    origin: str
    age: str = "any"

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: ``chosen`` was liked better than ``rejected`` as an answer to ``prompt``.

    ``noise`` is the probability ε that the label is flipped; ``provenance`` names the feedback and
    comparisons that the pair was made of; ``held_out`` pairs prove adapters and never train them.
    ``chosen_ids`` and ``chosen_by`` are the tokens of the chosen answer as the engine wrote them,
    and the revision that did, both of one run that was judged; ``None`` where a person wrote it or
    nobody knows. The same holds of the rejected one.
    """

    pair_id: str
    namespace: str
    created_at: float
    prompt: Prompt
    chosen: Message
    rejected: Message
    origin: Origin
    tag: str = "untagged"
    weight: float = 1.0
    noise: float = 0.05
    held_out: bool = False
    provenance: tuple[str, ...] = ()
    chosen_ids: tuple[int, ...] | None = None
    rejected_ids: tuple[int, ...] | None = None
    chosen_by: str | None = None
    rejected_by: str | None = None

    @property
    def id(self) -> str:
        """What it is known by among all examples: its ``pair_id``."""
        return self.pair_id


@dataclass(frozen=True, slots=True)
class Thumb:
    """A lone judgement: one answer, liked or not, and nothing to compare it with.

    ``thumb_id`` is the content address of prompt, answer and direction, as a pair's is; it is empty
    in thumbs that no log was asked for. ``token_ids`` and ``written_by`` are the answer's tokens as
    the engine wrote them and the revision that did; ``provenance`` names the feedback it was made
    of.
    """

    run_id: str
    namespace: str
    created_at: float
    prompt: Prompt
    completion: Message
    desirable: bool
    tag: str = "untagged"
    held_out: bool = False
    thumb_id: str = ""
    provenance: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | None = None
    written_by: str | None = None

    @property
    def id(self) -> str:
        """What it is known by among all examples: its ``thumb_id``."""
        return self.thumb_id


Example: TypeAlias = "Pair | Thumb"
"""Whatever is trained on, or held out to prove."""
