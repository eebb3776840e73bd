"""Homes as a fault leaves them, and what must still be in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.spill import drain
from agentpref.record.store import Store

Held = dict[str, set[str]]


@pytest.fixture
def held() -> Callable[[Path], Held]:
    """Bring a spill home, check the record, and name all that is in it."""

    def read(folder: Path) -> Held:
        home = Home.open(folder)
        drained = drain(home)
        assert drained.refused == 0
        with closing(connect(home, readonly=True)) as connection:
            store = Store(connection)
            assert examine(connection).problems == []
            return {
                "run": {run.run_id for run in store.runs("default")},
                "feedback": {said.feedback_id for said in store.feedback("default")},
                "comparison": {said.comparison_id for said in store.comparisons("default")},
            }

    return read
