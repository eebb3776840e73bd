"""Forgetting reaches copies, drafts, twins, ids of all types, and what waits by another clock."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import agentpref
from agentpref.errors import (
    ConfigError,
    ForgottenRun,
    InvalidFeedback,
    InvalidMessage,
    UnknownRun,
    UpdateRunning,
)
from agentpref.home import Home
from agentpref.record import ingest as ingest_module
from agentpref.record.database import connect
from agentpref.record.deletion.forget import forget, forget_unnamed
from agentpref.record.ingest.pseudonyms import UNNAMED, Pseudonyms
from agentpref.record.store import Store
from agentpref.record.transfer.merge import merge
from agentpref.record.updates import UpdateRow, Updates
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

SECRET = "adas-secret"
ASKED = [{"role": "user", "content": "2 + 2?"}]


def holding(folder: Path, text: str = SECRET) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.name for path in files if text.encode() in path.read_bytes()]


# Copies


@pytest.mark.guarantee("privacy", "a draft of each file of a home, by a process that was killed")
@pytest.mark.parametrize("name", ["refused.jsonl", "user.keys", "spill.jsonl", "agentpref.db"])
def test_a_draft_that_a_killed_process_left_in_a_home_is_removed_when_somebody_is_forgotten(
    home: Home, name: str
) -> None:
    """It was made for another user, and the file may be gone since."""
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from agentpref.home import replacing
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        with replacing(Path(sys.argv[1])) as draft:
            draft.write_text(sys.argv[2])
    """
    command = [sys.executable, "-c", code, str(home.path / name), SECRET]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert holding(home.path)
    forget(home, "bob")
    assert holding(home.path) == []


@pytest.mark.guarantee("privacy", "a merge that is stopped in its copy of 300 runs, then killed")
def test_nobody_is_forgotten_while_a_merge_holds_a_copy(home: Home, tmp_path: Path) -> None:
    """Homes of two hosts share their keys. A merge that began before would bring the texts in."""
    other = Home.create(tmp_path / "other")
    for each in (home, other):
        connect(each).close()
    keys = Pseudonyms.of(home)
    shutil.copy(home.user_keys, other.user_keys)
    with agentpref.Log(other.path) as log:
        for n in range(300):
            log.record([{"role": "user", "content": f"{SECRET} {n}"}], "yes", user_id="ada")
    code = """if True:
        import os, signal, sys
        from agentpref.record.transfer.merge import merge
        def told(stage, done, total):
            if "verify" in stage:
                os.kill(os.getpid(), signal.SIGSTOP)
        merge(sys.argv[1], [sys.argv[2]], progress=told)
    """
    process = subprocess.Popen([sys.executable, "-c", code, str(home.path), str(other.path)])
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert holding(home.path)
        with pytest.raises(UpdateRunning, match=r"another merge .* is running; wait for it to end"):
            forget(home, "ada")
    finally:
        process.kill()
        process.wait()
    forget(home, "ada")
    assert holding(home.path) == []
    (merged,) = merge(home, [other])
    assert (merged.runs.added, merged.runs.forgotten) == (0, 300)
    assert holding(home.path) == []
    assert keys.name("ada") == Pseudonyms.of(home).name("ada")


PUBLISH = """
import os, signal, sys
from pathlib import Path
from agentpref.serve import publishing
from agentpref.serve.registry import Registry
home, adapter, where = sys.argv[1:]
def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "before its name":
    publishing.insert.__globals__["clear_adapters"] = die
else:
    publishing.insert.__globals__["sealed"] = die
Registry(home).publish(Path(adapter), parent=None, model={}, training={})
"""


@pytest.mark.guarantee("privacy", "a publisher that was killed before and after it named a folder")
@pytest.mark.parametrize("where", ["before its name", "before its row"])
def test_weights_that_a_killed_publisher_left_are_removed_when_somebody_is_forgotten(
    home: Home, tmp_path: Path, where: str
) -> None:
    """Nobody can tell whose text they have seen: no ledger knows them."""
    connect(home).close()
    adapter = write_adapter(tmp_path / "adapter")
    kept = Registry(home).publish(adapter, parent=None, model={}, training={})
    command = [sys.executable, "-c", PUBLISH, str(home.path), str(adapter), where]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(home.adapters.iterdir())) == 2
    forget(home, "ada")
    assert [folder.name for folder in home.adapters.iterdir()] == [kept.revision_id]


# What others say of what is gone


