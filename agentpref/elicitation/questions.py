"""The questions for a person: chosen from the pairs of answers that nobody has compared.

There is no list of open questions to go stale: they are chosen from the log when they are asked
for. What a person answered is in the log, and what was skipped in a file beside it, so a queue that
is ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from agentpref.elicitation.acquisition import (
    DEFAULT,
    WITHOUT_REWARD,
    Rule,
    candidates,
    choose,
    noise_of_agreement,
    rule_for,
)
from agentpref.elicitation.evidence import lacking
from agentpref.elicitation.skips import Skips
from agentpref.errors import RewardError
from agentpref.home import Home
from agentpref.judging.gold import standing_comparisons
from agentpref.judging.running import Pair, answers_key, undecided
from agentpref.prefer.examples import as_asked
from agentpref.prefer.judges.calibration import people_agreement
from agentpref.prefer.judges.verdicts import swapped
from agentpref.prefer.retractions import withdraw
from agentpref.reading import last_held_out
from agentpref.record.database import connect, translated
from agentpref.record.judges import Judges
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.reward.model import RewardModel
from agentpref.types import THUMBS, Comparison, Message, Run, Winner

if TYPE_CHECKING:
    from agentpref.learn.features import Features

POOL = 200
"""So many of the newest pairs are chosen from: each has to be read by the reward model."""

REPEATED = 0.1
"""The share of questions that somebody else has answered."""

_ANSWERS = 4
_FEWEST = 10  # repeated labels below which nobody knows how noisy they are


class Question(NamedTuple):
    """Two answers to a prompt; ``first`` is shown first, by chance.

    ``why`` says what chose it, ``repeated`` whether somebody else has answered it, and ``said``
    what these found.
    """

    id: str
    first: Run
    second: Run
    why: str
    repeated: bool = False
    said: tuple[Winner, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What was asked."""
        return self.first.prompt.messages


