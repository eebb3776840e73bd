"""A home with answers that people compared, and a judge that a test can make better or worse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref import plugins
from agentpref.home import Home
from agentpref.prefer.judges import rubric
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.testing import FakeJudge

RUBRIC = "---\nengine: fake\nprinciples: [be brief]\nprice: [1, 2]\n---\n"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """80 prompts of two tags with two answers each; people compared 30 of the tag "brief"."""
    with Log(tmp_path / "home") as log:
        for number in range(80):
            tag = "brief" if number < 60 else "other"
            asked = [{"role": "user", "content": f"Question {number}?"}]
            runs = [
                log.record(asked, text, tags=[tag])
                for text in (f"Yes, {number}.", f"Well, you see, that would be number {number}.")
            ]
            if number < 30:
                log.compare(*runs, winner="a", user_id=f"person {number % 3}")
    return Home.open(tmp_path / "home")


@pytest.fixture
def fake(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeJudge]:
    """Makes the judge that the engine ``fake`` of the home's rubrics is."""
    made, real = [FakeJudge()], plugins.load

    def load(group: str, name: str) -> Any:
        is_ours = (group, name) == (plugins.JUDGES, "fake")
        return (lambda rubric: made[-1]) if is_ours else real(group, name)

    def make(**faults: Any) -> FakeJudge:
        made.append(FakeJudge(**faults))
        return made[-1]

    monkeypatch.setattr(plugins, "load", load)
    rubric.write(home, "brief", RUBRIC)
    return make


@pytest.fixture
def database(home: Home) -> Iterator[Any]:
    with closing(connect(home)) as connection:
        yield connection
