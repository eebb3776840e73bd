"""What is wrong with another home is said of it, in the words that its own trouble has."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from agentpref.errors import AgentprefError, CorruptHome, NotKept
from agentpref.home import Home
from agentpref.record.transfer import foreign


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("database is locked", NotKept),
        ("database disk image is malformed", CorruptHome),
        ("table forgotten already exists", CorruptHome),
    ],
)
def test_trouble_of_another_home_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[AgentprefError]
) -> None:
    def troubled(home: Home, *, readonly: bool) -> sqlite3.Connection:
        raise sqlite3.OperationalError(words)

    home = Home.create(tmp_path / "other")
    monkeypatch.setattr(foreign, "connect", troubled)
    with pytest.raises(kind, match=f"other/agentpref.db.*{words}"), foreign.opened(home):
        pass


def test_text_that_is_no_utf_8_comes_as_bytes(tmp_path: Path) -> None:
    with foreign.opened(Home.create(tmp_path / "other")) as other:
        assert other.read("SELECT CAST(x'ff' AS TEXT), 'text', 1, NULL") == [
            (b"\xff", "text", 1, None)
        ]


def test_nothing_is_written(tmp_path: Path) -> None:
    with (
        foreign.opened(Home.create(tmp_path / "other")) as other,
        pytest.raises(NotKept, match="readonly"),
    ):
        other.read("DELETE FROM run")
