"""The records that flow through agentpref, as plain immutable values.

A *run* is one model call. *Feedback* and *comparisons* are the judgements of people, judges and
programs on runs. An *example* is a prompt with one or more completions, to train on or to hold out.
An *update report* says what an update did, and why.

Messages are OpenAI-shaped mappings: ``{"role": …, "content": …}`` and, where there are any,
``tool_calls``, ``tool_call_id`` and ``name``. They never change once they are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Message: TypeAlias = Mapping[str, Any]
Tool: TypeAlias = Mapping[str, Any]
Winner: TypeAlias = Literal["a", "b", "tie"]
Source: TypeAlias = Literal["human", "model", "code"]
SOURCES: tuple[Source, ...] = get_args(Source)
WINNERS: tuple[Winner, ...] = get_args(Winner)
Origin: TypeAlias = Literal[
    "correction",
    "comparison",
    "thumbs",
    "comment",
    "critique",
    "judge",
    "thumb",
    "ordinary",
    "remark",
    "decision",
]
"""What an example is made of; ``thumbs`` are opposed ones on one prompt, ``thumb`` is lone.

``comment`` is an answer that was revised by a person's comment, and ``critique`` one by a model's;
a judge prefers the revision. ``judge`` is anything else that a judge said.
``ordinary`` is an answer that nobody judged, which a candidate shall go on to give, and ``remark``
one that somebody commented on: live, told the comment, teaches the candidate. ``decision`` is an
answer in a logged conversation, which an offline method has weighed by what it led to.
"""

Verdict: TypeAlias = Literal[
    "promoted", "passed", "refused", "cut_short", "insufficient", "nothing_new", "nothing_to_gain",
    "nothing_usable", "failed", "interrupted", "busy",
]  # fmt: skip
"""The outcome of an update; one with the last three raised an error, and is listed as that."""

BASE = "base"
"""The revision name of the bare base model, with no adapter."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""The ranks of adapters that vLLM loads, and so all that are trained and served."""

HELD_OUT = 0.2
"""The default share of the prompts that is held out."""

THUMBS = "thumbs"
"""The key of feedback whose scores are likes and dislikes; other keys are declared to be."""

COMMENT = "comment"
"""The key of feedback that is words only, and was given none."""

RETRACTION = "retraction"
"""The key of feedback that takes back what its voter said of a run before: ``Log.retract``.

Its value is a mapping: ``key`` is what is taken back (``"comparison"`` for comparisons, ``None``
for everything), and ``against`` limits a comparison to the one with this other run.
"""

INCOMPLETE = "incomplete"
"""The ``finish_reason`` in a run's metadata that says its answer broke off; it makes no example."""

UNKNOWN_BEFORE = "unknown_before"
"""The key of a run's metadata that names what it continues and the log has not seen.

Its prompt is not what the model was given, so it makes no example.
"""

REVISED_FROM = "revised_from"
"""The key of a run's metadata that names the run whose answer it is a revision of."""

REVISED_BY = "revised_by"
"""Beside it: by what, ``"comment"`` or ``"critique"``."""

COMMENT_ID = "feedback_id"
"""Beside it: the feedback whose comment was followed. Its words stay there, to be forgotten."""

SAMPLED_FOR = "sampled_for"
"""The key of a run's metadata that names the run to whose prompt it is a further answer."""

BY_JUDGES: frozenset[Origin] = frozenset({"comment", "critique", "judge"})
"""The origins of examples whose label is a judge's verdict."""

INSTRUCTED = "live, instructed"
"""What a report says that a candidate started from which was told rules, and not trained."""

