"""Homes of any size, for benchmarks that are about size.

A home has conversations of four turns with messages of about 500 characters, spread evenly over the
days up to now, and 2,000 judgements a day: thumbs, corrections, and comparisons with a second
answer. The store writes it, so it is what a log of that age would hold; it only skips syncs and
keeps the indices in memory. Ten million rows take some minutes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from agentpref.home import Home
from agentpref.record.database import connect, transaction
from agentpref.record.keys import names_of
from agentpref.record.messages import Linker, Node, RunRow, new_id, run_row
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Prompt, Run

TURNS = 4
CHARACTERS = 500
JUDGEMENTS_PER_DAY = 2_000
CONVERSATIONS_PER_USER = 40
NAMESPACES = ("default", "default", "default", "other")
ROWS, JUDGEMENTS = 12.47, 0.29
"""Rows of a conversation on average: of all tables, and of feedback and comparisons."""

_DAY_SECONDS = 86_400.0
_AT_ONCE = 2_000
_UNSAFE_AND_FAST = (
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "PRAGMA foreign_keys = OFF",
    "PRAGMA cache_size = -3000000",
)


@dataclass(slots=True)
class Conversation:
    """The runs of one conversation, and their judgements."""

    runs: list[RunRow] = field(default_factory=list)
    said: list[Feedback | Comparison] = field(default_factory=list)


def make(folder: Path, rows: int, tell: Callable[[str], None] = print, *, seed: int = 0) -> Home:
    """Make a home of about ``rows`` rows in an empty or missing folder."""
    home = Home.create(folder)
    names_of(home)  # its key, before it has users
    count = max(1, round(rows / ROWS))
    with closing(connect(home)) as connection:
        for setting in _UNSAFE_AND_FAST:
            connection.execute(setting)
        store = Store(connection)
        source = conversations(count, random.Random(seed), time.time())
        done = 0
        while some := list(islice(source, _AT_ONCE)):
            with transaction(connection):
                _write(store, some)
            done += len(some)
            if done % 100_000 < _AT_ONCE:
                tell(f"written: {done:,} of {count:,} conversations")
        connection.execute("PRAGMA journal_mode = WAL")
    return home


def conversations(count: int, rng: random.Random, until: float) -> Iterator[Conversation]:
    """Generate ``count`` conversations in the order of time, up to ``until``."""
    scribe = _Scribe(rng, count)
    start = until - count * JUDGEMENTS / JUDGEMENTS_PER_DAY * _DAY_SECONDS
    for index in range(count):
        yield scribe.conversation(index, start + (until - start) * index / count)


def _write(store: Store, conversations: list[Conversation]) -> None:
    store.add_runs([run for one in conversations for run in one.runs])
    for one in conversations:
        for said in one.said:
            if isinstance(said, Feedback):
                store.add_feedback(said)
            else:
                store.add_comparison(said)


class _Scribe:
    """Writes random conversations."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self._rng = rng
        self._linker = Linker()
        self._text = "".join(rng.choices("etaoin shrdlu cmfwyp vbgkjq ", k=100_000))
        self._users = [
            f"{rng.getrandbits(128):032x}" for _ in range(count // CONVERSATIONS_PER_USER + 1)
        ]

    def conversation(self, index: int, at: float) -> Conversation:
        told = Conversation()
        same = {
            "namespace": NAMESPACES[index % len(NAMESPACES)],
            "thread_id": f"{self._rng.getrandbits(128):032x}",
            "user_id": self._rng.choice(self._users),
        }
        parent: str | None = None
        for turn in range(TURNS):
            asked = self._message(parent, "user")
            told.runs.append(self._run(asked, at + turn, same))
            parent = told.runs[-1].output
        self._judge(told, asked, at + TURNS, same)
        return told

    def _judge(self, told: Conversation, asked: Node, at: float, same: dict[str, Any]) -> None:
        chance, by = self._rng.random(), same["user_id"]
        if chance < 0.17:
            run, score = self._rng.choice(told.runs), float(self._rng.random() < 0.7)
            told.said.append(_thumb(run, at, score, by))
        elif chance < 0.20:
            fixed = {"role": "assistant", "content": self._words()}
            name = told.runs[-1].run_id
            told.said.append(
                Feedback(_id(at), name, at, "correction", user_id=by, correction=fixed)
            )
        elif chance < 0.25:
            again = self._run(asked, at, same)
            told.runs.append(again)
            first = told.runs[-2]
            told.said.append(Comparison(_id(at), at, first.run_id, again.run_id, "b", user_id=by))
            if chance < 0.22:
                told.said += [_thumb(first, at, 0.0, by), _thumb(again, at, 1.0, by)]

    def _run(self, asked: Node, at: float, same: dict[str, Any]) -> RunRow:
        answer = self._message(asked.id, "assistant")
        run = Run(
            run_id=_id(at),
            created_at=at,
            prompt=Prompt(asked.id, ()),
            output={},
            model="some-model",
            revision="base",
            tags=("chat",),
            **same,
        )
        return run_row(run, (asked, answer))

    def _message(self, parent: str | None, role: str) -> Node:
        return self._linker.child(parent, {"role": role, "content": self._words()})

    def _words(self) -> str:
        start = self._rng.randrange(len(self._text) - CHARACTERS)
        return f"{self._rng.getrandbits(64):x} {self._text[start : start + CHARACTERS - 17]}"


def _thumb(run: RunRow, at: float, score: float, user_id: str) -> Feedback:
    return Feedback(_id(at), run.run_id, at, "thumbs", score, user_id=user_id)


def _id(at: float) -> str:
    return new_id(round(at * 1e9))
