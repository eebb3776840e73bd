"""A command line to call within the process, and a home with something in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from typer.testing import CliRunner

from agentpref_cli.main import app


class Output(NamedTuple):
    """What a command wrote."""

    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object that ``--json`` promises, and nothing after it."""
        return orjson.loads(self.out)


Run = Callable[..., Output]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the home is that commands find by themselves; it is not made yet."""
    folder = tmp_path / "home"
    monkeypatch.setenv("AGENTPREF_HOME", str(folder))
    return folder


@pytest.fixture
def run(home: Path) -> Run:
    """Call ``run("stats", "--json", exits=0)`` as a user would, with output piped."""

    def call(*arguments: object, exits: int = 0) -> Output:
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="agentpref")
        assert result.exit_code == exits, (result.output, result.exception)
        return Output(result.stdout, result.stderr)

    return call


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 40 preferences and 6 lone thumbs, told apart by their keys."""
    pairs = [
        {"prompt": f"How is bread {i} baked?", "chosen": f"In oven {i}.", "rejected": "No idea."}
        for i in range(40)
    ]
    thumbs = [{"prompt": f"Is it {i}?", "completion": "Yes.", "label": i < 3} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in [*pairs, *thumbs]))
    return file


@pytest.fixture
def filled(run: Run, home: Path, rows: Path) -> Path:
    """A home into which the file was imported, under the tag ``bread``."""
    run("init")
    run("import", rows, "--tag", "bread")
    return home