Progress: TypeAlias = Callable[[str, int, int], object]
"""A callback of long work: ``(stage, done, total)``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model was given; ``id`` is its content address.

    ``chat_template_kwargs`` are the arguments of the chat template that it was asked with, such as
    ``{"enable_thinking": False}``.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


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
        """The domain of the run: its first tag, or ``"untagged"``."""
        return self.tags[0] if self.tags else "untagged"


@dataclass(frozen=True, slots=True)
class Feedback:
    """A judgement on one run; ``correction`` is the output as it should have been.

    ``scale`` is the lowest and the highest score that could have been given; ``None`` is not known.
    """

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
    scale: tuple[float, float] | None = None


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
        """The same judgement with the two runs in the other order."""
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

    ``label`` is 1 for preferred or liked, 0 for rejected or disliked, or any score or return, where
    larger is better. ``token_ids`` and ``logprobs`` are the tokens as the engine wrote them, with
    their natural log-probabilities; ``loss_mask`` marks the tokens to train (``None``: all).
    ``author`` is the revision that wrote it; ``None`` is a person, or unknown.
    """

    message: Message
    label: float | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    loss_mask: tuple[bool, ...] | None = None
    author: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with n ≥ 1 completions: to train on, or held out to prove adapters.

    A pair has two completions, the chosen one first, labelled 1 and 0. A lone thumb has one. A
    judged group has as many as were judged, best first. An ordinary answer is one without a label.
    The examples of one trace share its ``trace_id``; ``run_at`` (POSIX seconds) orders them.

    ``example_id`` is the content address of prompt, completions and labels. ``noise`` is the
    probability ε that the label is flipped. ``provenance`` names the rows of feedback and
    comparisons that the example was made of; of an ordinary answer, its run; of a remark, its run
    and its comment. ``advice`` is what live is told to teach the candidate by a remark.
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
    advice: str = ""

    @property
    def lone(self) -> bool:
        """Whether there is a single judged completion, with nothing to compare it to."""
        return len(self.completions) == 1 and not self.ordinary

    @property
    def decision(self) -> bool:
        """Whether it is a decision of a logged conversation, labelled by its advantage."""
        return self.origin == "decision"

    @property
    def cloned(self) -> bool:
        """Whether it is imitated, and compared with nothing: a decision by itself."""
        return self.decision and len(self.completions) == 1

    @property
    def ordinary(self) -> bool:
        """Whether it is an answer without a label, which prefers nothing: ordinary, or a remark."""
        return self.origin in ("ordinary", "remark")


class Answered(NamedTuple):
    """A held-out prompt, and what live (``before``) and an update's candidate answered to it."""

    prompt: Prompt
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did and why. Accuracies are held-out, per tag, before and after.

    ``accuracy`` is on all that was evaluated, ``retained`` on what live had learned of it.

    ``verdict`` says what the update came to, and never changes. ``promoted``: its ``revision``
    passed the gate and was made live. ``passed``: it passed and was not; ``notes`` say why, and
    name the command that makes it live. ``cut_short``: it failed the gate, and ``max_minutes`` had
    stopped its training. What serves today is for the registry to say.

    ``counts`` are numbers of pairs and, under the same names with ``_thumbs``, of lone thumbs.
    ``new``, ``old`` and their ``_held_out`` are all there are. Each of these is ``trained``,
    ``replayed``, ``new_evaluated``, ``old_evaluated``, ``not_drawn`` this time, ``waiting`` for the
    next update, ``set_aside`` by an attempt of this one, ``aged_out`` by it, ``still_aged_out``
    since an older one, or in ``left_out``. What earlier updates set aside is ``still_set_aside``,
    and no part of ``new``. ``evaluated_thumbs`` are the new held-out thumbs that count as evidence:
    as many likes as dislikes. Answers that nobody judged were ``anchored`` in training,
    ``anchored_held_out`` for the gate, or ``anchored_left_out``, if any were drawn; ``taught`` are
    the remarks that taught the candidate. Decisions of conversations are counted under the same
    names with ``_decisions``; ``valued`` ones weigh nothing, and decided what the others weigh.

    Every example that was not used as it was logged is counted by reason: ``left_out`` are neither
    trained nor evaluated (it counts the rows of feedback that made no example, too), ``shortened``
    lost the oldest turns of their prompt, and the logged tokens of ``retokenized`` could not be
    used.

    ``attempts`` lists what the update tried, in order: what each started from and was without, its
    verdict, the checks that failed, the tags that nobody can mean (``odd``), and why the ``next``
    one followed. ``set_aside`` lists what is
    set aside now: by which update, how many examples, why, and what brings them ``back``.
    ``changed`` lists the tags in which new judgements contradict what live has learned. ``gain``
    has the numbers that a gain was judged by (:class:`agentpref.prove.gain.Gain`): prompts that
    became better and worse, the ``chance`` of that if nothing was learned, what was ``needed``, and
    the number of the ``look``. ``behaviour`` has what live and the candidate wrote on the same
    prompts, in numbers, and what the examples ask for; ``Home.answers`` has some of the answers.

    ``config`` holds the settings, ``base`` identifies the base model, and ``notes`` say anything
    else, such as why an interrupted training started over.
    """

    update_id: str
    namespace: str
    model: str
    created_at: float
    verdict: Verdict
    parent: str | None
    revision: str | None = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    shortened: dict[str, int] = field(default_factory=dict)
    retokenized: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    retained: dict[str, dict[str, float]] = field(default_factory=dict)
    behaviour: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    changed: list[dict[str, Any]] = field(default_factory=list)
    gain: dict[str, float | None] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """The messages of the checks that failed."""
        return [f"{c['name']}: {c['message']}" for c in self.checks if not c["passed"]]

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain values: what ``--json`` prints and the database stores."""
        return asdict(self)
