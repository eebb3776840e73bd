"""A home is a folder with a database of ours; anything else is refused and left as it was."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest

from agentpref import Log, Registry
from agentpref import home as home_module
from agentpref.errors import CorruptHome, NotAHome
from agentpref.home import Home, replacing, tighten, writing
from agentpref.record.database import connect


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


def test_a_home_that_another_process_makes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made after this process found no database, and before it looks around."""
    path, look = tmp_path / "home", home_module.enclosing_home

    def late(place: Path) -> Path | None:
        monkeypatch.undo()
        Home.create(path)
        return look(place)

    monkeypatch.setattr(home_module, "enclosing_home", late)
    assert Home.create(path) == Home.open(path)
    with pytest.raises(NotAHome, match="inside the home"):
        Home.create(path / "inside")


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


def used(folder: Path) -> Home:
    with Log(folder) as log:
        log.record([{"role": "user", "content": "Hello"}], "Hi", user_id="ana")
    return Home(folder)


@pytest.mark.parametrize("left", ["missing", "empty"])
def test_a_home_that_lost_its_database_says_so_and_makes_no_new_one(
    tmp_path: Path, left: str
) -> None:
    home = used(tmp_path / "home")
    home.database.unlink()
    if left == "empty":
        home.database.touch()
    before = sorted(tmp_path.rglob("*"))
    for opened in (Log, Registry, connect):
        with pytest.raises(CorruptHome, match=rf"agentpref.db is {left}, but user.keys .* restore"):
            opened(home if opened is connect else home.path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_database_without_tables_beside_other_files_of_a_home_is_a_lost_one(
    tmp_path: Path,
) -> None:
    home = used(tmp_path / "home")
    home.database.unlink()
    with closing(sqlite3.connect(home.database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert home.database.stat().st_size > 0
    with pytest.raises(CorruptHome, match=r"has no tables, but user\.keys is there"):
        Log(home.path)


def test_a_key_that_was_copied_before_the_first_log_is_no_lost_home(tmp_path: Path) -> None:
    other = used(tmp_path / "other")
    (tmp_path / "new").mkdir()
    shutil.copy(other.user_keys, tmp_path / "new")
    with pytest.raises(NotAHome, match=r"has 'user.keys' and no agentpref\.db"):
        Log(tmp_path / "new")


def test_an_error_that_the_app_raises_in_a_signal_handler_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object, **__: object) -> None:
        raise TimeoutError("the app's own")

    with pytest.raises(TimeoutError, match="the app's own"), writing(tmp_path):
        late()
    monkeypatch.setattr(Path, "mkdir", late)
    with pytest.raises(TimeoutError, match="the app's own"):
        Home.create(tmp_path / "home")
    monkeypatch.undo()
    home = used(tmp_path / "home")
    monkeypatch.setattr(os, "lstat", late)
    with pytest.raises(TimeoutError, match="the app's own"):
        tighten(home.database)
