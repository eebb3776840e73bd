"""A user's pseudonym is stable under a key, unreadable without it, and found under every key."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

import agentpref
from agentpref.errors import CorruptHome, NotKept
from agentpref.home import Home
from agentpref.record.ingest.pseudonyms import Pseudonyms


@pytest.fixture
def other(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "other")


def test_a_user_has_the_same_name_in_every_process(home: Home) -> None:
    first = Pseudonyms.of(home)
    name = first.name("ada@example.org")
    assert Pseudonyms.of(home).name("ada@example.org") == name
    assert first.names("ada@example.org") == (name,)
    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")
    assert name != first.name("bob@example.org")


def test_another_home_gives_another_name(home: Home, other: Home) -> None:
    assert Pseudonyms.of(home).name("ada") != Pseudonyms.of(other).name("ada")


def test_homes_that_share_a_key_share_names(home: Home, other: Home) -> None:
    Pseudonyms.of(home)
    other.user_keys.write_bytes(home.user_keys.read_bytes())
    assert Pseudonyms.of(home).name("ada") == Pseudonyms.of(other).name("ada")


def test_the_key_file_is_private_and_not_in_the_database(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        log.record([{"role": "user", "content": "hello"}], "hello", user_id="ada@example.org")
    assert stat.S_IMODE(home.user_keys.stat().st_mode) == 0o600
    key = home.user_keys.read_text().strip()
    files = [path.read_bytes() for path in home.path.rglob("*") if path.is_file()]
    assert sum(key.encode() in content for content in files) == 1
    assert not any(bytes.fromhex(key) in content for content in files)
    assert not any(b"ada@example.org" in content for content in files)


def test_a_merged_home_finds_a_user_under_every_key(home: Home, other: Home) -> None:
    ours, theirs = Pseudonyms.of(home), Pseudonyms.of(other)
    together = ours.adopt(theirs, home)
    expected = (ours.name("ada"), theirs.name("ada"))
    assert together.names("ada") == Pseudonyms.of(home).names("ada") == expected
    assert together.name("ada") == ours.name("ada"), "what is written keeps the home's own name"
    assert stat.S_IMODE(home.user_keys.stat().st_mode) == 0o600


def test_adopting_twice_changes_nothing(home: Home, other: Home) -> None:
    theirs = Pseudonyms.of(other)
    Pseudonyms.of(home).adopt(theirs, home)
    before = home.user_keys.read_bytes()
    Pseudonyms.of(home).adopt(theirs, home)
    assert home.user_keys.read_bytes() == before


def test_an_unreadable_key_file_raises_not_kept(home: Home) -> None:
    home.user_keys.mkdir()
    with pytest.raises(NotKept, match=r"user\.keys is not a plain file"):
        Pseudonyms.of(home)


@pytest.mark.parametrize("content", ["", "zz", "abcd", "é" * 64, "00" * 31, "00" * 32 + " 00"])
def test_a_damaged_key_file_is_refused_and_stays(home: Home, content: str) -> None:
    """A new key in its place would make every user of the home a stranger."""
    home.user_keys.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptHome, match="restore it from a backup"):
        Pseudonyms.of(home)
    assert home.user_keys.read_text(encoding="utf-8") == content


MANY = """
import sys
from pathlib import Path
from agentpref.home import Home
from agentpref.record.ingest.pseudonyms import Pseudonyms
sys.stdin.readline()
print(Pseudonyms.of(Home(Path(sys.argv[1]))).name("ada"))
"""


def test_processes_that_start_at_once_agree_on_one_key(home: Home) -> None:
    arguments = [sys.executable, "-c", MANY, str(home.path)]
    started = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    names = {process.communicate("go\n")[0] for process in started}
    assert names == {Pseudonyms.of(home).name("ada") + "\n"}
    assert {path.name for path in home.path.glob(".user*")} == set(), "and no draft is left"
