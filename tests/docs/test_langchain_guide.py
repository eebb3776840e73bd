"""Runs every snippet of docs/langchain.md, in order, as one program."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref.record.database import connect
from agentpref.record.home import Home
from agentpref.record.store import Store

GUIDE = Path(__file__).parents[2] / "docs" / "langchain.md"


def test_every_snippet_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_base: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    program = "\n".join(snippets).replace('"tiny"', repr(str(random_base)))
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(program, str(GUIDE), "exec"), names)

    assert names["answer"].response_metadata["revision"] == "base"
    with closing(connect(Home.open(".agentpref"), readonly=True)) as connection:
        store = Store(connection)
        asked, served = store.runs("default")
        feedback = [(said.run_id, said.key) for said in store.feedback("default")]
    assert feedback == [(asked.run_id, "thumbs"), (asked.run_id, "correction")]
    assert (asked.thread_id, served.thread_id) == ("conversation-7", "conversation-8")
    assert served.revision == "base"
    assert served.prompt.tools