@pytest.mark.guarantee("privacy", "feedback, a correction and a comparison, while the disk is busy")
def test_what_others_say_later_of_a_forgotten_run_is_not_kept(home: Home) -> None:
    """The database is locked, so they go to the spill, and nobody can say that the run is gone."""
    with agentpref.Log(home.path) as log:
        hers = log.record(ASKED, SECRET, user_id="ada")
        his = log.record(ASKED, "4", user_id="bob")
        log.flush()
        waits = log.record(ASKED, SECRET, user_id="ada")
        forget(home, "ada")
        with closing(connect(home)) as other:
            other.execute("BEGIN IMMEDIATE")
            log.correct(hers, f"{SECRET} is wrong", user_id="staff")
            log.feedback(waits, key="note", value={"said": SECRET}, user_id="staff")
            log.compare(hers, his, winner="b", comment=f"{SECRET} is worse", user_id="staff")
            log.feedback("elsewhere", key="note", value="of another home")
            other.execute("ROLLBACK")
    with agentpref.Log(home.path) as log:
        log.thumbs(his, up=True)
        assert log.verify() == []
    assert holding(home.path) == []
    assert holding(home.path, "of another home") == ["refused.jsonl"], "its run may be elsewhere"


def test_a_judgement_of_a_forgotten_run_is_refused_as_of_an_unknown_one(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        hers = log.record(ASKED, SECRET, user_id="ada")
        forget(home, "ada")
        with pytest.raises(UnknownRun, match="it or its user was forgotten") as refused:
            log.thumbs(hers, up=True)
        assert isinstance(refused.value, ForgottenRun)
        assert log.record(ASKED, "again", run_id=hers, user_id="ada") == hers
        assert log.thumbs(hers, up=True), "the app may use the id again"


# Twins


def learned(home: Home, adapter: Path, source: str) -> str:
    """Publish an adapter as what an update made of a judgement."""
    made = Registry(home).publish(adapter, parent=None, model={}, training={}).revision_id
    update = UpdateRow(
        f"u-{made}", "default", 1.0, 2.0, None, made, "promoted", {}, {"p": "new"}, {"p": (source,)}
    )
    with closing(connect(home)) as connection:
        Updates(connection).add(update)
    return made


def written_anew(adapter: Path, folder: Path) -> Path:
    """The same tensors in another file."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"note": folder.name})
    assert file.read_bytes() != (adapter / file.name).read_bytes()
    return folder


@pytest.mark.guarantee("privacy", "the same tensors under other metadata, before and after")
@pytest.mark.parametrize("version", ["new", "old", "old, pruned and copied"])
def test_the_same_tensors_in_another_file_are_tainted_too(
    home: Home, tmp_path: Path, version: str
) -> None:
    with agentpref.Log(home.path) as log:
        hers = log.thumbs(log.record(ASKED, SECRET, user_id="ada"), up=True)
    adapter = write_adapter(tmp_path / "adapter")
    made, registry = learned(home, adapter, hers), Registry(home)
    anew = written_anew(adapter, tmp_path / "anew")
    twin = registry.publish(anew, parent=None, model={}, training={}).revision_id
    child = registry.publish(
        write_adapter(tmp_path / "child", seed=1), parent=twin, model={}, training={}
    ).revision_id
    another = registry.publish(
        write_adapter(tmp_path / "other", seed=2), parent=None, model={}, training={}
    ).revision_id
    if version != "new":
        with closing(connect(home)) as connection:
            connection.execute("UPDATE revision SET manifest = json_remove(manifest, '$.tensors')")
    if version.endswith("copied"):
        copy = registry.publish(adapter, parent=None, model={}, training={}).revision_id
        shutil.rmtree(registry.get(made).path)
        assert forget(home, "ada").revisions == (made, twin, child, copy)
    else:
        assert forget(home, "ada").revisions == (made, twin, child)
    later = registry.publish(
        written_anew(anew, tmp_path / "later"), parent=None, model={}, training={}
    )
    assert later.tainted_at is not None, "published after the forgetting"
    assert registry.get(another).tainted_at is None


# Ids


class Name(str, Enum):
    """An id as some apps have it."""

    ADA = "ada"


class Number(IntEnum):
    """Another one."""

    SEVEN = 7


class Text(str):
    """A text that says something else of itself."""

    def __str__(self) -> str:
        return "eve"

    __repr__ = __str__


UUIDS = UUID("12345678-1234-5678-1234-567812345678")
IDS = st.one_of(
    st.text(max_size=8),
    st.text(max_size=8).map(Text),
    st.text(max_size=8).map(np.str_),
    st.integers(-(2**70), 2**70),
    st.integers(0, 255).map(np.uint8),
    st.integers(-(2**31), 2**31).map(np.int64),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32),
    st.decimals(allow_nan=False, allow_infinity=False, places=2),
    st.integers(0, 10**30).map(Decimal),
    st.uuids(),
    st.booleans(),
    st.sampled_from([Name.ADA, Number.SEVEN, UUIDS, "\ud83d\ude00", UNNAMED, "", " "]),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[agentpref.Log]:
    with agentpref.Log(tmp_path_factory.mktemp("ids") / "home") as log:
        yield log


@pytest.mark.guarantee("privacy", "40 ids of 13 types: text, numbers of numpy, decimals, enums, …")
@given(user=IDS)
@settings(max_examples=40)
def test_a_user_has_one_name_in_every_call_by_each_type_of_id_that_is_taken(
    user: Any, shared: agentpref.Log
) -> None:
    log = shared
    theirs = log.record(ASKED, "c")
    runs = [log.record(ASKED, text, user_id=user) for text in "ab"]
    log.thumbs(runs[0], up=True, user_id=user)
    log.feedback(theirs, key="k", value=1, user_id=user)
    log.correct(theirs, "d", user_id=user)
    log.compare(*runs, winner="a", user_id=user)
    log.retract(theirs, "k", user_id=user)
    with closing(connect(log.home, readonly=True)) as connection:
        store = Store(connection)
        rows = [*store.runs("default"), *store.feedback("default"), *store.comparisons("default")]
    assert len({row.user_id for row in rows} - {None}) == 1
    assert (log.dropped, log.altered) == ({}, {})
    removed = log.forget(user)
    assert (removed.runs, removed.feedback, removed.comparisons) == (2, 4, 1)


@pytest.mark.parametrize(
    "user",
    [
        datetime(2026, 11, 29),
        ("ada", 1),
        b"ada",
        float("nan"),
        Decimal("Infinity"),
        Decimal("sNaN"),
        np.array([1, 2]),
        object(),
        "ada\ud800",
    ],
)
def test_what_is_no_id_is_refused_by_every_call_that_raises(home: Home, user: Any) -> None:
    with agentpref.Log(home.path) as log, agentpref.Log(home.path, strict=True) as strict:
        run = log.record(ASKED, "a", user_id=user)
        log.flush()
        assert log.altered, "it is said that the run has no such user"
        with pytest.raises(InvalidMessage):
            strict.record(ASKED, "b", user_id=user)
        with pytest.raises(InvalidFeedback, match="user_id is"):
            log.thumbs(run, up=True, user_id=user)
        with pytest.raises(InvalidFeedback, match="user_id is"):
            log.retract(run, user_id=user)
        with pytest.raises(ConfigError, match=r"user_id (is|has) .*pass"):
            log.forget(user)


def test_half_a_character_is_forgotten_by_the_id_that_record_made_of_it(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        log.record(ASKED, SECRET, user_id="ada\ud800")
    assert forget(home, "ada\ufffd").runs == 1


@pytest.mark.guarantee("privacy")
def test_a_user_who_is_called_like_the_unnamed_is_nobody_else(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        log.record(ASKED, "hers", user_id="ada")
    keys = home.user_keys.read_bytes()
    home.user_keys.unlink()
    with agentpref.Log(home.path) as log:
        log.record(ASKED, "of somebody", user_id="bob")
    home.user_keys.write_bytes(keys)
    with agentpref.Log(home.path) as log:
        log.record(ASKED, "of a joker", user_id=UNNAMED)
    assert forget(home, UNNAMED).runs == 1
    assert holding(home.path, "of a joker") == []
    assert forget_unnamed(home, dry_run=True).runs == 1
    assert holding(home.path, "of somebody")
    assert forget_unnamed(home).runs == 1
    assert holding(home.path, "of somebody") == []
    assert holding(home.path, "hers")


# Clocks


@pytest.mark.guarantee("privacy", "a clock that was an hour ahead")
def test_a_run_that_waited_while_the_clock_was_set_back_is_not_younger_than_the_forgetting(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in a process while another one forgets its user."""
    ahead = 3600.0

    class Clock:
        """The clock of the machine, for both."""

        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def time() -> float:
            return time.time() + ahead

        @staticmethod
        def time_ns() -> int:
            return time.time_ns() + int(ahead * 1e9)

    from agentpref.record import log as log_module

    monkeypatch.setattr(log_module, "time", Clock)
    monkeypatch.setattr(ingest_module, "time", Clock)
    with agentpref.Log(home.path) as log:
        log.record(ASKED, "first", user_id="ada")
        log.flush()
        log._writer._writing.acquire()  # the thread that writes waits, as for a busy disk
        log.record(ASKED, SECRET, user_id="ada")
        ahead = 0.0
        forget(home, "ada")
        log._writer._writing.release()
        log.flush()
        assert log.dropped == {"ForgottenUser": 1}
    assert holding(home.path) == []
