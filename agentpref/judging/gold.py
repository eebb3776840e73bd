"""Gold: comparisons whose verdict people gave, in a home or in a file, to measure judges by."""

from __future__ import annotations

import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import IO, Literal, NamedTuple

from agentpref.errors import JudgeError
from agentpref.prefer.exchange import file_examples
from agentpref.prefer.judges.asking import said
from agentpref.prefer.judges.calibration import GoldVerdict
from agentpref.prefer.judges.hearing import Case
from agentpref.prefer.judges.verdicts import Opinion, Question
from agentpref.prefer.strata import sample
from agentpref.prefer.walk import walk_pairs
from agentpref.record.messages import canonical
from agentpref.record.pages import Selection
from agentpref.record.store import Store
from agentpref.types import Example, Message, Winner

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
    connection: sqlite3.Connection, namespace: str, *, limit: int, held_out: float
) -> list[Gold]:
    """What people said in a namespace: comparisons, corrections and opposed thumbs.

    At most ``limit`` of them, as equally of each stratum as possible.

    Raises:
        JudgeError: people said nothing that compares two answers.
    """
    found = walk_pairs(connection, Selection(namespace), held_out)
    pairs = [one for one in found if one.origin in BY_PEOPLE]
    if not pairs:
        raise JudgeError(
            f"people compared no answers in namespace {namespace!r}, so there is nothing to "
            "measure a judge by; log or import some comparisons, or give a file of them (--gold "
            "FILE)"
        )
    return [_gold(one) for one in sample(pairs, limit)]


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
    return Gold(example.tag, question, "a" if first else "b", example.prompt.id)


def logged_verdicts(
    connection: sqlite3.Connection, namespace: str, voter: str, gold: Iterable[Gold]
) -> Iterator[GoldVerdict]:
    """What a judge that an app asked itself said about the answers of gold."""
    by_answers: dict[tuple[str, frozenset[bytes]], list[Gold]] = defaultdict(list)
    for one in gold:
        by_answers[_key(one.prompt_id, one.question.a, one.question.b)].append(one)
    said_by_it = Store(connection).comparisons(namespace)
    rows = [row for row in said_by_it if row.source == "model" and row.user_id == voter]
    runs, _, _ = Store(connection).judged(namespace, sorted({row.run_a for row in rows}))
    known = {run.run_id: run for run in runs}
    found: dict[int, dict[bool, Winner]] = defaultdict(dict)
    golds: list[Gold] = []
    for row in rows:
        a, b = known.get(row.run_a), known.get(row.run_b)
        if a is None or b is None:
            continue
        for one in by_answers.get(_key(a.prompt.id, a.output, b.output), ()):
            swapped = canonical(a.output) != canonical(one.question.a)
            if one not in golds:
                golds.append(one)
            winner = row.swap().winner if swapped else row.winner
            found[golds.index(one)][swapped] = winner
    for number, both in found.items():
        yield golds[number].logged(both)


def _key(prompt_id: str, a: Message, b: Message) -> tuple[str, frozenset[bytes]]:
    return prompt_id, frozenset((canonical(a), canonical(b)))
