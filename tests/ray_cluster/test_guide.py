"""The commands and lines that docs/training.md shows for Ray, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
import ray

from agentpref.home import Home

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## On a Ray cluster\n(.*?)^## ", re.DOTALL | re.MULTILINE)


@pytest.fixture
def shown(cluster):
    """Call ``shown("sh")`` for what a fence of this language holds, for this cluster."""
    (section,) = SECTION.findall((ROOT / "docs" / "training.md").read_text(encoding="utf-8"))

    def find(language: str) -> str:
        (text,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        for ours, theirs in (("4", "2"), ("NAME", "tiny"), ("auto", cluster.address)):
            assert ours in text
            text = text.replace(ours, theirs)
        return text

    return find


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the reader is, with a home in which nothing is new."""
    Home.create(tmp_path / ".agentpref")
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_of_the_guide_runs(shown, folder, command) -> None:
    install, update = shown("sh").splitlines()
    assert install == "pip install 'agentpref[ray]'"
    program, *words = update.split()
    assert program == "agentpref"
    with command(*words, "--json") as process:
        out, err = process.communicate()
    assert process.returncode == 3, err
    assert orjson.loads(out)["verdict"] == "nothing_new"


def test_the_lines_of_the_guide_run(shown, folder) -> None:
    names = {}
    exec(compile(shown("py"), "docs/training.md", "exec"), names)
    assert names["report"].verdict == "nothing_new"
    assert not ray.is_initialized()
