"""Gold: comparisons whose verdict people gave, in a home or in a file, to measure judges by."""

from __future__ import annotations

import os
import sqlite3
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import IO, Literal, NamedTuple

from agentpref.errors import JudgeError
from agentpref.prefer.examples import as_asked
from agentpref.prefer.exchange import file_examples
from agentpref.prefer.judges.asking import said
from agentpref.prefer.judges.calibration import GoldVerdict
from agentpref.prefer.judges.hearing import Case
from agentpref.prefer.judges.verdicts import Opinion, Question
from agentpref.prefer.retractions import withdraw
from agentpref.prefer.strata import sample
from agentpref.prefer.walk import walk_pairs
from agentpref.reading import last_held_out
from agentpref.record.messages import canonical, prompt_of
from agentpref.record.pages import Selection
from agentpref.record.store import Store
from agentpref.types import Comparison, Example, Message, Run, Winner

BY_PEOPLE = ("correction", "comparison", "thumbs")


class Gold(NamedTuple):
    """A comparison that people decided. Which answer comes first is as good as random."""

    stratum: str
    question: Question
    better: Literal["a", "b"]
    prompt_id: str

    @property
    def case(self) -> Case:
        """The question, as a judge is asked."""
        return Case(self.question, self.prompt_id)

    def verdict(self, found: Opinion) -> GoldVerdict:
        """What a judge said of it."""
        swapped = found.swapped.swap().winner
        return self._said(found.as_given.winner, swapped, found.confidence)

    def _said(
        self, as_given: Winner, swapped: Winner, confidence: float | None = None
    ) -> GoldVerdict:
        lengths = len(said(self.question.a)), len(said(self.question.b))
        longer: Literal["a", "b"] | None = "a" if lengths[0] > lengths[1] else "b"
        longer = None if lengths[0] == lengths[1] else longer
        return GoldVerdict(self.stratum, self.better, as_given, swapped, longer, confidence)

    def logged(self, both: Mapping[bool, Winner]) -> GoldVerdict:
        """What a judge that an app asked said, by whether the answers were swapped.

        Where it was asked in one order only, that counts for both.
        """
        as_given, swapped = both.get(False, both.get(True)), both.get(True, both.get(False))
        assert as_given is not None
        assert swapped is not None
        return self._said(as_given, swapped)


def gold_of_home(
    connection: sqlite3.Connection,
    namespace: str,
    *,
    limit: int | None = None,
    tags: Container[str] | None = None,
) -> list[Gold]:
    """What people said in a namespace: comparisons, corrections and opposed thumbs.

    At most ``limit`` of them, as equally of each stratum as possible; only of some ``tags``.

    Raises:
        JudgeError: nothing that people said compares two answers.
    """
    found = walk_pairs(connection, Selection(namespace), last_held_out(connection, namespace))
    pairs = [e for e in found if e.origin in BY_PEOPLE and (tags is None or e.tag in tags)]
    if not pairs:
        raise JudgeError(
            f"no comparison by people stands in namespace {namespace!r}, so there is nothing to "
            "measure a judge by: none was made, or they contradict one another; log or import "
            "some, or give a file of them (--gold FILE)"
        )
    return [_gold(one) for one in (pairs if limit is None else sample(pairs, limit))]


def gold_of_file(
    file: str | os.PathLike[str] | IO[bytes], *, tag: str | None, limit: int
) -> list[Gold]:
    """The pairs of a file of preferences, in any format that an import reads.

    Args:
        file: the file.
        tag: the stratum of rows without one of their own.
        limit: use so many at most.
    """
    pairs = [one for one in file_examples(file).pairs if one.origin in BY_PEOPLE]
    if not pairs:
        raise JudgeError(f"{file} compares no two answers to one prompt; give a file of pairs")
    named = [
        replace(one, tag=tag) if tag is not None and one.tag == "untagged" else one for one in pairs
    ]
    return [_gold(one)._replace(prompt_id="") for one in sample(named, limit)]


def _gold(example: Example) -> Gold:
    better, worse = (completion.message for completion in example.completions[:2])
    first = int(example.example_id[:4], 16) % 2 == 0
    answers = (better, worse) if first else (worse, better)
    question = Question(example.prompt.messages, *answers)
    stored = prompt_of(example.prompt.messages, example.prompt.tools)
    return Gold(example.tag, question, "a" if first else "b", stored.id)


def logged_verdicts(
    connection: sqlite3.Connection, namespace: str, voter: str
) -> Iterator[GoldVerdict]:
    """What a judge that an app asked itself said about answers that people compared, too."""
    by_answers: dict[tuple[str, frozenset[bytes]], Gold] = {
        _key(one.prompt_id, one.question.a, one.question.b): one
        for one in gold_of_home(connection, namespace)
    }
    rows = [
        row
        for row in standing_comparisons(connection, namespace)
        if row.source == "model" and row.user_id == voter
    ]
    runs, _, _ = Store(connection).judged(namespace, sorted({row.run_a for row in rows}))
    known = {run.run_id: run for run in map(as_asked, runs)}
    found: dict[tuple[str, frozenset[bytes]], dict[bool, Winner]] = defaultdict(dict)
    for row in rows:
        a, b = known[row.run_a], known[row.run_b]
        key = _key(stored_prompt_id(a), a.output, b.output)
        if key in by_answers:
            swapped = canonical(a.output) != canonical(by_answers[key].question.a)
            found[key][swapped] = row.swap().winner if swapped else row.winner
    return (by_answers[key].logged(both) for key, both in found.items())


def standing_comparisons(connection: sqlite3.Connection, namespace: str) -> list[Comparison]:
    """The comparisons of a namespace that nobody took back, the oldest first."""
    store = Store(connection)
    with store.one_state():
        said = [*store.feedback(namespace)], [*store.comparisons(namespace)]
    return withdraw(*said).comparisons


def stored_prompt_id(run: Run) -> str:
    """The id that the home keeps a run's prompt under, by which a removal finds it.

    Where the arguments of its chat template make it another prompt to train on, that has another.
    """
    if not run.prompt.chat_template_kwargs:
        return run.prompt.id
    return prompt_of(run.prompt.messages, run.prompt.tools).id


def _key(prompt_id: str, a: Message, b: Message) -> tuple[str, frozenset[bytes]]:
    return prompt_id, frozenset((canonical(a), canonical(b)))
