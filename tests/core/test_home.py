"""A home is a folder with a database of ours; anything else is refused and left as it was."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from agentpref.errors import NotAHome
from agentpref.home import Home, replacing


def test_a_missing_folder_becomes_a_home(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "deep" / "home")
    assert home.database.is_file()
    assert home.adapters.is_dir()
    assert home.reports.is_dir()
    assert Home.open(home.path) == home


def test_an_empty_folder_and_a_home_may_be_created_again(tmp_path: Path) -> None:
    Home.create(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert Home.create(tmp_path) == Home(tmp_path)


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(NotAHome, match=r"has 'thesis.tex'.*choose an empty or a new folder"):
        Home.create(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_home(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for path in (file, file / "below"):
        with pytest.raises(NotAHome, match="choose a folder"):
            Home.create(path)
        with pytest.raises(NotAHome, match="agentpref init"):
            Home.open(path)
    assert file.read_text() == "text"


def test_opening_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotAHome, match=r"agentpref\.db"):
        Home.open(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_where_a_home_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    assert Home.resolve() == tmp_path / ".agentpref"
    monkeypatch.setenv("AGENTPREF_HOME", "elsewhere")
    assert Home.resolve() == tmp_path / "elsewhere"
    assert Home.resolve("named") == tmp_path / "named"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home.resolve("~/mine") == tmp_path / "mine"


def test_a_file_is_replaced_whole_when_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with replacing(file) as draft:
        draft.write_bytes(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_stays_as_it_was_when_the_block_raises(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with suppress(ZeroDivisionError), replacing(file) as draft:
        draft.write_bytes(b"half")
        raise ZeroDivisionError
    assert file.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
