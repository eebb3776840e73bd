"""The generated pages in the repository equal what `make docs` generates now."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from reference import pages

from agentpref.config import UpdateConfig
from agentpref.prove.evidence import OrdinaryEvidence, ScorerResult, UserCheckResult
from agentpref.prove.gate import judge
from agentpref_cli.main import app
from tests.core.prove.test_gate import LIVE, answering

PAGES = pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_committed_page_equals_the_generated_one(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], "run: make docs"


def test_every_command_table_and_setting_is_documented() -> None:
    text = {page.name: content for page, content in PAGES.items()}
    for command in app.registered_commands:
        assert f"## agentpref {command.name}\n" in text["cli.md"]
    for table in ("message", "run", "feedback", "comparison", "updates", "logp", "revision"):
        assert f"CREATE TABLE {table} (" in text["schema.md"]
    for name, value in UpdateConfig().to_mapping().items():
        for setting in (f"{name}.{key}" for key in value) if isinstance(value, dict) else (name,):
            assert f"| `{setting}` | " in text["updates.md"]
    assert (
        "| `gate.kl_budget` | `0.15` | a number above 0, or auto | KL from " in text["updates.md"]
    )


def test_every_check_of_the_gate_has_a_line_in_the_guide() -> None:
    own = UserCheckResult("mine", True), ScorerResult("mine", 0.0, 0.0, 9)
    ordinary = OrdinaryEvidence([0.0], LIVE, LIVE)
    more = {"user_checks": own[:1], "scorers": own[1:], "ordinary": ordinary, "liked": [0.0]}
    found = judge(replace(answering(), **more)).checks
    names = {re.sub(r"^(retention of|scorer|check) .*", r"\1 …", check.name) for check in found}
    guide = next(text for page, text in PAGES.items() if page.name == "updates.md")
    table = guide.partition("### Each check in a line\n")[2].partition("\nHalf of")[0]
    assert {*re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)} == names
