"""The questions for a person: chosen from the pairs of answers that nobody has compared.

There is no list of open questions to go stale: they are chosen from the log when they are asked
for. What a person answered is in the log, and what was skipped in a file beside it, so a queue that
is ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from agentpref.elicitation.acquisition import (
    DEFAULT,
    Rule,
    candidates,
    choose,
    noise_of_agreement,
    rule_for,
)
from agentpref.errors import RewardError
from agentpref.home import Home, open_private, reading, writing
from agentpref.judging.gold import standing_comparisons
from agentpref.judging.running import Pair, answers_key, undecided
from agentpref.prefer.examples import as_asked
from agentpref.prefer.judges.calibration import people_agreement
from agentpref.record.database import connect, translated
from agentpref.record.judges import Judges
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.reward.model import RewardModel
from agentpref.types import Comparison, Message, Run, Winner

if TYPE_CHECKING:
    from numpy.typing import NDArray

POOL = 200
"""So many of the newest pairs are chosen from: each has to be read by the reward model."""

REPEATED = 0.1
"""The share of questions that somebody else has answered."""

_ANSWERS = 4
_FEWEST = 10  # repeated labels below which nobody knows how noisy they are


class Question(NamedTuple):
    """Two answers to a prompt; ``first`` is shown first, by chance.

    ``why`` says what chose it, and ``repeated`` whether somebody else has answered it.
    """

    id: str
    first: Run
    second: Run
    why: str
    repeated: bool = False

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What was asked."""
        return self.first.prompt.messages


@dataclass
class Queue:
    """A person's questions; see :func:`open_queue`.

    ``rule`` is what chooses, ``noise`` the share of wrong labels as far as people's agreement tells
    it, and ``notes`` say why it is not what was wanted.
    """

    home: Home
    namespace: str
    person: str | None
    rule: Rule
    noise: float | None
    notes: list[str]
    _log: Log
    _connection: sqlite3.Connection
    _reward: RewardModel | None
    _pool: int
    _seed: int
    answered: int = 0
    skipped: int = 0
    agreed: list[bool] = field(default_factory=list)
    _bad: set[str] = field(default_factory=set)

    def next(self, count: int) -> list[Question]:
        """The next questions, the most telling first; fewer where there are no more."""
        done = self._asked()
        source = random.Random(f"{self._seed} {self.person} {len(done)}")
        fresh = (p for p in undecided(self._connection, self.namespace, None, _ANSWERS)
                 if _id(p) not in done)  # fmt: skip
        pool = [*islice(fresh, self._pool)]
        repeated = [pair for pair in self._decided_by_others() if _id(pair) not in done]
        again = source.sample(repeated, min(round(REPEATED * count), len(repeated)))
        chosen: list[tuple[Pair, str, bool]] = [
            (pair, self.rule, False) for pair in self._choose(pool, count - len(again))
        ]
        for pair in again:
            chosen.insert(source.randint(0, len(chosen)), (pair, "repeated", True))
        return [_question(pair, why, repeated, source) for pair, why, repeated in chosen]

    def answer(self, question: Question, winner: Winner, comment: str | None = None) -> str:
        """Log that the first (``a``) or the second answer is better, or neither; the id of it."""
        said = self._log.compare(
            question.first.run_id,
            question.second.run_id,
            winner=winner,
            user_id=self.person,
            comment=comment,
        )
        self.answered += 1
        if question.repeated:
            self.agreed += self._agreement(question, winner)
        return said

    def both_bad(self, question: Question, comment: str | None = None) -> None:
        """Log a thumb down for both answers, and that neither is better."""
        for run in (question.first, question.second):
            self._log.thumbs(run.run_id, up=False, user_id=self.person)
        self._bad.add(question.id)
        self.answer(question, "tie", comment)

    def skip(self, question: Question) -> None:
        """Never ask this person that again."""
        line = {"namespace": self.namespace, "person": self._voter, "question": question.id}
        path = self.home.skipped
        with writing(path), open(path, "ab", opener=open_private) as file:
            file.write(orjson.dumps(line) + b"\n")
        self.skipped += 1

    def undo(self, question: Question) -> None:
        """Take back what the person said of a question."""
        first, second = question.first.run_id, question.second.run_id
        self._log.retract(first, "comparison", against=second, user_id=self.person)
        if question.id in self._bad:
            self._bad.remove(question.id)
            for run_id in (first, second):
                self._log.retract(run_id, user_id=self.person)
        self.answered -= 1

    @property
    def _voter(self) -> str:
        return "" if self.person is None else Judges(self._connection).voter_of(self.person)

    def _asked(self) -> set[str]:
        """The questions that the person has answered or skipped."""
        voter = self._voter or None
        found = {
            _id(pair)
            for row, pair in self._compared()
            if row.source == "human" and row.user_id == voter
        }
        return found | {line["question"] for line in self._skips() if line["person"] == self._voter}

    def _skips(self) -> Iterator[Mapping[str, str]]:
        if not self.home.skipped.exists():
            return
        with reading(self.home.skipped) as file:
            for line in file.read().splitlines():
                try:
                    found = orjson.loads(line)
                except ValueError:  # a line that was cut off by a crash
                    continue
                if found.get("namespace") == self.namespace:
                    yield found

    def _decided_by_others(self) -> list[Pair]:
        own = self._voter or None
        return [
            pair
            for row, pair in self._compared()
            if row.source == "human" and row.user_id != own and row.winner != "tie"
        ]

    def _compared(self) -> list[tuple[Comparison, Pair]]:
        """The comparisons that stand, with their runs."""
        rows = standing_comparisons(self._connection, self.namespace)
        named = sorted({run_id for row in rows for run_id in (row.run_a, row.run_b)})
        runs, _, _ = Store(self._connection).judged(self.namespace, named)
        known = {run.run_id: run for run in map(as_asked, runs)}
        return [
            (row, Pair(known[row.run_a], known[row.run_b]))
            for row in rows
            if row.run_a in known and row.run_b in known
        ]

    def _agreement(self, question: Question, winner: Winner) -> list[bool]:
        """Whether each other person said the same of a question."""
        own, found = self._voter or None, []
        for row, pair in self._compared():
            if row.source == "human" and row.user_id != own and _id(pair) == question.id:
                same = pair.a.output == question.first.output
                found.append((row.winner if same else row.swap().winner) == winner)
        return found

    def _choose(self, pool: Sequence[Pair], count: int) -> list[Pair]:
        """The pairs to ask, by the rule."""
        if self._reward is None or self.rule == "random" or not pool:
            source = random.Random(f"{self._seed} {self.person}")
            return source.sample(pool, min(count, len(pool)))
        at, said = self._features(pool)
        chosen = choose(candidates(self._reward.heads, at, said), count, self.rule, seed=self._seed)
        return [pool[number] for number in chosen]

    def _features(self, pool: Sequence[Pair]) -> tuple[NDArray[Any], NDArray[Any]]:
        import numpy as np

        assert self._reward is not None
        read = [
            self._reward.features(
                pair.a.prompt.messages, [pair.a.output, pair.b.output], tools=pair.a.prompt.tools
            )
            for pair in pool
        ]
        return (
            np.stack([one.prompt for one in read]),
            np.stack([one.answers[0] - one.answers[1] for one in read]),
        )


