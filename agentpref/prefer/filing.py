"""What a row of preference data adds to the record: runs, and the verdict on them.

Everything gets an id that comes from its content, so that the same row is the same rows of the
record, whichever file it stood in. The namespace is part of that content; the tag is not. Pure
functions; knows nothing of files, formats or stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from agentpref.prefer.rows import Row, UnpairedRow
from agentpref.record.messages import Node, RunRow, answer, chain, run_row
from agentpref.types import Comparison, Feedback, Message, Run, Source


@dataclass(frozen=True, slots=True)
class Filing:
    """What all rows of one import have in common. ``user`` is a hash already."""

    namespace: str
    tag: str | None
    source: Source
    user: str | None
    started_at: float
    file_name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What one row adds: a verdict, and the runs that it names."""

    runs: tuple[RunRow, ...]
    verdict: Comparison | Feedback

    @property
    def size(self) -> int:
        """How many bytes of messages there are."""
        return sum(len(node.body) for run in self.runs for node in run.nodes)


def entry_of(row: Row, filing: Filing, number: int) -> Entry:
    """Make the entry of a row; its time is the import's plus its place: later rows are newer."""
    at = filing.started_at + number * 1e-6
    asked, _ = chain(row.prompt.messages, row.prompt.tools)
    if isinstance(row, UnpairedRow):
        run = _run(row, row.completion, asked, filing, at)
        return Entry((run,), _thumb(row.desirable, run.run_id, filing, at))
    chosen = _run(row, row.chosen, asked, filing, at)
    rejected = _run(row, row.rejected, (), filing, at)  # the prompt stands before the other one
    ids = chosen.run_id, rejected.run_id
    return Entry((chosen, rejected), _comparison(*ids, filing, at))


def _comparison(chosen: str, rejected: str, filing: Filing, at: float) -> Comparison:
    return Comparison(
        comparison_id=_content_id("comparison", chosen, rejected, filing.source, filing.user),
        created_at=at,
        run_a=chosen,
        run_b=rejected,
        winner="a",
        source=filing.source,
        user_id=filing.user,
    )


def _thumb(desirable: bool, run_id: str, filing: Filing, at: float) -> Feedback:
    return Feedback(
        feedback_id=_content_id("thumb", run_id, desirable, filing.source, filing.user),
        run_id=run_id,
        created_at=at,
        key="thumbs",
        score=float(desirable),
        source=filing.source,
        user_id=filing.user,
    )


def _run(row: Row, output: Message, asked: Iterable[Node], filing: Filing, at: float) -> RunRow:
    tag = filing.tag or row.tag
    node = answer(row.prompt.id, output)
    run = Run(
        run_id=_content_id("run", filing.namespace, node.id),
        namespace=filing.namespace,
        created_at=at,
        prompt=row.prompt,
        output=output,
        tags=(tag,) if tag else (),
        metadata={"imported_from": filing.file_name},
    )
    return run_row(run, (*asked, node))


def _content_id(*parts: object) -> str:
    return "import-" + hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()
