"""Runs docs/langchain.md on the bundled model, and checks what was logged."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sessions import ROOT, play

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.store import Store


def test_every_snippet_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    guide = (ROOT / "docs" / "langchain.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "guide"}
    list(play(guide, tmp_path, names))

    assert isinstance(names["timer"].minutes, str)
    assert names["answer"].response_metadata["revision"] == "base"
    home = Home.open(tmp_path / ".agentpref")
    with closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        asked, shown, served, routed = store.runs("default")
        feedback = [(said.run_id, said.key) for said in store.feedback("default")]
    assert sorted(feedback) == sorted(
        [
            (asked.run_id, "thumbs"),
            (asked.run_id, "correction"),
            (shown.run_id, "thumbs"),
            (routed.run_id, "thumbs"),
        ]
    )
    assert (routed.thread_id, routed.revision) == ("conversation-9", "base")
    assert (asked.thread_id, served.thread_id) == ("conversation-7", "conversation-8")
    assert served.revision == "base"
    assert served.prompt.tools
