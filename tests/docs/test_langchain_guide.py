"""Runs docs/langchain.md on a small random model, and checks what was logged."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sessions import ROOT, play

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.store import Store


def test_every_snippet_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_base: Path
) -> None:
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    guide = (ROOT / "docs" / "langchain.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "guide"}
    list(play(guide.replace('"tiny"', repr(str(random_base))), tmp_path, names))

    assert names["answer"].response_metadata["revision"] == "base"
    home = Home.open(tmp_path / ".agentpref")
    with closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        asked, served = store.runs("default")
        feedback = [(said.run_id, said.key) for said in store.feedback("default")]
    assert feedback == [(asked.run_id, "thumbs"), (asked.run_id, "correction")]
    assert (asked.thread_id, served.thread_id) == ("conversation-7", "conversation-8")
    assert served.revision == "base"
    assert served.prompt.tools
