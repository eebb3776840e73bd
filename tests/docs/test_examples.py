"""Runs the scripts of examples/ as a user does, with typed input from the test."""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

import agentpref
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.prefer.exchange import import_file
from agentpref.record.database import connect
from agentpref.record.store import Store

EXAMPLES = Path(__file__).parents[2] / "examples"
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run ``script("chat_thumbs.py", home, typed="hello\\n")`` and return what it printed."""

    def call(name: str, *arguments: object, typed: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_the_chat_logs_the_answer_and_the_feedback_on_it(script: Script, tmp_path: Path) -> None:
    typed = "+\nTurn off the lamp in the hall.\n-\n= The lamp is off, as you wished.\n\nnot read\n"
    printed = script("chat_thumbs.py", tmp_path / "home", typed=typed).splitlines()
    assert printed[1] == "nothing to judge yet"
    with closing(connect(Home.open(tmp_path / "home"), readonly=True)) as connection:
        store = Store(connection)
        [run] = store.runs("default")
        [pair] = read_examples(store, "default", held_out=0.2).pairs
        said = [(one.run_id, one.key, one.score) for one in store.feedback("default")]
    chosen, rejected = pair.completions
    assert run.output["content"] == printed[2] == rejected.message["content"]
    assert chosen.message["content"] == "The lamp is off, as you wished."
    assert said == [(run.run_id, "thumbs", 0.0), (run.run_id, "correction", None)]
    assert (run.revision, run.thread_id) == ("base", "console")
    assert run.token_ids is not None
    assert run.logprobs is not None
    assert len(run.token_ids) == len(run.logprobs)


def test_the_nightly_update_prints_its_verdict_exits_by_it_and_the_router_follows(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, home = tmp_path / "few.jsonl", Home.create(tmp_path / "home")
    with (EXAMPLES / "preferences.jsonl").open(encoding="utf-8") as rows:
        few.write_text("".join(islice(rows, 6)), encoding="utf-8")
    import_file(home, few)
    command = ("nightly_update.py", "--home", home.path, "--model", "tiny")
    with pytest.raises(SystemExit, match="5"):
        script(*command)
    printed = capsys.readouterr().out
    assert printed.startswith("insufficient: ")
    assert "new preferences: " in printed
    assert printed.endswith("serving: the base model\n")

    [revision] = agentpref.Registry(home).list()
    agentpref.Registry(home).promote(revision.revision_id)
    with pytest.raises(SystemExit, match="3"):
        script(*command)
    assert capsys.readouterr().out.endswith(f"serving: {revision.revision_id}\n")


def test_the_nightly_update_without_a_home_fails_in_one_line(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        script("nightly_update.py", "--home", tmp_path / "none", "--model", "tiny")
    assert capsys.readouterr().err.startswith("error: ")


def test_the_examples_preferences_are_enough_for_the_gate() -> None:
    gate = agentpref.UpdateConfig().gate
    rows = (EXAMPLES / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) - 400 >= gate.cross_fit_below
