"""Each file of a home, damaged in each way: it does no harm, or somebody says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tampering import DAMAGE, DOORS, MORE, Made, held, made, told, tried

LOST = r"HOME/agentpref\.db is (missing|empty), but user\.keys is there: .* restore a backup"
CORRUPT = r"HOME/agentpref\.db: .*; restore a backup of the home"
CHMOD = r"belongs to root, and this is user 61061: run this as root, or .* \(chown or chmod\)"
EDITED = r"HOME/adapters/rev-\S+/{} is not the file that was published .*restore it from a backup"
UNREADABLE = r"HOME/adapters/rev-\S+/{} cannot be read \(Permission denied\); let this user read it"
KEYS = r"user\.keys.*restore it from a backup"
UNSEEN = (
    r"as recorded: .*\n.*not checked: .*what was in an agentpref\.db-wal, spill\.jsonl or refused"
)

ALL = "verify doctor stats list log router promote rollback backup forget"
NOBODY = "nobody"
"""Says anything: the damage does no harm, and every door says what it says of a sound home."""

# The file, the damage, who says what of it; whoever else is asked may say it too.
MATRIX = [
    ("agentpref.db", "edited", "verify", r"message\t\w+\tits text is not what was recorded"),
    ("agentpref.db", "truncated", ALL, CORRUPT),
    ("agentpref.db", "emptied", ALL, LOST),
    ("agentpref.db", "swapped", "verify doctor log forget", KEYS),
    ("agentpref.db", "swapped", "router", r"InvalidAdapter: HOME/adapters/rev-\S+ is missing"),
    ("agentpref.db", "missing", ALL, LOST),
    ("agentpref.db", "foreign", ALL, rf"HOME/agentpref\.db: unable to open .*{CHMOD}"),
    # SQLite reads a log up to the first change that is not whole. What comes after it is gone, and
    # nothing else in the home tells of it: the rest is whole, and `verify` says what it cannot see.
    ("agentpref.db-wal", "edited", "verify", UNSEEN),
    ("agentpref.db-wal", "truncated", "verify", UNSEEN),
    ("agentpref.db-wal", "emptied", "verify", UNSEEN),
    ("agentpref.db-wal", "swapped", "verify", r"its rows are not (those|as)|malformed"),
    ("agentpref.db-wal", "missing", "verify", UNSEEN),
    ("agentpref.db-wal", "foreign", ALL, rf"HOME/agentpref\.db-wal: .*{CHMOD}"),
    ("agentpref.db-shm", "edited", NOBODY, ""),
    ("agentpref.db-shm", "truncated", NOBODY, ""),
    ("agentpref.db-shm", "emptied", NOBODY, ""),
    ("agentpref.db-shm", "swapped", NOBODY, ""),
    ("agentpref.db-shm", "missing", NOBODY, ""),
    ("agentpref.db-shm", "foreign", ALL, rf"HOME/agentpref\.db-shm: .*{CHMOD}"),
    ("user.keys", "edited", "verify doctor log backup forget", rf"(?s){KEYS}"),
    ("user.keys", "truncated", "verify doctor log backup forget", KEYS),
    ("user.keys", "emptied", "verify doctor log backup forget", KEYS),
    ("user.keys", "swapped", "verify doctor log backup forget", KEYS),
    ("user.keys", "missing", "verify doctor log backup forget", KEYS),
    ("user.keys", "foreign", "verify doctor log backup forget", rf"HOME/user\.keys.*{CHMOD}"),
    ("spill.jsonl", "edited", "verify", r"spill\tline \d\tit is not what was written"),
    ("spill.jsonl", "edited", "doctor", r"spill\tno\t.* are not what was written"),
    ("spill.jsonl", "edited", "log", r"not whole: .*somebody edited .*kept in HOME/refused\.jsonl"),
    ("spill.jsonl", "truncated", "verify", r"cut off in the spill, by a crash .* or by hand: 1"),
    ("spill.jsonl", "truncated", "log", r"not whole: .*somebody edited .*HOME/refused\.jsonl"),
    ("spill.jsonl", "emptied", "verify", UNSEEN),
    ("spill.jsonl", "swapped", "log", r"name a run that is not here.* kept in HOME/refused\.jsonl"),
    ("spill.jsonl", "missing", "verify", UNSEEN),
    ("spill.jsonl", "foreign", "verify doctor log backup forget", rf"HOME/spill\.jsonl.*{CHMOD}"),
    ("refused.jsonl", "edited", "doctor", r"refused\tno\t.* look at HOME/refused\.jsonl"),
    ("refused.jsonl", "truncated", "doctor", r"refused\tno\t.* look at HOME/refused\.jsonl"),
    ("refused.jsonl", "emptied", "verify", UNSEEN),
    ("refused.jsonl", "swapped", "doctor", r"refused\tno\t.* look at HOME/refused\.jsonl"),
    ("refused.jsonl", "missing", "verify", UNSEEN),
    ("refused.jsonl", "foreign", "doctor backup forget", rf"HOME/refused\.jsonl.*{CHMOD}"),
    *((lock, damage, NOBODY, "") for lock in ("spill.lock", "update.lock", "merge.lock")
      for damage in DAMAGE if damage != "foreign"),
    ("spill.lock", "foreign", "log backup forget", rf"HOME/spill\.lock cannot be locked .*{CHMOD}"),
    ("update.lock", "foreign", "forget resume", rf"HOME/update\.lock cannot be locked .*{CHMOD}"),
    ("merge.lock", "foreign", "doctor", rf"files\tno\t.* write merge\.lock; .*{CHMOD}"),
    *((f"live/{file}", damage, "verify doctor router update", EDITED.format(re.escape(file)))
      for file in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
      for damage in DAMAGE if damage != "foreign"),
    *((f"live/{file}", "foreign", "verify doctor router update", UNREADABLE.format(re.escape(file)))
      for file in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")),
    ("live/adapter_model.safetensors", "edited", "backup", r"not what was published: rev-000002-"),
    ("canary/adapter_model.safetensors", "edited", "promote", EDITED.format("adapter_model.*")),
    ("canary/adapter_model.safetensors", "edited", "router", r"canary of 'default' cannot be made"),
    ("previous/adapter_model.safetensors", "edited", "rollback", r"passed over, and in quarantine"),
    ("live/", "swapped", "verify doctor router update", EDITED.format("manifest.json")),
    ("live/", "missing", "verify doctor router update", r"HOME/adapters/rev-\S+ is missing"),
    ("live/", "missing", "backup", r"not copied: rev-000002-"),
    ("live/", "foreign", "verify doctor router update backup", r"adapters/rev-000002.*denied"),
    ("adapters", "swapped", "verify doctor router update", r"HOME/adapters/rev-\S+ is missing"),
    ("adapters", "missing", "verify doctor router update", r"HOME/adapters/rev-\S+ is missing"),
    ("adapters", "foreign", "verify doctor router update backup", r"HOME/adapters\S*.* denied"),
    # A pin says where a revision may be loaded. A router there writes its pins anew.
    ("holds/*", "edited", "doctor", r"pins\tyes\t2 revisions were loaded by processes that"),
    ("holds/*", "truncated", "doctor", r"pins\tyes\t2 revisions were loaded by processes that"),
    ("holds/*", "emptied", "doctor", r"pins\tyes\t2 revisions .* at an unnamed place"),
    ("holds/*", "swapped", NOBODY, ""),
    ("holds/*", "missing", "doctor", r"pins\tyes\t1 revisions were loaded"),
    ("holds/*", "foreign", "doctor router prune", rf"HOME/holds/rev-\S+ .*{CHMOD}"),
    ("holds", "missing", "router", r"^rev-000002-\S+ rev"),
    ("holds", "foreign", "doctor router prune", rf"HOME/holds\S* .*{CHMOD}"),
    ("training/*", "edited", "resume", r"training was discarded: it is damaged"),
    ("training/*", "truncated", "doctor", r"training\tno\t.*cannot be resumed: it is damaged"),
    ("training/*", "truncated", "resume", r"training was discarded: it is damaged"),
    ("training/*", "emptied", "doctor", r"training\tno\t.*cannot be resumed: it is damaged"),
    ("training/*", "emptied", "resume", r"training was discarded: it is damaged"),
    ("training/*", "swapped", "resume", r"training was discarded: its config is not that of"),
    ("training/*", "missing", "resume", r"nothing new"),  # the update starts over
    ("training/*", "foreign", "doctor", r"training\tno\t.*cannot be resumed: it cannot be read"),
    ("training/*", "foreign", "resume", r"training was discarded: it cannot be read"),
    ("training", "missing", "resume", r"nothing new"),
    ("training", "foreign", "resume forget", rf"HOME/training cannot be (used|written) .*{CHMOD}"),
    ("reports", "missing", NOBODY, ""),
]  # fmt: skip

CASES = {(file, damage) for file, damage, _, _ in MATRIX}


@pytest.fixture(scope="module")
def homes() -> Iterator[tuple[Made, Made]]:
    """A home and another one, in a folder that a stranger may write."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.chmod(folder, 0o777)
        home, other = made(Path(folder, "home"), 1), made(Path(folder, "other"), 2)
        warm = Path(folder, "warm")
        for door in (DOORS | MORE).values():  # a stranger may not read what is imported late
            shutil.copytree(home.path, warm)
            tried(door, warm, home)
            shutil.rmtree(warm)
        yield home, other


