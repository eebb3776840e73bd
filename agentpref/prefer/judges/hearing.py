"""Asks a judge many questions: each in both orders, none twice, within a budget, several at a time.

A judge that can be steered by what it judges is asked a control question, too: whether the answer
that won also wins where it is beside the point (:mod:`agentpref.prefer.judges.injection`).

The caller's thread hands out questions, keeps verdicts and counts; worker threads only ask. So what
is kept is kept by one thread, as SQLite wants it, and Ctrl-C ends the caller at once: a call that a
worker waits for is given up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from agentpref.errors import JudgeError, NoVerdict
from agentpref.prefer.judges.asking import is_empty
from agentpref.prefer.judges.injection import control
from agentpref.prefer.judges.verdicts import (
    Judge,
    Opinion,
    Question,
    Verdict,
    opinion,
    overruled,
    swapped,
)
from agentpref.types import WINNERS, Message, Progress

FAILURES_IN_A_ROW = 20
"""After so many failed calls without one that works, the judge is given up."""

KEPT_EVERY = 0.25
"""Seconds between two times at which verdicts are kept: each waits for the disk."""

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

    ``price`` is in dollars for a million tokens, read and written. ``seconds`` count from when the
    spending began. Calls that have begun when a limit is reached end, so a little more may be
    spent.
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
    ``failed`` calls that gave none, by reason. ``cost`` is in dollars; ``None`` where a judge has
    no price. ``seconds`` were spent asking, and ``stopped`` says which limit ended it.
    """

    asked: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    seconds: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None
    begun: float = field(default_factory=time.monotonic, repr=False)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: ``asdict`` would take a counter apart."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "begun"}
        return plain | {"failed": dict(self.failed)}

    def spend(self, said: Verdict | NoVerdict, price: tuple[float, float] | None) -> None:
        """Count what it took to say something, or nothing."""
        self.prompt_tokens += said.prompt_tokens
        self.completion_tokens += said.completion_tokens
        if price is not None:
            spent = said.prompt_tokens * price[0] + said.completion_tokens * price[1]
            self.cost = (self.cost or 0.0) + spent / 1e6

    def reached(self, limits: Limits) -> str | None:
        """The limit that is reached, in words."""
        tokens = self.prompt_tokens + self.completion_tokens
        if limits.tokens is not None and tokens >= limits.tokens:
            return f"{limits.tokens:,} tokens are spent"
        if limits.cost is not None and self.cost is not None and self.cost >= limits.cost:
            return f"{self.cost:.2f} dollars are spent"
        if limits.seconds is not None and time.monotonic() - self.begun >= limits.seconds:
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
    says something, without a call. An answer that wins, and wins beside the point, too, loses
    unless the other one does as well, if the judge has an attribute ``controls`` that is true.

    Args:
        judge: it is called from ``concurrency`` threads, with one question at a time.
        cases: the questions.
        memory: what was said before, and where to keep what is said now.
        spending: what is counted while it goes on.
        limits: when to stop.
        concurrency: how many calls there are at a time.
        progress: called with ``("judge", opinions, cases)``.

    Raises:
        JudgeError: :data:`FAILURES_IN_A_ROW` calls failed, and none worked since.
    """
    hearing = _Hearing(cases, memory, spending, controls=bool(getattr(judge, "controls", False)))
    yield from hearing.recall()
    if hearing.waiting:
        spending.stopped = spending.stopped or spending.reached(limits)
    if not hearing.waiting or hearing.ends:
        return
    tell: Progress = progress or (lambda stage, done, total: None)
    started, before = time.monotonic(), spending.seconds
    tell("judge", hearing.complete, len(cases))
    with _Workers(judge, min(concurrency, len(hearing.waiting))) as workers:
        try:
            while True:
                # The lanes are filled before anything waits for the disk.
                spending.stopped = spending.stopped or spending.reached(limits)
                while hearing.waiting and workers.are_free and not hearing.ends:
                    workers.ask(hearing.waiting.popleft())
                if hearing.is_due(at_once=workers.are_idle):
                    yield from hearing.keep()
                    tell("judge", hearing.complete, len(cases))
                elif workers.are_idle:
                    break
                else:
                    for question, answer in workers.answers(KEPT_EVERY if hearing.unkept else None):
                        hearing.note(question, answer, limits.price)
                    spending.seconds = before + time.monotonic() - started
        finally:
            hearing.keep()  # what came before Ctrl-C, or before the caller wants no more
    if hearing.gone is not None:
        raise hearing.gone


class _Hearing:
    """What is known of the questions, what waits to be kept, and what waits to be asked."""

    def __init__(
        self, cases: Sequence[Case], memory: Memory, spending: Spending, *, controls: bool
    ) -> None:
        self._cases, self._memory, self._spending = cases, memory, spending
        self._controls = controls
        self._said = dict[str, Verdict]()  # by the digests of the questions
        self._needed_by = dict[str, list[int]]()  # the places of cases that wait for a question
        self._failures, self._kept_at = 0, time.monotonic()
        self.complete = 0
        self.waiting: deque[Question] = deque()
        self.unkept: list[tuple[Question, Verdict]] = []
        self.gone: JudgeError | None = None

    @property
    def ends(self) -> bool:
        """Whether nothing more is to be asked."""
        return self._spending.stopped is not None or self.gone is not None

    def recall(self) -> Iterator[tuple[int, Opinion]]:
        """Find what is known already; what is not waits to be asked."""
        for start in range(0, len(self._cases), _AT_ONCE):
            places = range(start, min(start + _AT_ONCE, len(self._cases)))
            orders: dict[str, Question] = {}
            for place in places:
                question = self._cases[place].question
                orders |= {one.digest: one for one in (question, question.swap())}
            self._find(orders)
            for place in places:
                yield from self._opinion(place)

    def note(
        self, question: Question, answer: Verdict | JudgeError, price: tuple[float, float] | None
    ) -> None:
        """Take an answer of a worker."""
        spending = self._spending
        if isinstance(answer, Verdict):
            self._failures = 0
            self.unkept.append((question, answer))
            spending.asked += 1
            spending.spend(answer, price)
        elif isinstance(answer, NoVerdict):  # of this question: others may have one
            self._failures = 0
            spending.failed[answer.why] += 1
            spending.spend(answer, price)
        else:
            self._failures += 1
            spending.failed[str(answer)[:200]] += 1
            if self._failures >= FAILURES_IN_A_ROW:
                self.gone = JudgeError(
                    f"{self._failures} calls in a row failed, the last one: {answer}; what was "
                    "said before is kept, and the same command goes on from there"
                )
                self.gone.__cause__ = answer

    def is_due(self, *, at_once: bool) -> bool:
        """Whether verdicts are to be kept now."""
        waits = not at_once and time.monotonic() - self._kept_at < KEPT_EVERY
        return bool(self.unkept) and not waits

    def keep(self) -> list[tuple[int, Opinion]]:
        """Keep the verdicts that came; return the opinions that they complete."""
        done, self.unkept, self._kept_at = self.unkept, [], time.monotonic()
        digests = [question.digest for question, _ in done]
        needed_by = [self._needed_by.pop(digest) for digest in digests]
        rows = [
            (Case(question, self._cases[places[0]].prompt_id), verdict)
            for (question, verdict), places in zip(done, needed_by, strict=True)
        ]
        self._memory.keep(rows)
        for digest, (_, verdict) in zip(digests, done, strict=True):
            self._said[digest] = verdict
        places = {place for some in needed_by for place in some}
        return [one for place in sorted(places) for one in self._opinion(place)]

    def _find(self, questions: Mapping[str, Question]) -> None:
        unknown = {digest: one for digest, one in questions.items() if digest not in self._said}
        found = self._memory.find([*unknown])
        self._said |= found
        self._spending.known += len(found)

    def _opinion(self, place: int) -> Iterator[tuple[int, Opinion]]:
        """The opinion on a case, unless something that it needs has to be asked first."""
        question = self._cases[place].question
        obvious = _obvious(question)
        if obvious is not None:
            self.complete += 1
            yield place, opinion(obvious, obvious.swap())
            return
        as_given, turned = (self._need(one, place) for one in (question, question.swap()))
        if as_given is None or turned is None:
            return
        found = opinion(as_given, turned)
        if self._controls and found.winner != "tie":
            controlled = self._controlled(found, place)
            if controlled is None:
                return
            found = controlled
        self.complete += 1
        yield place, found

    def _controlled(self, found: Opinion, place: int) -> Opinion | None:
        """The opinion after control questions; ``None`` if one has to be asked first."""
        _, a, b = self._cases[place].question
        won, lost = (a, b) if found.winner == "a" else (b, a)
        steers = self._steers(won, place)
        if not steers:
            return found if steers is False else None
        both = self._steers(lost, place)
        if both is None:
            return None
        return overruled(found, "tie" if both else swapped(found.winner))

    def _steers(self, answer: Message, place: int) -> bool | None:
        """Whether an answer wins beside the point; ``None`` if that has to be asked first."""
        question = control(answer)
        self._find({question.digest: question})
        verdict = self._need(question, place, at_once=True)
        return None if verdict is None else verdict.winner == "b"

    def _need(self, question: Question, place: int, *, at_once: bool = False) -> Verdict | None:
        """What is known of a question; what is not known waits to be asked, once."""
        digest = question.digest
        if digest in self._said:
            return self._said[digest]
        if digest not in self._needed_by:
            self._needed_by[digest] = []
            if at_once:
                self.waiting.appendleft(question)
            else:
                self.waiting.append(question)
        if place not in self._needed_by[digest]:
            self._needed_by[digest].append(place)
        return None


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
        self._inbox: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[Question, Verdict | JudgeError]] = queue.SimpleQueue()

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

    @property
    def are_idle(self) -> bool:
        """Whether none of them has anything to do."""
        return self._asking == 0

    def ask(self, question: Question) -> None:
        self._asking += 1
        self._inbox.put(question)

    def answers(self, seconds: float | None) -> list[tuple[Question, Verdict | JudgeError]]:
        """Wait for an answer, so long at most, and take all that are there."""
        found: list[tuple[Question, Verdict | JudgeError]] = []
        while self._asking:
            try:
                found.append(self._outbox.get(block=not found, timeout=seconds))
            except queue.Empty:
                break
            self._asking -= 1
        return found

    def _work(self) -> None:
        while (question := self._inbox.get()) is not None:
            self._outbox.put((question, self._answer(question)))

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
