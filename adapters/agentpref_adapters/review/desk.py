"""What lies on an annotator's desk: the question at hand, those that follow, and the last answer.

A desk has a thread in which its queue was opened and is used: SQLite's connections belong to their
thread, and two clicks at once then answer one after the other. A second thread, with a queue of its
own, chooses the next questions while people read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from agentpref.elicitation import Question, Queue, open_queue
from agentpref.elicitation.acquisition import Rule
from agentpref.home import Home
from agentpref.reward import RewardModel
from agentpref.types import Winner

T = TypeVar("T")

Choice = Literal["a", "b", "tie", "bad", "skip", "correct-a", "correct-b"]
"""The first answer, the second, neither, both bad, not this one, or one of them as corrected."""

BATCH, FEW = 20, 10
"""So many questions are chosen at a time, while so few are left: in a large home that takes a
second or two, for which nobody should wait."""

_WINNERS: Mapping[str, Winner] = {"a": "a", "b": "b", "tie": "tie"}


@dataclass
class Desk:
    """One annotator's desk; use it in the thread of :meth:`Desks.at` alone."""

    queue: Queue
    choose: Callable[[frozenset[str]], Future[tuple[list[Question], list[str]]]]
    ahead: list[Question] = field(default_factory=list)
    behind: list[Question] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _coming: Future[tuple[list[Question], list[str]]] | None = None
    _is_dry: bool = False

    def question(self) -> Question | None:
        """The question at hand; ``None`` where there are no more."""
        self._drop_done()
        if not self.ahead and self._coming is not None:
            self._take(self._coming)
            self._drop_done()
        if not self.ahead:
            self._take(self._choose())
        return self.ahead[0] if self.ahead else None

    def _drop_done(self) -> None:
        """Leave out what the person has answered elsewhere meanwhile."""
        while self.ahead and self.queue.is_done(self.ahead[0]):
            del self.ahead[0]

    def _take(self, chosen: Future[tuple[list[Question], list[str]]]) -> None:
        """Wait for the questions that are being chosen."""
        self._coming = None
        self.ahead, self.notes = chosen.result()
        self._is_dry = not self.ahead

    def _choose(self) -> Future[tuple[list[Question], list[str]]]:
        return self.choose(frozenset(one.id for one in (*self.ahead, *self.behind)))

    def answer(
        self, question_id: str, choice: Choice, comment: str | None, correction: str = ""
    ) -> bool:
        """Log an answer to the question at hand; ``False`` if another one is at hand by now.

        Raises:
            InvalidMessage: it is a correction that says nothing.
        """
        question = self.question()
        if question is None or question.id != question_id:
            return False
        if choice == "skip":
            self.queue.skip(question)
        elif choice == "bad":
            self.queue.both_bad(question, comment)
        elif choice in ("correct-a", "correct-b"):
            self.queue.correct(question, "a" if choice == "correct-a" else "b", correction, comment)
        else:
            self.queue.answer(question, _WINNERS[choice], comment)
        del self.ahead[0]
        self.behind.append(question)
        if self._coming is None and len(self.ahead) <= FEW and not self._is_dry:
            self._coming = self._choose()
        return True

    def undo(self) -> bool:
        """Take back the last answer, and ask that again; ``False`` if there is none."""
        if not self.behind:
            return False
        question = self.behind.pop()
        self.queue.undo(question)
        self.ahead.insert(0, question)
        return True


class Desks:
    """The desks of a namespace, one for each annotator; a context manager that closes them."""

    def __init__(
        self,
        home: Home,
        *,
        namespace: str = "default",
        rule: Rule | None = None,
        reward: RewardModel | None = None,
        pool: int = 200,
        gold: str | None = None,
    ) -> None:
        self.home, self.namespace = home, namespace
        self._rule, self._reward, self._pool, self.gold = rule, reward, pool, gold
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._queues: dict[str, tuple[Queue, ExitStack]] = {}
        self._desks: dict[str, Desk] = {}
        self._lock, self._closed = threading.Lock(), False

    def at(self, person: str, do: Callable[[Desk], T]) -> T:
        """Do something at a person's desk, after what is being done there, and return it."""
        return self._in_thread(f"desk-{person}", lambda: do(self._desk(person))).result()

    def _in_thread(self, name: str, do: Callable[[], T]) -> Future[T]:
        """Do something in a thread of that name, after what is being done there."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the desks are closed")
            thread = self._threads.setdefault(name, ThreadPoolExecutor(1, name))
            return thread.submit(do)

    def _desk(self, person: str) -> Desk:
        if person not in self._desks:
            choosing = f"next-{person}"

            def choose(besides: frozenset[str]) -> tuple[list[Question], list[str]]:
                queue = self._queue(choosing, person)
                return queue.next(BATCH, besides), queue.notes

            self._desks[person] = Desk(
                self._queue(f"desk-{person}", person),
                lambda besides: self._in_thread(choosing, lambda: choose(besides)),
            )
        return self._desks[person]

    def _queue(self, thread: str, person: str) -> Queue:
        """A person's queue in a thread; call it there."""
        if thread not in self._queues:
            stack = ExitStack()
            queue = stack.enter_context(
                open_queue(
                    self.home,
                    namespace=self.namespace,
                    person=person,
                    rule=self._rule,
                    reward=self._reward,
                    pool=self._pool,
                    gold=self.gold,
                )
            )
            self._queues[thread] = queue, stack
        return self._queues[thread][0]

    def close(self) -> None:
        """Close all desks, each in its thread."""
        with self._lock:
            self._closed = True
        for name, thread in self._threads.items():
            if name in self._queues:
                thread.submit(self._queues[name][1].close).result()
            thread.shutdown()

    def __enter__(self) -> Desks:
        return self

    def __exit__(self, *at: object) -> None:
        self.close()