@contextmanager
def open_queue(
    home: Home | str | Path | None = None,
    *,
    namespace: str = "default",
    person: str | None = None,
    rule: Rule | None = None,
    reward: RewardModel | None = None,
    pool: int = POOL,
    seed: int = 0,
) -> Iterator[Queue]:
    """Open the questions of a namespace for a person, for a block.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        namespace: whose answers.
        person: who is asked, as ``user_id`` of what is logged; ``None`` is nobody named.
        rule: what chooses; by default ``entropy``, and ``random`` where people's labels are noisy.
        reward: what says which question tells most; without one they are drawn at random.
        pool: of so many pairs, the newest.
        seed: of what is drawn at random.
    """
    place = Home.open(home)
    with (
        translated(place),
        closing(connect(place)) as connection,
        Log(place.path, namespace=namespace) as log,
    ):
        Store(connection).require_namespace(namespace)
        noise, notes = _noise(connection, namespace), list[str]()
        chosen = rule or rule_for(noise, DEFAULT)
        if reward is None and chosen != "random":
            notes.append(
                "there is no reward model, so questions are drawn at random; `agentpref reward fit`"
                " fits one from about a hundred comparisons on"
            )
            chosen = "random"
        elif rule is None and chosen != DEFAULT:
            notes.append(
                f"people disagree so often that about {noise:.2f} of their labels are wrong: "
                "questions are drawn at random, which is better then"
            )
        yield Queue(
            place, namespace, person, chosen, noise, notes, log, connection, reward, pool, seed
        )


def newest_reward(home: Home | str | Path | None, namespace: str) -> RewardModel | None:
    """A namespace's reward model; ``None`` if it has none."""
    from agentpref.reward.model import open_reward

    try:
        return open_reward(home, namespace=namespace)
    except RewardError:
        return None


def _noise(connection: sqlite3.Connection, namespace: str) -> float | None:
    """The share of wrong labels, by how far people agree; ``None`` where too few do twice."""
    votes = [
        (" ".join(sorted((row.run_a, row.run_b))), row.user_id or "",
         row.winner if row.run_a <= row.run_b else row.swap().winner)
        for row in standing_comparisons(connection, namespace)
        if row.source == "human"
    ]  # fmt: skip
    found = people_agreement(votes, alpha=False)
    if found["pairs"] + found["repeats"] < _FEWEST:
        return None
    agreed = found["pairs"] * (found["agreement"] or 0) + found["repeats"] * (
        found["self_agreement"] or 0
    )
    return noise_of_agreement(agreed / (found["pairs"] + found["repeats"]))


def _id(pair: Pair) -> str:
    """The id of a question, whichever runs have its answers."""
    prompt, answers = answers_key(pair.a, pair.b)
    content = b"\n".join((prompt.encode(), *sorted(answers)))
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _question(pair: Pair, why: str, repeated: bool, source: random.Random) -> Question:
    runs = [pair.a, pair.b]
    source.shuffle(runs)
    return Question(_id(pair), runs[0], runs[1], why, repeated)
