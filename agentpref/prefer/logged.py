"""What other products logged: model calls, and what was said of them.

A :class:`LogFormat` reads the rows of a product's export into these records, beside the
:class:`~agentpref.prefer.formats.Format` of preference data and in the same entry-point group. The
ids are the product's own; ``intake.py`` derives ours from them, so that a run is added once, and a
score that comes in another file finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from agentpref.prefer.formats import Fields
from agentpref.types import Message, Source, Tool


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """One answer of a model. Of several answers to one call, each is a run with an id of its own.

    ``unread`` names what the row has of it that is not kept, such as ``attributes.http.method``.
    """

    id: str
    created_at: float
    messages: Sequence[Message]
    output: Message
    tools: Sequence[Tool] = ()
    model: str | None = None
    thread_id: str | None = None
    trace_id: str | None = None
    user_id: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoggedScore:
    """One judgement of a run, named by ``run_id``, or of a trace: its last answer.

    With both, the trace is meant if the run is none that was imported or logged. ``source`` is
    ``None`` where the product does not say who judged.
    """

    id: str
    created_at: float
    run_id: str | None
    trace_id: str | None
    key: str
    score: float | None = None
    value: Any = None
    comment: str | None = None
    source: Source | None = None
    user_id: str | None = None
    correction: Message | None = None
    scale: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class LoggedComparison:
    """One of two runs, named by their ids, was preferred to the other, unless it is a tie."""

    id: str
    created_at: float
    better: str
    worse: str
    source: Source | None = None
    user_id: str | None = None
    comment: str | None = None
    is_tie: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is neither a run nor a judgement of one, and what it is instead: ``"span"``."""

    reason: str


Logged: TypeAlias = "LoggedRun | LoggedScore | LoggedComparison | LeftOut"


@dataclass(frozen=True, slots=True)
class LogFormat:
    """One format of rows that hold runs and scores.

    Attributes:
        shapes: the shapes of a row, each as the keys that it must have, as in ``Format``.
        read: turns a row into what it holds. It raises ``ExchangeError`` or ``InvalidMessage``,
            with the cure, if a value is wrong.
        optional: further keys that ``read`` looks at; other keys are named as not read.
        parts: yields the rows that are inside a row, such as the spans of a trace, each with its
            name for messages. ``read`` then gets these, one by one.
    """

    shapes: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], Iterable[Logged]]
    optional: tuple[str, ...] = ()
    parts: Callable[[Fields], Iterable[tuple[str, Fields]]] | None = None

    columns: ClassVar[Mapping[str, Any]] = {}
    """It is only read."""

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the format reads."""
        return frozenset([*self.optional, *(key for shape in self.shapes for key in shape)])
