"""Runs docs/openai.md on OpenAI's own client and a server that speaks its interface."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai_stand_in import OpenAIServer, completion, response
from sessions import ROOT, normal, play

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.store import Store


def test_every_snippet_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "guide"}
    with OpenAIServer().running() as server:
        monkeypatch.delenv("AGENTPREF_HOME", raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        usual, ids = server.usual, iter(range(1, 9))

        def answering(path: str, body: Any) -> Any:
            given = usual(path, body)
            if body.get("n") == 2:
                given.body = completion("yes", "no")
            elif path.endswith("/responses"):
                given.body = response("yes", name=f"resp_{next(ids)}")
            return given

        monkeypatch.setattr(server, "usual", answering)
        for fence, written in play(guide, tmp_path, names):
            assert normal(written) == normal(fence.text)
        names["client"].close()

    with closing(connect(Home.open(tmp_path / ".agentpref"), readonly=True)) as connection:
        runs = list(Store(connection).runs("default"))
        feedback = [said.run_id for said in Store(connection).feedback("default")]
    assert len(runs) == 9
    assert set(feedback) <= {run.run_id for run in runs}
    assert [run.thread_id for run in runs].count("conversation-8") == 1
    assert [m["content"] for m in runs[-1].prompt.messages] == [
        "Is the shop open?",
        "yes",
        "Really?",
    ]