class _Done(NamedTuple):
    """What was done with a question: answers that it agrees with, and runs that were judged."""

    kind: Literal["answered", "corrected", "skipped"]
    agreed: Sequence[bool] = ()
    down: tuple[str, ...] = ()
    corrected: tuple[str, ...] = ()


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
    _gold: str | None = None
    _done: dict[str, _Done] = field(default_factory=dict)
    _read: dict[str, Features | None] = field(default_factory=dict)

    def next(self, count: int, besides: Collection[str] = ()) -> list[Question]:
        """The next questions, the most telling first; fewer where there are no more.

        ``besides`` are questions by id that are to be asked already.
        """
        compared = self._compared()
        done = self._asked(compared) | {*besides}
        source = random.Random(f"{self._seed} {self.person} {len(done)}")
        fresh = (p for p in undecided(self._connection, self.namespace, None, _ANSWERS)
                 if _id(p) not in done)  # fmt: skip
        others = self._said_by_others(compared)
        left = [said[0][0] for name, said in others.items() if name not in done]
        again = source.sample(left, min(int(REPEATED * count + source.random()), len(left)))
        chosen: list[tuple[Pair, str, bool]] = [
            (pair, self.rule, False) for pair in self._fresh(fresh, compared, count - len(again))
        ]
        for pair in again:
            chosen.insert(source.randint(0, len(chosen)), (pair, "repeated", True))
        return [
            _question(pair, why, repeated, others.get(_id(pair), ()), source)
            for pair, why, repeated in chosen
        ]

    def is_done(self, question: Question) -> bool:
        """Whether the person has answered or skipped it by now, here or elsewhere."""
        if question.id in self._skips.questions():
            return True
        own = self._voter or None
        runs = {question.first.run_id, question.second.run_id}
        _, feedback, comparisons = Store(self._connection).judged(self.namespace, sorted(runs))
        said = withdraw(feedback, comparisons).comparisons
        return any(
            {one.run_a, one.run_b} == runs and one.user_id == own and one.source == "human"
            for one in said
        )

    def answer(self, question: Question, winner: Winner, comment: str | None = None) -> str:
        """Log that the first (``a``) or the second answer is better, or neither; the id of it."""
        said = self._log.compare(
            question.first.run_id,
            question.second.run_id,
            winner=winner,
            user_id=self.person,
            comment=comment,
        )
        agreed = [verdict == winner for verdict in question.said]
        self._done[question.id] = _Done("answered", agreed)
        return said

    def both_bad(self, question: Question, comment: str | None = None) -> None:
        """Log a thumb down for both answers, and that neither is better.

        An answer that the person has given a thumb before keeps it.
        """
        self.answer(question, "tie", comment)
        runs = [run.run_id for run in (question.first, question.second)]
        down = tuple(run_id for run_id in runs if not self._has_thumb(run_id))
        for run_id in down:
            self._log.thumbs(run_id, up=False, user_id=self.person)
        self._done[question.id] = self._done[question.id]._replace(down=down)

    def skip(self, question: Question) -> None:
        """Do not ask this person that again."""
        self._skips.note(question.id, skipped=True)
        self._done[question.id] = _Done("skipped")

    def correct(
        self, question: Question, answer: Winner, text: str, comment: str | None = None
    ) -> None:
        """Log what the first (``a``) or the second answer should have been; the question is done.

        Raises:
            InvalidMessage: the text says nothing.
        """
        run = question.first if answer == "a" else question.second
        self._log.correct(run.run_id, text, comment=comment, user_id=self.person)
        self._skips.note(question.id, skipped=True)
        self._done[question.id] = _Done("corrected", corrected=(run.run_id,))

    def undo(self, question: Question) -> None:
        """Take back what was said of a question in this session; nothing if it was not asked."""
        done = self._done.pop(question.id, None)
        if done is None:
            return
        if done.kind != "answered":
            self._skips.note(question.id, skipped=False)
            for run_id in done.corrected:
                self._log.retract(run_id, "correction", user_id=self.person)
            return
        first, second = question.first.run_id, question.second.run_id
        self._log.retract(first, "comparison", against=second, user_id=self.person)
        for run_id in done.down:
            self._log.retract(run_id, user_id=self.person)

    @property
    def answered(self) -> int:
        """How many questions were answered in this session."""
        return sum(one.kind == "answered" for one in self._done.values())

    @property
    def corrected(self) -> int:
        """How many answers were corrected."""
        return sum(one.kind == "corrected" for one in self._done.values())

    @property
    def skipped(self) -> int:
        """How many were skipped in this session."""
        return sum(one.kind == "skipped" for one in self._done.values())

    @property
    def agreed(self) -> list[bool]:
        """Whether the person said what each other one said, of questions that were repeated."""
        return [same for one in self._done.values() for same in one.agreed]

    def _has_thumb(self, run_id: str) -> bool:
        own = self._voter or None
        said, _ = Store(self._connection).judgements(run_id)
        return any(row.key == THUMBS and row.user_id == own for row in said)

    @property
    def _skips(self) -> Skips:
        return Skips(self.home, self.namespace, self._voter)

    @property
    def _voter(self) -> str:
        return "" if self.person is None else Judges(self._connection).voter_of(self.person)

    def _asked(self, compared: Sequence[tuple[Comparison, Pair]]) -> set[str]:
        """The questions that the person has answered or skipped."""
        own = self._voter or None
        found = {_id(pair) for row, pair in compared if row.user_id == own}
        return found | self._skips.questions()

    def _said_by_others(
        self, compared: Sequence[tuple[Comparison, Pair]]
    ) -> dict[str, list[tuple[Pair, Winner]]]:
        """What others decided, by question; a tie decides nothing."""
        own, found = self._voter or None, dict[str, list[tuple[Pair, Winner]]]()
        of_gold = None if self._gold is None else Judges(self._connection).voter_of(self._gold)
        for row, pair in compared:
            if row.user_id == own or row.winner == "tie":
                continue
            if of_gold is not None and own != of_gold and row.user_id != of_gold:
                continue  # only what the owner said counts as right
            found.setdefault(_id(pair), []).append((pair, row.winner))
        return found

    def _compared(self) -> list[tuple[Comparison, Pair]]:
        """The comparisons by people that stand, with their runs."""
        said = standing_comparisons(self._connection, self.namespace)
        rows = [row for row in said if row.source == "human"]
        named = sorted({run_id for row in rows for run_id in (row.run_a, row.run_b)})
        runs, _, _ = Store(self._connection).judged(self.namespace, named)
        known = {run.run_id: run for run in map(as_asked, runs)}
        return [
            (row, Pair(known[row.run_a], known[row.run_b]))
            for row in rows
            if row.run_a in known and row.run_b in known
        ]

    def _fresh(
        self, fresh: Iterator[Pair], compared: Sequence[tuple[Comparison, Pair]], count: int
    ) -> list[Pair]:
        """The pairs that nobody compared to ask, by the rule."""
        if self.rule != "evidence":
            return self._choose([*islice(fresh, self._pool)], count)
        decided = [pair for row, pair in compared if row.winner != "tie"]
        share = last_held_out(self._connection, self.namespace)
        found = lacking(fresh, decided, held_out=share, most=self._pool)
        if len(found) < count:
            self._note("the gate lacks no more: each held-out prompt with answers to compare is "
                       "compared")  # fmt: skip
        return found[:count]

    def _note(self, text: str) -> None:
        self.notes += [text] if text not in self.notes else []

    def _choose(self, pool: Sequence[Pair], count: int) -> list[Pair]:
        """The pairs of a pool to ask."""
        if self._reward is None or self.rule == "random" or not pool:
            source = random.Random(f"{self._seed} {self.person}")
            return source.sample(pool, min(count, len(pool)))
        import numpy as np

        unread = [pair for pair in pool if _id(pair) not in self._read]
        asked = [(pair.a.prompt, (pair.a.output, pair.b.output)) for pair in unread]
        self._read |= zip(map(_id, unread), self._reward.features(asked), strict=True)
        known = [(pair, self._read[_id(pair)]) for pair in pool]
        readable = [(pair, one) for pair, one in known if one is not None]
        if len(readable) < len(pool):
            left = len(pool) - len(readable)
            self._note(f"{left} of {len(pool)} pairs cannot be read by the reward model")
        if not readable:
            return []
        at = np.stack([one.prompt for _, one in readable])
        said = np.stack([one.answers[0] - one.answers[1] for _, one in readable])
        some = candidates(self._reward.heads, at, said)
        return [readable[n][0] for n in choose(some, count, self.rule, seed=self._seed)]


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
    gold: str | None = None,
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
        gold: whose answers are right: the questions that are put to others again are those that
            this person has answered, and how far they agree is how far they are right.
    """
    place = Home.open(home)
    with (
        translated(place),
        closing(connect(place)) as connection,
        Log(place.path, namespace=namespace) as log,
    ):
        Store(connection).require_namespace(namespace)
        said = [row for row in standing_comparisons(connection, namespace) if row.winner != "tie"]
        noise, notes = _noise(said), list[str]()
        voter = None if gold is None else Judges(connection).voter_of(gold)
        if voter is not None and all(row.user_id != voter for row in said):
            notes.append(f"{gold!r} has compared nothing here yet, so no question is gold")
        chosen = rule or rule_for(noise, DEFAULT)
        if reward is None and chosen not in WITHOUT_REWARD:
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
            place, namespace, person, chosen, noise, notes, log, connection, reward, pool, seed,
            gold,
        )  # fmt: skip


def newest_reward(
    home: Home | str | Path | None, namespace: str, *, model: str | None = None
) -> RewardModel | None:
    """A namespace's reward model; ``None`` if it has none. ``model`` is where its base is."""
    from agentpref.reward.model import open_reward

    try:
        return open_reward(home, namespace=namespace, model=model)
    except RewardError:
        return None


def _noise(said: Sequence[Comparison]) -> float | None:
    """The share of wrong labels, by how far people agree; ``None`` where too few do twice.

    A tie is no wrong label.
    """
    votes = [
        (" ".join(sorted((row.run_a, row.run_b))), row.user_id or "",
         row.winner if row.run_a <= row.run_b else row.swap().winner)
        for row in said
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


def _question(
    pair: Pair,
    why: str,
    repeated: bool,
    others: Sequence[tuple[Pair, Winner]],
    source: random.Random,
) -> Question:
    runs = [pair.a, pair.b]
    source.shuffle(runs)
    said = tuple(
        verdict if other.a.output == runs[0].output else swapped(verdict)
        for other, verdict in others
    )
    return Question(_id(pair), runs[0], runs[1], why, repeated, said)
