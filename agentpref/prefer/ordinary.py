"""Ordinary answers: a sample of what nobody judged, outside of what people judge.

A candidate learns from judged answers alone, so nothing keeps it from forgetting the others: after
five nights of yes/no statements, a request for a table was answered with "No". So answers that
nobody complained of take part in training and in the gate. They are examples without a label.

An answer in the judged domain is no anchor: it was given before people said what they want there,
and would hold the candidate to that. A liked answer is an example already. What people judge is
told from the words of the prompts: a model sees no tags, and a preference spreads to prompts that
are alike, whatever their tags. An ordinary prompt is outside if it is less like its nearest judged
prompt than judged prompts are like one another, by conformal p-values, of which the
Benjamini-Hochberg procedure picks those to trust (2104.08279).
"""

from __future__ import annotations

import re
import sqlite3
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from agentpref.config import UpdateConfig
from agentpref.prefer.examples import as_asked, is_held_out, unlabelled
from agentpref.prefer.strata import sample
from agentpref.record.messages import as_json
from agentpref.record.store import Store
from agentpref.types import REVISED_FROM, Example, Message, Run

_SLICES = 64
"""Into how many parts of equal length the log is cut, to read a few runs of each."""

_READ, _READ_FOR_EACH = 1024, 4
"""How many runs are read, at least in all and for each that is wanted: of rare tags there are few,
and some runs are in the judged domain, or repeat a prompt."""

_JUDGED = 256
"""How many judged prompts tell what people judge."""

_LENIENCE = 1.5
"""By how much less like its nearest judged prompt than those to one another an outside one is."""

_FALSE = 0.1
"""What share of the anchors may lie in the judged domain."""

_WHOLE = frozenset({"stop", "tool_calls", None})

_UNJUDGED = """NOT EXISTS (SELECT 1 FROM feedback WHERE feedback.run_id = some.run_id)
    AND NOT EXISTS (SELECT 1 FROM comparison WHERE some.run_id = run_a)
    AND NOT EXISTS (SELECT 1 FROM comparison WHERE some.run_id = run_b)
    AND (trace_id IS NULL OR NOT EXISTS (SELECT 1 FROM run AS other JOIN feedback USING (run_id)
        WHERE other.trace_id = some.trace_id))"""
"""SQL of ``some`` runs: nobody judged it, or another step of its task, whose fault it may be."""

_NAMESPACE = "namespace = :namespace"


def draw(
    connection: sqlite3.Connection,
    namespace: str,
    config: UpdateConfig,
    judged: Iterable[Example],
) -> list[Example]:
    """Draw ordinary answers outside of the judged domain, by tag and over time.

    It reads a bounded number of runs, however many there are, and the same home gives the same.

    Args:
        connection: the home's database.
        namespace: whose runs to draw from.
        config: how many to draw at most (``anchor.size``), and what share is held out.
        judged: examples that say what people judge.
    """
    size = config.anchor.size
    if not size:
        return []
    store = Store(connection)
    with store.one_state():
        run_ids = _candidates(connection, namespace, max(_READ, _READ_FOR_EACH * size))
        runs, _, _ = store.judged(namespace, run_ids)
    apart = config.held_out_tags
    found = [one for one in _examples(runs, config.held_out) if one.tag not in apart]
    prompts = {example.prompt.id: example.prompt.messages for example in sample_of(judged)}
    outside = outside_of([words(e.prompt.messages) for e in found], map(words, prompts.values()))
    return sample([e for e, is_out in zip(found, outside, strict=True) if is_out], size)


def find(
    connection: sqlite3.Connection,
    namespace: str,
    config: UpdateConfig,
    run_ids: Collection[str],
) -> list[Example]:
    """Make the ordinary answers of some runs, as far as these are there and nobody judged them."""
    store = Store(connection)
    with store.one_state():
        query = f"""SELECT run_id FROM run AS some
            WHERE run_id IN (SELECT value FROM json_each(?)) AND {_UNJUDGED}"""
        ids = [run_id for (run_id,) in connection.execute(query, (as_json([*run_ids]),))]
        runs, _, _ = store.judged(namespace, ids)
    return _examples(runs, config.held_out)


def sample_of(judged: Iterable[Example]) -> list[Example]:
    """The judged examples that tell what people judge."""
    return sample(sorted(judged, key=lambda example: example.example_id), _JUDGED)


