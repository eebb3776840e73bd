"""A home whose user keys are lost makes no second key: it says so, and goes on logging."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget, forget_unnamed
from agentpref.record.ingest.pseudonyms import UNNAMED, Pseudonyms
from agentpref.record.keys import KeysLost, keys_problem
from agentpref.record.log import Log
from agentpref.record.transfer.backup import backup
from agentpref.record.transfer.merge import merge
from agentpref.types import Run

RunsIn: TypeAlias = "Callable[[Home], list[Run]]"

ASKED = [{"role": "user", "content": "2 + 2?"}]


@pytest.fixture
def busy(home: Home) -> Home:
    """A home where Ana said something."""
    with Log(home.path) as log:
        log.thumbs(log.record(ASKED, "4", user_id="ana"), up=True, user_id="ana")
    return home


def fingerprints(home: Home) -> set[str]:
    with closing(connect(home)) as connection:
        return {name for (name,) in connection.execute("SELECT fingerprint FROM user_key")}


def problem(home: Home) -> str | None:
    with closing(connect(home, readonly=True)) as connection:
        return keys_problem(connection)


def lose(home: Home, how: str) -> None:
    home.user_keys.unlink()
    if how == "another":
        home.user_keys.write_text("ab" * 32 + "\n", encoding="ascii")


@pytest.mark.guarantee("record")
@pytest.mark.parametrize("how", ["missing", "another"])
def test_a_home_that_lost_its_keys_goes_on_logging_and_forgets_nobody(
    busy: Home, how: str, runs_in: RunsIn, caplog: pytest.LogCaptureFixture
) -> None:
    keys = busy.user_keys.read_bytes()
    lose(busy, how)
    with caplog.at_level(logging.WARNING, "agentpref"), Log(busy.path) as log:
        run = log.record(ASKED, "5", user_id="ana")
        log.thumbs(run, up=True, user_id="ana")
        assert log.altered == {"user": 2}
        assert log.dropped == {}
        assert [each.table for each in log.verify()] == ["user.keys"]
        with pytest.raises(KeysLost, match="restore it from a backup of the home"):
            log.forget("ana")
    assert "user.keys" in caplog.text
    assert f"Until then, all users are logged as {UNNAMED!r}" in caplog.text
    assert busy.user_keys.exists() == (how == "another"), "no key is made"
    assert runs_in(busy)[1].user_id == UNNAMED
    busy.user_keys.write_bytes(keys)
    assert problem(busy) is None
    assert forget(busy, "ana").runs == 1
    assert forget(busy, UNNAMED).runs == 0, "no user of the app has that name"
    assert forget_unnamed(busy).runs == 1
    assert runs_in(busy) == []


def test_an_old_home_with_its_keys_gets_their_fingerprints(busy: Home) -> None:
    known = fingerprints(busy)
    assert len(known) == 1
    with closing(connect(busy)) as connection:
        connection.execute("DELETE FROM user_key")
    Log(busy.path).close()
    assert fingerprints(busy) == known == set(Pseudonyms.of(busy).fingerprints())


def test_an_old_home_that_lost_its_keys_before_makes_none(busy: Home) -> None:
    with closing(connect(busy)) as connection:
        connection.execute("DELETE FROM user_key")
    busy.user_keys.unlink()
    Log(busy.path).close()
    assert not busy.user_keys.exists()
    assert problem(busy) is not None


def test_a_home_without_users_takes_another_key(home: Home) -> None:
    with Log(home.path) as log:
        log.record(ASKED, "4")
    lose(home, "another")
    with Log(home.path) as log:
        log.record(ASKED, "4", user_id="ana")
        assert log.altered == {}
    assert fingerprints(home) == set(Pseudonyms.of(home).fingerprints())
    assert problem(home) is None


def test_a_fingerprint_is_neither_the_key_nor_the_name_of_a_user(busy: Home) -> None:
    (known,) = fingerprints(busy)
    assert known not in busy.user_keys.read_text(encoding="ascii")
    assert known != Pseudonyms.of(busy).name("ana")


def test_a_merged_home_knows_the_keys_of_both_and_forgets_with_both_only(
    busy: Home, tmp_path: Path, runs_in: RunsIn
) -> None:
    other = Home.create(tmp_path / "other")
    with Log(other.path) as log:
        log.record(ASKED, "6", user_id="ana")
    merge(busy, [other])
    assert fingerprints(busy) == set(Pseudonyms.of(busy).fingerprints())
    both = busy.user_keys.read_text(encoding="ascii")
    busy.user_keys.write_text(both.splitlines()[0] + "\n", encoding="ascii")
    with Log(busy.path) as log:
        log.record(ASKED, "7", user_id="ana")
        assert log.altered == {}, "its own key is there"
    with pytest.raises(KeysLost, match="lacks 1 of the keys"):
        forget(busy, "ana")
    busy.user_keys.write_text(both, encoding="ascii")
    assert forget(busy, "ana").runs == 3
    assert runs_in(busy) == []


def test_a_backup_has_the_fingerprints_and_the_keys(busy: Home, tmp_path: Path) -> None:
    copy = Home(Path(backup(busy, tmp_path / "copy").path))
    assert fingerprints(copy) == fingerprints(busy)
    assert problem(copy) is None
    copy.user_keys.unlink()
    assert "no user can be forgotten" in str(problem(copy))
