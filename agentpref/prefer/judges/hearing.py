"""Asks a judge many questions: each in both orders, none twice, within a budget, several at a time.

The caller's thread hands out questions, keeps verdicts and counts; worker threads only ask. So what
is kept is kept by one thread, as SQLite wants it, and Ctrl-C ends the caller at once: a call that a
worker waits for is given up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from agentpref.errors import JudgeError, NoVerdict
from agentpref.prefer.judges.asking import is_empty
from agentpref.prefer.judges.verdicts import Judge, Opinion, Question, Verdict, opinion
from agentpref.types import WINNERS, Progress

FAILURES_IN_A_ROW = 20
"""After so many failed calls without one that works, the judge is given up."""

_AT_ONCE = 500


class Case(NamedTuple):
    """A question, and the id of the last message of its prompt, by which a removal finds it."""

    question: Question
    prompt_id: str = ""


class Memory(Protocol):
    """What a judge said before."""

    def find(self, questions: Sequence[str]) -> Mapping[str, Verdict]:
        """The verdicts on questions, by their digests."""

    def keep(self, said: Sequence[tuple[Case, Verdict]]) -> None:
        """Keep verdicts."""


class Forgetful:
    """A memory that is empty: each question is asked anew."""

    def find(self, questions: Sequence[str]) -> Mapping[str, Verdict]:
        """Nothing."""
        return {}

    def keep(self, said: Sequence[tuple[Case, Verdict]]) -> None:
        """Keep nothing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What asking may cost; ``None`` is no limit. ``cost`` is in dollars, by ``price``.

    ``price`` is in dollars for a million tokens, read and written. Calls that have begun when a
    limit is reached end, so a little more may be spent.
    """

    tokens: int | None = None
    cost: float | None = None
    seconds: float | None = None
    price: tuple[float, float] | None = None


UNLIMITED = Limits()


@dataclass(slots=True)
class Spending:
    """What was asked, and what it cost.

    ``asked`` counts calls that gave a verdict, ``known`` verdicts that were there before, and
    ``failed`` calls that gave none, by reason. ``stopped`` says which limit ended it.
    """

    asked: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: ``asdict`` would take a counter apart."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "failed": dict(self.failed)
        }

    def cost(self, price: tuple[float, float] | None) -> float | None:
        """What it cost in dollars; ``None`` without a price."""
        if price is None:
            return None
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6

    def reached(self, limits: Limits, since: float) -> str | None:
        """The limit that is reached, in words."""
        if limits.tokens is not None and self.prompt_tokens + self.completion_tokens >= (
            limits.tokens
        ):
            return f"{limits.tokens:,} tokens are spent"
        cost = self.cost(limits.price)
        if limits.cost is not None and cost is not None and cost >= limits.cost:
            return f"{cost:.2f} dollars are spent"
        if limits.seconds is not None and time.monotonic() - since >= limits.seconds:
            return f"{limits.seconds:.0f} s are over"
        return None


def hear(
    judge: Judge,
    cases: Sequence[Case],
    *,
    memory: Memory,
    spending: Spending,
    limits: Limits = UNLIMITED,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Opinion]]:
    """Ask each question in both orders, and yield each opinion with the place of its case.

    Opinions come as they are complete. A question of which one order failed has none; what the
    other order said is kept, and is not asked again. An answer that says nothing loses to one that
    says something, without a call.

    Args:
        judge: it is called from ``concurrency`` threads, with one question at a time.
        cases: the questions.
        memory: what was said before, and where to keep what is said now.
        spending: what is counted while it goes on.
        limits: when to stop.
        concurrency: how many calls there are at a time.
        progress: called with ``("judge", verdicts, all)``.

    Raises:
        JudgeError: :data:`FAILURES_IN_A_ROW` calls failed, and none worked since.
        ConfigError: the judge's settings make every call fail.
    """
    begun, hearing = time.monotonic(), _Hearing(cases)
    yield from hearing.recall(memory, spending)
    if not hearing.waiting:
        return
    tell: Progress = progress or (lambda stage, done, total: None)
    total, failures = 2 * len(cases), 0
    tell("judge", hearing.known, total)
    with _Workers(judge, min(concurrency, max(1, len(hearing.waiting)))) as workers:
        waiting = iter(hearing.waiting)
        while True:
            spending.stopped = spending.stopped or spending.reached(limits, begun)
            while spending.stopped is None and workers.are_free:
                task = next(waiting, None)
                if task is None:
                    break
                workers.ask(*task)
            answers = workers.answers()
            if not answers:
                break
            given = [(place, verdict) for place, verdict in answers if isinstance(verdict, Verdict)]
            memory.keep([(hearing.case(place), verdict) for place, verdict in given])
            for _, verdict in given:
                spending.asked += 1
                spending.prompt_tokens += verdict.prompt_tokens
                spending.completion_tokens += verdict.completion_tokens
            spending.seconds = time.monotonic() - begun
            for at, answer in answers:
                failures = 0 if isinstance(answer, Verdict) else failures + 1
                if isinstance(answer, Verdict):
                    yield from hearing.complete(at, answer)
                    continue
                silent = isinstance(answer, NoVerdict)
                spending.failed["no verdict" if silent else str(answer)[:200]] += 1
                if failures >= FAILURES_IN_A_ROW and not silent:
                    raise JudgeError(
                        f"{failures} calls in a row failed, the last one: {answer}; what was said "
                        "before is kept, and the same command goes on from there"
                    ) from answer
            tell("judge", hearing.known, total)


Place = tuple[int, bool]
"""The place of a case, and whether its answers are swapped."""


class _Hearing:
    """Which verdicts are known, and which are waited for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases, self._said = cases, dict[Place, Verdict]()
        self.waiting: list[tuple[Place, Question]] = []

    @property
    def known(self) -> int:
        return len(self._said)

    def case(self, place: Place) -> Case:
        """The case of a place, with its answers in that order."""
        case = self._cases[place[0]]
        return case._replace(question=case.question.swap()) if place[1] else case

    def recall(self, memory: Memory, spending: Spending) -> Iterator[tuple[int, Opinion]]:
        """Find what is known already."""
        for start in range(0, len(self._cases), _AT_ONCE):
            places = [
                (number, swapped)
                for number in range(start, min(start + _AT_ONCE, len(self._cases)))
                for swapped in (False, True)
            ]
            digests = {at: self.case(at).question.digest for at in places}
            found = memory.find([*digests.values()])
            for at in places:
                question = self.case(at).question
                verdict = found.get(digests[at])
                spending.known += verdict is not None
                verdict = verdict or _obvious(question)
                if verdict is None:
                    self.waiting.append((at, question))
                else:
                    yield from self.complete(at, verdict)

    def complete(self, place: Place, verdict: Verdict) -> Iterator[tuple[int, Opinion]]:
        """Note a verdict; yield the opinion if it was the second one."""
        number, swapped = place
        self._said[place] = verdict
        other = self._said.get((number, not swapped))
        if other is not None:
            both = (other, verdict) if swapped else (verdict, other)
            yield number, opinion(*both)