def _candidates(connection: sqlite3.Connection, namespace: str, number: int) -> list[str]:
    """Ids of unjudged runs, from all places of the log and from all its times.

    Places alone would leave out a namespace that has few of a home's runs, and times alone most of
    what came at once. Each slice of either is a seek in an index, and reads a few rows.
    """
    place = "rowid >= :since AND rowid < :since + :few AND +namespace = :namespace"
    time = "namespace = :namespace AND created_at >= :since ORDER BY created_at LIMIT :few"
    found: dict[str, None] = {}
    values = {"namespace": namespace, "few": -(-number // (2 * _SLICES))}
    for column, where, these in (("rowid", place, "true"), ("created_at", time, _NAMESPACE)):
        ends = [
            connection.execute(f"SELECT {end}({column}) FROM run WHERE {these}", values).fetchone()
            for end in ("min", "max")
        ]
        (first,), (last,) = ends
        if first is None:
            return []
        query = f"""SELECT run_id FROM (SELECT run_id, trace_id FROM run WHERE {where}) AS some
            WHERE {_UNJUDGED}"""
        for part in range(_SLICES):
            since = first + (last + (column == "rowid") - first) * part / _SLICES
            own = values | {"since": int(since) if column == "rowid" else since}
            found |= {run_id: None for (run_id,) in connection.execute(query, own).fetchall()}
    return list(found)


def _examples(runs: Iterable[Run], held_out: float) -> list[Example]:
    """One example of each prompt, in the order of their ids; empty and broken answers make none."""
    found: dict[str, Example] = {}
    for run in sorted(map(as_asked, runs), key=lambda run: run.run_id):
        if not is_whole(run):
            continue
        is_out = is_held_out(run.prompt.messages, held_out)
        example = replace(unlabelled(run, "ordinary"), held_out=is_out)
        found.setdefault(run.prompt.id, example)
    return sorted(found.values(), key=lambda example: example.example_id)


def is_whole(run: Run) -> bool:
    """Whether an answer says something, and ended by itself as far as its log says.

    A revision was written under criticism, so it is not what live answers.
    """
    says = bool(_text(run.output).strip()) or bool(run.output.get("tool_calls"))
    says = says and REVISED_FROM not in run.metadata
    return says and run.metadata.get("finish_reason") in _WHOLE


def words(messages: Sequence[Message]) -> frozenset[str]:
    """The words of what was asked: system prompts are the same for everything."""
    asked = [m for m in messages if m["role"] not in ("system", "developer")] or messages
    return frozenset(word for m in asked for word in re.findall(r"\w+", _text(m).lower()))


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = (part.get("text") for part in content if isinstance(part, Mapping))
    return " ".join(part for part in parts if isinstance(part, str))


def outside_of(asked: Sequence[frozenset[str]], judged: Iterable[frozenset[str]]) -> list[bool]:
    """Say of sets of words whether they lie outside of what some judged ones have in common.

    The likeness of two sets is their Jaccard index. The p-value of a set is the share of judged
    ones that are no more like their nearest neighbour than it is like its own, times 1.5: where all
    judged prompts are written by one template, a word more would tell a prompt from them.

    >>> about = [frozenset({"would", "you", "say", str(number)}) for number in range(30)]
    >>> asked = [frozenset({"book", "a", "table"}), frozenset({"would", "you", "say", "no"})]
    >>> outside_of(asked, about)
    [True, False]
    """
    known = list(judged)
    if not known:
        return [True] * len(asked)
    among = sorted(
        max((_alike(one, other) for other in known if other is not one), default=0.0)
        for one in known
    )
    nearest = [max(_alike(one, other) for other in known) for one in asked]
    p_values = [
        (1 + bisect_right(among, _LENIENCE * value)) / (len(among) + 1) for value in nearest
    ]
    return _discovered(p_values, _FALSE)


def _alike(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / (len(one | other) or 1)


def _discovered(p_values: Sequence[float], rate: float) -> list[bool]:
    """Which p-values to reject with so small a rate of false discoveries (Benjamini-Hochberg)."""
    ordered = sorted(p_values)
    passing = [p for rank, p in enumerate(ordered, 1) if p <= rate * rank / len(ordered)]
    return [bool(passing) and p <= passing[-1] for p in p_values]