@pytest.fixture(scope="module")
def sound(homes: tuple[Made, Made]) -> dict[str, str]:
    """What each door says of the home as it was made."""
    return told(*homes, "", "")


def test_the_home_holds_all_that_was_acknowledged(homes: tuple[Made, Made]) -> None:
    home = homes[0]
    with TemporaryDirectory(dir=home.path.parent) as folder:
        copy = shutil.copytree(home.path, Path(folder, "home"))
        assert {*home.acknowledged} <= held(copy)


def test_every_file_of_the_home_is_in_the_matrix(homes: tuple[Made, Made]) -> None:
    home = homes[0]
    named = {home.find(file).parts for file, _ in CASES}
    for path in home.path.rglob("*"):
        parts = path.relative_to(home.path).parts
        others = parts[0] in ("adapters", "holds")  # of each kind, one is enough
        assert parts in named or others, path


@pytest.mark.parametrize(
    ("file", "damage"), sorted(CASES), ids=[f"{file}-{damage}" for file, damage in sorted(CASES)]
)
def test_a_damaged_file_does_no_harm_or_is_named(
    homes: tuple[Made, Made], sound: dict[str, str], file: str, damage: str
) -> None:
    if damage == "foreign" and os.getuid() != 0:
        pytest.skip("only root can give a file to another user")
    rows = [(who.split(), word) for *case, who, word in MATRIX if case == [file, damage]]
    expected = {door: word for doors, word in rows for door in doors}
    said = told(*homes, file, damage, more=MORE.keys() & expected.keys())
    for door, words in said.items():
        assert "TROUBLE" not in words, words
        assert "Traceback" not in words, f"{door}: {words}"
    if expected.keys() == {NOBODY}:
        assert said == sound
    else:
        for door, word in expected.items():
            assert re.search(word, said[door]), f"{door}: {said[door]}"
