"""A log on a home of its own, and what it left on disk, read by another connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

Judged: TypeAlias = "tuple[list[Feedback], list[Comparison]]"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "home") as log:
        yield log


@pytest.fixture
def runs_in() -> Callable[[Home], list[Run]]:
    def read(home: Home) -> list[Run]:
        connection = connect(home, readonly=True)
        try:
            return list(Store(connection).runs("default"))
        finally:
            connection.close()

    return read


@pytest.fixture
def runs_of(runs_in: Callable[[Home], list[Run]]) -> Callable[[Log], list[Run]]:
    def read(log: Log) -> list[Run]:
        log.flush()
        return runs_in(log.home)

    return read


@pytest.fixture
def judged_in() -> Callable[[Home], Judged]:
    def read(home: Home) -> tuple[list[Feedback], list[Comparison]]:
        connection = connect(home, readonly=True)
        try:
            store = Store(connection)
            return list(store.feedback("default")), list(store.comparisons("default"))
        finally:
            connection.close()

    return read