def _obvious(question: Question) -> Verdict | None:
    """The verdict where an answer says nothing, and the other one does."""
    a, b = is_empty(question.a), is_empty(question.b)
    if a == b:
        return None
    return Verdict("b" if a else "a", 1.0, "an answer says something")


class _Workers:
    """Threads that ask; daemons, so that nobody waits for a call that is given up."""

    def __init__(self, judge: Judge, count: int) -> None:
        self._judge, self._count, self._asking = judge, count, 0
        self._inbox: queue.SimpleQueue[tuple[Place, Question] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[Place, Verdict | JudgeError]] = queue.SimpleQueue()

    def __enter__(self) -> _Workers:
        for number in range(self._count):
            name = f"agentpref-judge-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
        return self

    def __exit__(self, *at: object) -> None:
        for _ in range(self._count):
            self._inbox.put(None)

    @property
    def are_free(self) -> bool:
        """Whether one of them has nothing to do."""
        return self._asking < self._count

    def ask(self, place: Place, question: Question) -> None:
        self._asking += 1
        self._inbox.put((place, question))

    def answers(self) -> list[tuple[Place, Verdict | JudgeError]]:
        """Wait for an answer, and take all that are there; none if nothing is asked."""
        found: list[tuple[Place, Verdict | JudgeError]] = []
        while self._asking:
            try:
                found.append(self._outbox.get(block=not found))
            except queue.Empty:
                break
            self._asking -= 1
        return found

    def _work(self) -> None:
        while (task := self._inbox.get()) is not None:
            place, question = task
            self._outbox.put((place, self._answer(question)))

    def _answer(self, question: Question) -> Verdict | JudgeError:
        try:
            (verdict,) = self._judge.judge([question.prompt], [(question.a, question.b)])
            if not isinstance(verdict, Verdict) or verdict.winner not in WINNERS:
                return JudgeError(
                    f"the judge said {verdict!r:.80}, but must return a Verdict whose winner is "
                    "'a', 'b' or 'tie' for each pair"
                )
            return verdict
        except JudgeError as error:
            return error
        except (Exception, SystemExit) as error:  # a judge is foreign code
            raised = JudgeError(f"the judge raised {type(error).__name__}: {error}")
            raised.__cause__ = error
            return raised
