"""A home of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentpref.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")
