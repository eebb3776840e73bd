"""Whole conversations and tasks as decisions: what an agent saw, said and earned, step by step.

Runs that share a trace, or else a thread, are the steps of one conversation: the state is all
messages before an answer, the action is the answer, and users' turns and tools' results are state,
never anything to train. Where somebody asked again from an earlier point, the conversation forks,
and each end is a trace of its own, which shares its first steps with the others.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from agentpref.errors import ConfigError, EvaluationError
from agentpref.home import Home
from agentpref.prefer.examples import as_asked
from agentpref.prefer.retractions import withdraw
from agentpref.record.database import connect, translated
from agentpref.record.messages import canonical
from agentpref.record.pages import Since, selection
from agentpref.record.store import Store
from agentpref.types import BASE, THUMBS, Feedback, Message, Run

_APART = 10
"""By how many times scores of two sources may differ, to be of one scale."""

FAILED = "error"
"""How the result of a tool begins that failed, in any case, or the key that it has as JSON."""


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """What a step earns: scores by key, less what each step and each failed tool costs.

    ``keys`` maps keys of feedback to their weights; of several scores under one key on one answer,
    the mean counts. ``cost`` is taken from each step, and ``tool_error`` from a step whose tool
    failed. ``gamma`` discounts later steps.

    Raises:
        ConfigError: a number is out of range.
    """

    keys: Mapping[str, float] = field(default_factory=lambda: {THUMBS: 1.0})
    cost: float = 0.0
    tool_error: float = 0.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        numbers = {"cost": self.cost, "tool_error": self.tool_error, **self.keys}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ConfigError(f"{name} is {value}, but must be a number")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma is {self.gamma}, but must be above 0 and at most 1")
        if not any(self.keys.values()):
            raise ConfigError(
                f"keys is {dict(self.keys)}; name a key of feedback whose scores are rewards, with "
                "a weight other than 0"
            )


class Step(NamedTuple):
    """One decision: the run that made it, what it earned, and whether it is the last.

    ``logp`` is the log-probability that what served gave to the answer, in nats; ``None`` if it was
    not logged. ``scored`` says whether anybody gave it a score.
    """

    run: Run
    reward: float
    done: bool
    logp: float | None
    scored: bool

    @property
    def state(self) -> tuple[Message, ...]:
        """What the agent was given."""
        return self.run.prompt.messages

    @property
    def action(self) -> Message:
        """What it answered."""
        return self.run.output


class Trace(NamedTuple):
    """The steps of one conversation, the first one first; ``id`` is the trace's or thread's."""

    id: str
    steps: tuple[Step, ...]

    def value(self, gamma: float = 1.0) -> float:
        """Its return, Σ_t γ^t·r_t."""
        return math.fsum(gamma**t * step.reward for t, step in enumerate(self.steps))


@dataclass(frozen=True, slots=True)
class Traces:
    """The conversations of a namespace, and what was odd: forks, and steps that do not follow."""

    namespace: str
    spec: RewardSpec
    traces: tuple[Trace, ...]
    odd: Mapping[str, int]

    def stats(self) -> dict[str, Any]:
        """Returns and coverage as plain values."""
        values = [trace.value(self.spec.gamma) for trace in self.traces]
        steps = [step for trace in self.traces for step in trace.steps]
        scored = [any(step.scored for step in trace.steps) for trace in self.traces]
        return {
            "traces": len(self.traces),
            "steps": len(steps),
            "longest": max((len(trace.steps) for trace in self.traces), default=0),
            "with_reward": sum(scored),
            "with_logprobs": sum(step.logp is not None for step in steps),
            "returns": _summary(values),
            "revisions": dict(Counter(step.run.revision or BASE for step in steps).most_common()),
            "odd": dict(self.odd),
        }


def read_traces(
    home: Home | str | Path | None = None,
    spec: RewardSpec | None = None,
    *,
    namespace: str = "default",
    since: Since = None,
    limit: int | None = None,
) -> Traces:
    """Read the conversations of a namespace, those that ended last first.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        spec: what steps earn; by default people's thumbs.
        namespace: whose conversations.
        since: only those that went on from this time on.
        limit: so many at most; ``None``: all.

    Raises:
        ConfigError: an argument has no meaning.
        EvaluationError: a key has scores on two scales.
        NotAHome: there is no home in the folder.
        UnknownNamespace: other namespaces are in the home, and this one is not.
    """
    which, place, spec = selection(namespace, since, limit), Home.open(home), spec or RewardSpec()
    with translated(place), closing(connect(place, readonly=True)) as connection:
        store = Store(connection)
        store.require_namespace(namespace)
        ids = _ids(connection, namespace, which.since, limit)
        with store.one_state():
            rows, feedback, comparisons = store.judged(namespace, [*ids])
    wanted = [as_asked(run) for run in rows if run.run_id in ids]
    scores = rewards_of(withdraw(feedback, comparisons).feedback, spec)
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(wanted, key=lambda run: (run.created_at, run.run_id)):
        by_name[ids[run.run_id]].append(run)
    odd = Counter[str]()
    ends: dict[bytes, str] = {}
    begins: dict[str, set[bytes]] = {}
    found = [
        Trace(name, _steps(path, scores, spec))
        for name, runs in by_name.items()
        for path in _paths(name, runs, odd, ends, begins)
    ]
    odd["split"] = sum(
        any(ends.get(digest, name) != name for digest in own) for name, own in begins.items()
    )
    found.sort(key=lambda trace: trace.steps[-1].run.created_at, reverse=True)
    return Traces(namespace, spec, tuple(found), odd)


def _ids(
    connection: sqlite3.Connection, namespace: str, since: float | None, limit: int | None
) -> dict[str, str]:
    """The runs of the newest conversations, and the name of each one's conversation."""
    name = "coalesce(trace_id, thread_id, run_id)"
    query = f"""SELECT run_id, {name} FROM run WHERE namespace = ?1 AND {name} IN (
        SELECT {name} FROM run WHERE namespace = ?1 GROUP BY 1 HAVING max(created_at) >= ?2
        ORDER BY max(created_at) DESC LIMIT ?3)"""
    return dict(
        connection.execute(query, (namespace, since or 0.0, -1 if limit is None else limit))
    )


