"""What lies on an annotator's desk: the question at hand, those that follow, and the last answer.

A desk has one thread, in which its queue was opened and is used: SQLite's connections belong to
their thread, and two clicks at once then answer one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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

BATCH = 20
"""So many questions are chosen at a time."""

_WINNERS: Mapping[str, Winner] = {"a": "a", "b": "b", "tie": "tie"}


@dataclass
class Desk:
    """One annotator's desk; use it in the thread of :meth:`Desks.at` alone."""

    queue: Queue
    ahead: list[Question] = field(default_factory=list)
    behind: list[Question] = field(default_factory=list)

    def question(self) -> Question | None:
        """The question at hand; ``None`` where there are no more."""
        if not self.ahead:
            self.ahead = self.queue.next(BATCH)
        return self.ahead[0] if self.ahead else None

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
        self._desks: dict[str, tuple[Desk, ExitStack]] = {}
        self._lock = threading.Lock()

    def at(self, person: str, do: Callable[[Desk], T]) -> T:
        """Do something at a person's desk, after what is being done there, and return it."""
        with self._lock:
            thread = self._threads.setdefault(person, ThreadPoolExecutor(1, f"desk-{person}"))
        return thread.submit(lambda: do(self._desk(person))).result()

    def _desk(self, person: str) -> Desk:
        if person not in self._desks:
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
            self._desks[person] = Desk(queue), stack
        return self._desks[person][0]

    def close(self) -> None:
        """Close all desks, each in its thread."""
        for person, thread in self._threads.items():
            if person in self._desks:
                thread.submit(self._desks[person][1].close).result()
            thread.shutdown()

    def __enter__(self) -> Desks:
        return self

    def __exit__(self, *at: object) -> None:
        self.close()
