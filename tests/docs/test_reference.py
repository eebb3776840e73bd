"""The generated pages are those that `make docs` would write now."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from reference import pages

from agentpref.config import UpdateConfig
from agentpref_cli.main import app

PAGES = pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_as_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], "run: make docs"


def test_nothing_is_missing() -> None:
    text = {page.name: content for page, content in PAGES.items()}
    for command in app.registered_commands:
        assert f"## agentpref {command.name}\n" in text["cli.md"]
    for table in ("message", "run", "feedback", "comparison", "updates", "logp", "revision"):
        assert f"CREATE TABLE {table} (" in text["schema.md"]
    for field in fields(UpdateConfig):
        assert f"| `{field.name}" in text["updates.md"]
    assert "| `gate.kl_budget` | `0.15` | above 0 |" in text["updates.md"]
