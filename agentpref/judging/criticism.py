"""Finds what is criticised and not revised yet: by people's comments, or by a judge's principles.

Of each voter, the newest comment on an answer counts, unless it was taken back or praises. A
correction is no criticism: it says itself how the answer should have been.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from agentpref.errors import JudgeError
from agentpref.judging.opened import OpenedJudge
from agentpref.judging.running import is_whole
from agentpref.prefer.comments import standing
from agentpref.prefer.examples import as_asked
from agentpref.prefer.judges.asking import is_empty
from agentpref.prefer.judges.rubric import Principle
from agentpref.prefer.retractions import withdraw
from agentpref.record.store import Store
from agentpref.types import COMMENT_ID, REVISED_FROM, Feedback, Run

_RUNS_AT_ONCE = 500

IS_REVISION = f"""CASE WHEN metadata LIKE '%"{REVISED_FROM}"%' AND json_valid(metadata)
    THEN json_extract(metadata, '$.{REVISED_FROM}') END"""
"""SQL: the run that a run is a revision of; null of others."""


class Criticism(NamedTuple):
    """An answer, and a person's comment on it, or a principle to criticise it by."""

    run: Run
    by: Feedback | Principle


def principles_of(judge: OpenedJudge) -> list[Principle]:
    """The principles of a judge, or of all members of a panel."""
    found = [p for one in (judge, *judge.members) for p in one.rubric.principles]
    if not found:
        raise JudgeError(
            f"judge {judge.name!r} has no principles to criticise answers by; write some under "
            "`principles` in its rubric, or revise by comments"
        )
    return found


@dataclass
class Commented:
    """Comments that no revision answers, the newest first, and how many others there are.

    ``praise`` is by people who like the answer, ``unfit`` are comments on answers that broke off or
    call tools, and ``untrusted`` counts, by stratum, those where the judge is not trusted.
    """

    criticisms: list[Criticism] = field(default_factory=list)
    praise: int = 0
    unfit: int = 0
    untrusted: Counter[str] = field(default_factory=Counter)


def commented(connection: sqlite3.Connection, namespace: str, judge: OpenedJudge) -> Commented:
    """Find the comments by people on the answers of a namespace."""
    query = """SELECT DISTINCT run_id FROM feedback CROSS JOIN run USING (run_id)
        WHERE source = 'human' AND trim(coalesce(comment, '')) <> '' AND namespace = ?"""
    run_ids = [run_id for (run_id,) in connection.execute(query, (namespace,))]
    revised = _revised(connection, namespace, COMMENT_ID)
    store, found = Store(connection), Commented()
    scales = {(one.key, one.source): one[2:] for one in store.standards(namespace).scales}
    for start in range(0, len(run_ids), _RUNS_AT_ONCE):
        rows, feedback, comparisons = store.judged(
            namespace, run_ids[start : start + _RUNS_AT_ONCE]
        )
        runs = {run.run_id: run for run in map(as_asked, rows)}
        for row, is_liked in standing(withdraw(feedback, comparisons).feedback, scales):
            run = runs.get(row.run_id)
            if run is None or row.feedback_id in revised:
                continue
            if is_liked:
                found.praise += 1
            elif not _is_fit(run):
                found.unfit += 1
            elif not judge.trusts(run.tag):
                found.untrusted[run.tag] += 1
            else:
                found.criticisms.append(Criticism(run, row))
    found.criticisms.sort(key=_said_at, reverse=True)
    return found


def _said_at(one: Criticism) -> tuple[float, str]:
    return (one.by.created_at, one.by.feedback_id) if isinstance(one.by, Feedback) else (0.0, "")


def criticisable(
    connection: sqlite3.Connection,
    judge: OpenedJudge,
    namespace: str,
    principles: Sequence[Principle],
    known: Sequence[Criticism],
) -> Iterator[Criticism]:
    """Answers that were not revised: the newest one to each prompt, the newest first."""
    revised = _revised(connection, namespace, REVISED_FROM)
    taken = {one.run.run_id for one in known}
    query = f"""SELECT run_id FROM (SELECT run_id, max(created_at) AS at FROM run
        WHERE namespace = ? AND {IS_REVISION} IS NULL GROUP BY prompt) ORDER BY at DESC"""
    store = Store(connection)
    for (run_id,) in connection.execute(query, (namespace,)).fetchall():
        if run_id in revised or run_id in taken:
            continue
        run = as_asked(store.run(run_id))
        if _is_fit(run) and judge.trusts(run.tag):
            drawn = random.Random(f"{judge.rubric.digest} {run_id}")
            weights = [one.weight for one in principles]
            yield Criticism(run, drawn.choices(principles, weights)[0])


def _is_fit(run: Run) -> bool:
    """Whether an answer is whole, and is a text: a call of a tool is answered by the tool."""
    return is_whole(run) and not run.output.get("tool_calls") and not is_empty(run.output)


def _revised(connection: sqlite3.Connection, namespace: str, key: str) -> set[str]:
    """What revisions name under a key of their metadata: an answer, or a comment."""
    query = f"""SELECT json_extract(metadata, ?) FROM run
        WHERE namespace = ? AND {IS_REVISION} IS NOT NULL"""
    return {found for (found,) in connection.execute(query, (f"$.{key}", namespace))}