def rewards_of(feedback: Sequence[Feedback], spec: RewardSpec) -> dict[str, float]:
    """What people's and programs' scores give each run, by the weights of their keys.

    Raises:
        EvaluationError: a key has scores on two scales.
    """
    by_run: dict[tuple[str, str], list[float]] = defaultdict(list)
    scales: dict[str, set[Any]] = defaultdict(set)
    largest: dict[tuple[str, str], float] = defaultdict(float)
    for row in feedback:
        if row.key in spec.keys and row.score is not None:
            by_run[row.run_id, row.key].append(reward_of(row))
            if row.key != THUMBS:
                scales[row.key].add(row.scale)
                source = (row.key, row.source)
                largest[source] = max(largest[source], abs(row.score))
    for key, own in scales.items():
        if len(own - {None}) > 1:
            raise EvaluationError(
                f"{key!r} has scores on {len(own - {None})} scales, so their sum has no meaning; "
                "name another key"
            )
        reached = {source: size for (of, source), size in largest.items() if of == key and size}
        if own == {None} and max(reached.values(), default=1) >= _APART * min(
            reached.values(), default=1
        ):
            told = ", ".join(f"{size:g} by {source}" for source, size in sorted(reached.items()))
            raise EvaluationError(
                f"scores under {key!r} reach {told}, which cannot be one scale; give each scale a "
                "key of its own"
            )
    found: dict[str, float] = defaultdict(float)
    for (run_id, key), values in by_run.items():
        found[run_id] += spec.keys[key] * statistics.fmean(values)
    return dict(found)


def reward_of(row: Feedback) -> float:
    """What a score is worth: a like 1 and a dislike 0, however it was written; else the score."""
    score = row.score or 0.0
    return float(score > 0) if row.key == THUMBS else score


def _paths(
    name: str,
    runs: Sequence[Run],
    odd: Counter[str],
    everywhere: dict[bytes, str],
    begins: dict[str, set[bytes]],
) -> Iterator[list[Run]]:
    """Each line of a conversation from its beginning to an end.

    A run follows the latest earlier one whose messages and answer its own messages begin with.
    ``everywhere`` notes where an answer ends, and ``begins`` what a conversation begins with.
    """
    parents: list[int | None] = []
    ends: dict[bytes, int] = {}  # the latest run whose messages and answer have this digest
    for number, run in enumerate(runs):
        digest, parent, before = b"", None, set[bytes]()
        for message in run.prompt.messages:
            digest = _after(digest, message)
            before.add(digest)
            found = ends.get(digest)
            if found is not None and (parent is None or found > parent):
                parent = found
        parents.append(parent)
        if parent is None:
            begins.setdefault(name, set()).update(before)
        ends[_after(digest, run.output)] = number
        everywhere[_after(digest, run.output)] = name
    children = Counter(parent for parent in parents if parent is not None)
    odd["forks"] += sum(count - 1 for count in children.values())
    odd["unconnected"] += sum(parent is None for parent in parents) - 1
    for number in range(len(runs)):
        if number in children:
            continue
        path, at = [runs[number]], parents[number]
        while at is not None:
            path.append(runs[at])
            at = parents[at]
        yield path[::-1]


def _after(digest: bytes, message: Message) -> bytes:
    """The digest of some messages and one more."""
    return hashlib.blake2b(digest + canonical(message), digest_size=16).digest()


def _steps(path: Sequence[Run], scores: Mapping[str, float], spec: RewardSpec) -> tuple[Step, ...]:
    found = []
    for number, run in enumerate(path):
        following = path[number + 1].prompt.messages if number + 1 < len(path) else ()
        results = following[len(run.prompt.messages) + 1 :]
        failed = sum(_has_failed(message) for message in results)
        reward = scores.get(run.run_id, 0.0) - spec.cost - spec.tool_error * failed
        logps = run.logprobs
        logp = None if logps is None or not all(map(math.isfinite, logps)) else math.fsum(logps)
        done = number == len(path) - 1
        found.append(Step(run, reward, done, logp, run.run_id in scores))
    return tuple(found)


def _has_failed(message: Message) -> bool:
    """Whether a message is the result of a tool that failed."""
    if message.get("role") != "tool":
        return False
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    if message.get("status") == FAILED or text.strip().lower().startswith(FAILED):
        return True
    try:
        value = orjson.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and bool(value.get(FAILED))


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(values),
        "lowest": ordered[0],
        "median": statistics.median(ordered),
        "highest": ordered[-1],
    }
