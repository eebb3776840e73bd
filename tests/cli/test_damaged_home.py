"""Commands on a database with flipped bits end with our errors, whatever the bits were."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from agentpref import Log
from agentpref.errors import AgentprefError, CorruptHome
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref_cli.main import app

READING = (
    ["stats"], ["pairs", "--json"], ["export"], ["verify"], ["report"], ["adapters", "list"],
    ["export", "--format", "unpaired"],
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sound") / "home"
    with Log(home) as log:
        for number in range(12):
            asked = [{"role": "user", "content": f"Question {number % 4}?"}]
            yes = log.record(asked, f"Answer {number}: yes.", params={"n": number}, tags=["t"])
            no = log.record(asked, f"Answer {number}: no.", user_id=f"u{number % 3}")
            log.compare(yes, no, winner="a", user_id="u1")
            log.thumbs(yes, up=number % 2 == 0, comment="schön")
            log.correct(no, "A better answer.")
    connection = sqlite3.connect(home / "agentpref.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return home


@pytest.fixture
def home(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "home")


@pytest.mark.parametrize("seed", range(25))
def test_only_our_errors_come_out_of_flipped_bits(
    home: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    data = bytearray((home / "agentpref.db").read_bytes())
    for _ in range(rng.choice((1, 4, 16, 64))):
        where = rng.randrange(100) if rng.random() < 0.1 else rng.randrange(len(data))
        data[where] ^= 1 << rng.randrange(8)
    (home / "agentpref.db").write_bytes(data)
    for command in READING:
        with suppress(AgentprefError, SystemExit, typer.Exit):  # any other error fails the test
            app([*command, "--home", str(home)], standalone_mode=False)


@pytest.mark.parametrize(
    ("places", "version"),
    [((18, 19), 3), ((18, 19), 255), ((47,), 9)],
    ids=["a log of changes", "a log that nobody knows", "a schema"],
)
def test_an_unknown_format_of_the_file_is_a_corrupt_home(
    home: Path, places: tuple[int, ...], version: int
) -> None:
    data = bytearray((home / "agentpref.db").read_bytes())
    for place in places:
        data[place] = version
    (home / "agentpref.db").write_bytes(data)
    with pytest.raises(CorruptHome, match="restore a backup"):
        connect(Home(home)).close()


def test_a_table_whose_name_is_not_utf8_is_a_corrupt_home(home: Path) -> None:
    data = (home / "agentpref.db").read_bytes()
    assert b"CREATE TABLE feedback" in data
    broken = data.replace(b"CREATE TABLE feedback", b"CREATE TABLE feedb\xe3ck")
    (home / "agentpref.db").write_bytes(broken)
    with pytest.raises(CorruptHome, match="restore a backup"):
        connect(Home(home)).close()


def test_a_schema_that_is_not_utf8_is_a_corrupt_home(home: Path) -> None:
    """SQLite cannot even name it, so Python raises an error of its own."""
    data = (home / "agentpref.db").read_bytes()
    assert b"CREATE INDEX " in data
    (home / "agentpref.db").write_bytes(data.replace(b"CREATE INDEX ", b"CREATE IND\xe3X "))
    with pytest.raises(CorruptHome, match="a text in it is not UTF-8; restore a backup"):
        connect(Home(home)).close()


def test_a_text_that_is_not_utf8_is_a_corrupt_home_and_not_quoted(home: Path, run) -> None:
    data = (home / "agentpref.db").read_bytes()
    assert "schön".encode() in data
    (home / "agentpref.db").write_bytes(data.replace("schön".encode(), b"sch\xe3\xe3n"))
    line = run("export", "--home", home, exits=1).err
    assert "a text in it is not UTF-8; restore a backup" in line
    assert "sch" not in line


def test_a_row_that_is_not_json_is_a_corrupt_home(home: Path, run) -> None:
    connection = sqlite3.connect(home / "agentpref.db")
    connection.execute("UPDATE run SET params = '{no'")
    connection.commit()
    connection.close()
    line = run("export", "--home", home, exits=1).err
    assert "a text in it is not JSON; restore a backup" in line
