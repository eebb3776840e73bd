"""The front door: its names, what it costs, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import agentpref

NAMES = {
    "AgentprefError",
    "Chat",
    "Comparison",
    "Evaluation",
    "Example",
    "Feedback",
    "Home",
    "Log",
    "Registry",
    "Router",
    "Run",
    "UpdateConfig",
    "UpdateReport",
    "adopt",
    "evaluate",
    "redact",
    "update",
}
HEAVY = [
    "torch",
    "transformers",
    "peft",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "sqlite_utils",
    "langchain_core",
    "rich",
    "typer",
]


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*[n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_are_these() -> None:
    assert set(agentpref.__all__) == NAMES
    assert set(dir(agentpref)) >= NAMES


def test_every_public_name_can_be_had() -> None:
    for name in NAMES:
        assert getattr(agentpref, name).__name__ == name
    with pytest.raises(AttributeError, match="'nothing'"):
        agentpref.nothing  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    assert loaded_after("import agentpref") == set()


@pytest.mark.guarantee("logging")
def test_logging_loads_nothing_heavy(tmp_path) -> None:
    statement = f"""
import agentpref
log = agentpref.Log({str(tmp_path / "home")!r})
run = log.record([{{"role": "user", "content": "Hello?"}}], "Hello.")
log.feedback(run, key="thumbs", score=1)
log.close()
"""
    assert loaded_after(statement) == set()


def test_every_public_name_can_be_named_without_torch() -> None:
    statement = f"import agentpref\n[getattr(agentpref, name) for name in {sorted(NAMES)}]"
    assert "torch" not in loaded_after(statement)


def test_the_command_line_needs_the_base_install_only(tmp_path) -> None:
    extras = [name for name in HEAVY if name not in {"rich", "typer", "sqlite_utils"}]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extras}))  # None there makes an import fail
from agentpref_cli.main import main
main()
"""
    for command in ("init", "stats", "pairs", "verify"):
        arguments = [sys.executable, "-c", code, command, "--home", str(tmp_path / "home")]
        subprocess.run(arguments, check=True, capture_output=True)
