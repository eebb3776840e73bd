"""A merge adds each new row of another home once, and nothing of a home that fails verification."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from filelock import FileLock

from agentpref.errors import (
    ConfigError,
    CorruptHome,
    NewerHome,
    NotAHome,
    NotKept,
    UpdateRunning,
)
from agentpref.home import Home
from agentpref.record import database
from agentpref.record.database import connect, exclusive, transaction
from agentpref.record.deletion.forget import adopt
from agentpref.record.deletion.forget import forget as delete_user
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import node_id, prompt_of, run_row
from agentpref.record.migrations import STEPS
from agentpref.record.seals import SEALED, seal
from agentpref.record.spill import Spill, drain
from agentpref.record.store import Store
from agentpref.record.sums import checksum, resum
from agentpref.record.transfer import merge as module
from agentpref.record.transfer.merge import Counts, Merged, merge
from agentpref.types import Comparison, Feedback, Run
from tests.core.record.rows import add

Said = Run | Feedback | Comparison
Make = Callable[..., Home]
ASK = {"role": "user", "content": "Is it raining?"}


def text(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def run(run_id: str, content: str = "Yes.", turns: Iterable[Any] = (ASK,), **more: Any) -> Run:
    fields = {"namespace": "default", "created_at": 10.0, **more}
    return Run(run_id, prompt=prompt_of([*turns]), output=text(content), **fields)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with its schema and keys, to be copied: the homes of these tests share their keys."""
    home = Home.create(tmp_path_factory.mktemp("blank") / "home")
    connect(home).close()
    Pseudonyms.of(home)
    return home.path


@pytest.fixture
def make(tmp_path: Path, blank: Path) -> Make:
    def make(name: str, *said: Said) -> Home:
        return filled(Path(shutil.copytree(blank, tmp_path / name)), *said)

    return make


def filled(folder: Path, *said: Said) -> Home:
    home = Home.open(folder)
    with closing(connect(home)) as connection, transaction(connection):
        add(Store(connection), *said)
    return home


def rows(home: Home) -> dict[str, set[Any]]:
    with closing(connect(home, readonly=True)) as connection:
        columns = {"message": ("*",), "forgotten": ("*",), **SEALED}  # seals say the order, too
        return {
            table: set(connection.execute(f"SELECT {', '.join(columns[table])} FROM {table}"))
            for table in ("message", "run", "feedback", "comparison", "forgotten")
        }


def edit(home: Home, *statements: str) -> None:
    with closing(sqlite3.connect(home.database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def verified(home: Home) -> bool:
    with closing(connect(home, readonly=True)) as connection:
        return examine(connection).problems == []


def one(home: Home, other: Home) -> Merged:
    (merged,) = merge(home, [other])
    return merged


TALK = (
    run("r1", thread_id="t", tags=("a",), token_ids=(1, 2), logprobs=(-0.5, -1.0), user_id="u"),
    run("r2", "No.", params={"temperature": 0.5}, metadata={"x": [1]}),
    run("r3", "Take a coat.", (ASK, text("Yes."), {"role": "user", "content": "And now?"})),
    Feedback("f1", "r1", 11.0, "thumbs", 1.0, {"x": 1}, "nice", "human", "u"),
    Feedback("f2", "r2", 12.0, "correction", correction=text("Not yet.")),
    Comparison("c1", 13.0, "r1", "r2", "a", "model", None, "why"),
)


@pytest.mark.guarantee("record")
def test_a_merge_adds_every_new_row_that_is_in_no_conflict_and_of_nobody_forgotten(
    make: Make,
) -> None:
    home, other = make("home"), make("other", *TALK)
    merged = one(home, other)
    assert rows(home) == rows(other)
    assert verified(home)
    assert merged.runs == Counts(added=3)
    assert (merged.feedback.added, merged.comparisons.added) == (2, 1)
    assert merged.messages == len(rows(home)["message"]) == 6
    assert merged.conflicts == []


def test_a_conversation_of_a_thousand_turns_is_added(make: Make) -> None:
    """A message is written after the one that it follows, also where that takes many statements."""
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(1_000)]
    home, other = make("home"), make("other", run("r1", turns=turns))
    merge(home, [other])
    assert rows(home) == rows(other)


def test_the_other_home_is_not_changed(make: Make) -> None:
    home, other = make("home", run("mine")), make("other", *TALK)
    other.user_keys.unlink()
    before = rows(other)
    merge(home, [other])
    assert rows(other) == before
    assert {path.name for path in other.path.iterdir()} == {"adapters", "agentpref.db", "reports"}


def test_several_homes_are_merged_in_their_order(make: Make) -> None:
    home = make("home", run("mine"))
    merged = merge(home, [make("b", *TALK), make("c", run("r1"), run("r9"))])
    assert [Path(each.home).name for each in merged] == ["b", "c"]
    assert merged[1].runs.added == 1
    assert len(rows(home)["run"]) == 5


def test_known_rows_are_counted_and_change_nothing(make: Make) -> None:
    home, other = make("home", *TALK[:3]), make("other", *TALK)
    assert one(home, other).runs.known == 3
    before = rows(home)
    again = one(home, other)
    assert [again.runs, again.feedback, again.comparisons] == [Counts(known=n) for n in (3, 2, 1)]
    assert again.messages == 0
    assert rows(home) == before


def test_of_two_rows_with_one_id_the_first_stays_and_the_conflict_is_named(make: Make) -> None:
    home = make("home", run("r1", "mine"), Feedback("f1", "r1", 11.0, "thumbs", 1.0))
    other = make("other", run("r1", "theirs"), Feedback("f1", "r1", 11.0, "thumbs", 0.0))
    before = rows(home)
    done = one(home, other)
    assert rows(home) == before
    assert (done.runs.conflicts, done.feedback.conflicts) == (1, 1)
    assert [(c["table"], c["key"]) for c in done.conflicts] == [("run", "r1"), ("feedback", "f1")]


def test_a_judgement_of_a_different_run_with_the_same_id_is_a_conflict(make: Make) -> None:
    home = make("home", run("r1", "mine"), run("r2"))
    other = make(
        "other",
        run("r1", "theirs"),
        run("r2"),
        Feedback("f1", "r1", 11.0, "thumbs", 1.0),
        Feedback("f2", "r2", 11.0, "correction", correction=text("Maybe.")),
        Comparison("c1", 12.0, "r2", "r1", "b"),
    )
    done = one(home, other)
    assert (done.feedback, done.comparisons) == (Counts(added=1, conflicts=1), Counts(conflicts=1))
    assert {row[0] for row in rows(home)["feedback"]} == {"f2"}
    assert not any("theirs" in body for *_, body in rows(home)["message"])
    assert verified(home)


def test_each_batch_is_one_transaction_and_is_reported(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    home, other = make("home"), make("other", *(run(f"r{n}", f"{n}") for n in range(5)))
    told: list[tuple[str, int, int]] = []
    seen: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))
        seen.append(len(rows(home)["run"]))

    merge(home, [other], progress=progress)
    assert told[-3:] == [("other: run", 2, 5), ("other: run", 4, 5), ("other: run", 5, 5)]
    assert seen[-3:] == [2, 4, 5]
    stages = list(dict.fromkeys(stage.removeprefix("other: ") for stage, *_ in told))
    assert stages == [
        "copy",
        "verify pages",
        "verify rows",
        "verify references",
        "verify seals",
        "verify sums",
        "run",
    ]


def test_a_batch_that_fails_leaves_nothing(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    edit(
        home,
        "CREATE TRIGGER no BEFORE INSERT ON run WHEN new.run_id = 'r3'"
        " BEGIN SELECT RAISE(ABORT, 'no'); END",
    )
    with pytest.raises(sqlite3.IntegrityError):
        merge(home, [other])
    assert rows(home)["message"] == rows(home)["run"] == set()


@pytest.mark.guarantee("record")
def test_the_next_merge_completes_one_that_was_killed(make: Make) -> None:
    said = [run(f"r{n}", f"answer {n}") for n in range(30)]
    said += [Feedback(f"f{n}", f"r{n}", 11.0, "k", 1.0) for n in range(30)]  # type: ignore[misc]
    home, other = make("home"), make("other", *said)
    for when in (0, 1, 3, 5):
        script = f"""if True:
            import os
            from agentpref.record.transfer import merge
            merge.BATCH = 7
            told = []
            def progress(stage, done, total):
                told.append(stage)
                if sum("verify" not in stage for stage in told) > {when}:
                    os._exit(9)
            merge.merge({str(home.path)!r}, [{str(other.path)!r}], progress=progress)
        """
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
        assert verified(home)
        assert rows(home)["run"] < rows(other)["run"] or when == 5
        assert (home.path / "merging").exists()
    merge(home, [other])
    assert rows(home) == rows(other)
    assert not (home.path / "merging").exists()


def test_the_copy_that_a_killed_merge_left_is_deleted_when_somebody_is_forgotten(
    make: Make,
) -> None:
    home = make("home", *TALK)
    (home.path / "merging").mkdir()
    (home.path / "merging" / "agentpref.db").write_text("theirs", encoding="utf-8")
    with FileLock(home.path / "merge.lock"), pytest.raises(UpdateRunning):
        delete_user(home, "nobody")
    assert (home.path / "merging").exists(), "a merge that is running keeps its copy"
    delete_user(home, "nobody")
    assert not (home.path / "merging").exists()


def test_a_second_merge_at_the_same_time_is_refused(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    with FileLock(home.path / "merge.lock"), pytest.raises(UpdateRunning, match="another merge"):
        merge(home, [other])
    assert one(home, other).runs.added == 3


def test_a_merge_works_while_an_update_runs(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    with exclusive(home):
        assert one(home, other).runs.added == 3


def test_entries_in_the_spill_of_the_other_home_are_added(make: Make) -> None:
    home, other = make("home"), make("other", run("r1"))
    Spill(other).append([run_row(run("r2", "No."))])
    assert one(home, other).runs.added == 2


def test_a_home_in_use_is_merged_as_it_was_at_one_moment(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 1)
    home, other = make("home"), make("other", run("r1"), run("r2", "No."))

    def write(stage: str, done: int, total: int) -> None:
        if stage.startswith("other: verify"):
            return
        late = f"{stage}-{done}"
        assert done < 100, "what comes in meanwhile is not for this merge"
        filled(other.path, run(late, late), Feedback(f"f-{late}", late, 11.0, "k", 1.0))

    (merged,) = merge(home, [other], progress=write)
    assert merged.runs.added == 2
    assert merged.feedback == Counts()
    assert verified(home)
    assert one(home, other).feedback.added == 3


def test_updates_and_revisions_are_not_merged(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    edit(
        other,
        "INSERT INTO updates (update_id, namespace, created_at) VALUES ('u', 'default', 1.0)",
        "INSERT INTO revision (revision_id, namespace, seq, created_at, manifest)"
        " VALUES ('rev-1', 'default', 1, 20.0, '{}')",
        f"INSERT INTO logp VALUES ('p', 'r', 1.0, 1, x'{checksum(('p', 'r', 1.0, 1)).hex()}')",
    )
    with closing(connect(other)) as connection:
        for table in ("updates", "revision"):
            seal(connection, table)
    merge(home, [other])
    with closing(connect(home)) as connection:
        for table in ("updates", "serving", "logp", "revision"):
            assert connection.execute(f"SELECT * FROM {table}").fetchall() == []


def test_users_of_a_home_with_other_keys_can_be_forgotten_after_the_merge(tmp_path: Path) -> None:
    """Two hosts that do not share a key give one user two names, and one home then knows both."""
    for name in ("home", "other"):
        with Log(tmp_path / name) as log:
            log.record([ASK], f"from {name}", user_id="ada")
    home, other = Home.open(tmp_path / "home"), Home.open(tmp_path / "other")
    assert one(home, other).keys == 1
    assert one(home, other).keys == 0
    with Log(home.path) as log:
        log.forget(user_id="ada")
    assert rows(home)["run"] == set()


def test_merging_a_home_into_itself_is_refused(make: Make, tmp_path: Path) -> None:
    home = make("home", *TALK)
    (tmp_path / "link").symlink_to(home.path)
    for other in (home, str(home.path), tmp_path / "link"):
        with pytest.raises(ConfigError, match="the home itself"):
            merge(home, [make(f"fine-{id(other)}", run("r")), other])
    assert len(rows(home)["run"]) == 3, "nothing was merged before all homes were looked at"


def test_a_folder_that_is_no_home_is_refused_before_anything_is_merged(
    make: Make, tmp_path: Path
) -> None:
    home = make("home")
    with pytest.raises(NotAHome):
        merge(home, [make("other", *TALK), tmp_path / "nowhere"])
    assert rows(home)["run"] == set()


# Forgetting


def forget(home: Home, *users: str, at: float = 50.0) -> None:
    adopt(home, dict.fromkeys(users, at))


THEIRS = (
    run("r1", user_id="u"),
    run("r2", "No."),
    Feedback("f1", "r1", 11.0, "k", 1.0, user_id="v"),
    Feedback("f2", "r2", 11.0, "k", 1.0, user_id="u"),
    Feedback("f3", "r2", 11.0, "k", 1.0, user_id="v"),
    Comparison("c1", 12.0, "r1", "r2", "a"),
)


def test_rows_of_a_user_who_was_forgotten_here_stay_out(make: Make) -> None:
    home, other = make("home"), make("other", *THEIRS)
    forget(home, "u")
    done = one(home, other)
    assert {row[0] for row in rows(home)["run"]} == {"r2"}
    assert {row[0] for row in rows(home)["feedback"]} == {"f3"}
    assert [c.forgotten for c in (done.runs, done.feedback, done.comparisons)] == [1, 2, 1]
    assert verified(home)


def test_interrupted_training_is_deleted_when_a_tombstone_is_adopted(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other")
    home.training.mkdir()
    forget(other, "u")
    merge(home, [other])
    assert not home.training.exists()


def test_rows_from_after_the_forgetting_are_added(make: Make) -> None:
    home, other = make("home"), make("other", run("r1", user_id="u", created_at=50.5))
    forget(home, "u", at=50.0)
    assert one(home, other).runs.added == 1


def test_a_user_who_was_forgotten_there_is_forgotten_here(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other", run("r2", "No."))
    forget(other, "u")
    merged = one(home, other)
    assert {row[0] for row in rows(home)["run"]} == {"r2"}
    assert {row[0] for row in rows(home)["feedback"]} == {"f3"}
    assert rows(home)["forgotten"] == {("u", 50.0)}
    assert merged.tombstones == 1
    assert merged.forgot is not None
    assert (merged.forgot.runs, merged.forgot.feedback, merged.forgot.comparisons) == (1, 2, 1)
    assert b"Is it raining" in home.database.read_bytes()
    assert one(home, other).forgot is None


def test_revisions_trained_on_what_was_forgotten_there_are_tainted_here(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other")
    edit(
        home,
        "INSERT INTO revision (revision_id, namespace, seq, created_at, manifest)"
        " VALUES ('rev-1', 'default', 1, 20.0, '{}')",
        "INSERT INTO updates (update_id, namespace, created_at, candidate, verdict, report)"
        " VALUES ('up', 'default', 20.0, 'rev-1', 'promoted',"
        ' \'{"checks":[{"name":"check tone","words":"it quoted u"}]}\')',
        "INSERT INTO update_pair VALUES ('up', 'p', 'new')",
        "INSERT INTO pair_source (source, pair_id) VALUES ('f2', 'p')",
    )
    forget(other, "u")
    merged = one(home, other)
    assert merged.forgot is not None
    assert merged.forgot.revisions == ("rev-1",)
    with closing(connect(home)) as connection:
        ((tainted_at,),) = connection.execute("SELECT tainted_at FROM revision")
        ((report,),) = connection.execute("SELECT report FROM updates")
    assert tainted_at is not None
    assert "quoted" not in report


def test_refused_spill_entries_of_a_user_forgotten_there_are_removed(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other")
    lost = [
        Feedback("f7", "nowhere", 11.0, "k", 1.0, comment="theirs", user_id="u"),
        Feedback("f8", "nowhere", 51.0, "k", 1.0, comment="later", user_id="u"),
        Feedback("f9", "nowhere", 11.0, "k", 1.0, comment="mine", user_id="v"),
    ]
    Spill(home).append(lost)
    assert drain(home).refused == 3
    forget(other, "u")
    merge(home, [other])
    left = home.refused.read_text(encoding="utf-8")
    assert [word in left for word in ("theirs", "later", "mine")] == [False, True, True]


def test_a_removal_that_fails_changes_nothing(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other")
    forget(other, "u")
    edit(home, "CREATE TRIGGER no BEFORE DELETE ON run BEGIN SELECT RAISE(ABORT, 'no'); END")
    before = rows(home)
    with pytest.raises(sqlite3.IntegrityError):
        merge(home, [other])
    assert rows(home) == before


def test_of_two_tombstones_the_later_one_stays(make: Make) -> None:
    home, later, earlier = make("home"), make("later"), make("earlier")
    for each, at in ((home, 40.0), (later, 60.0), (earlier, 20.0)):
        forget(each, "u", at=at)
    merge(home, [later, earlier])
    assert rows(home)["forgotten"] == {("u", 60.0)}


def test_a_tombstone_from_the_future_counts_as_of_now(make: Make) -> None:
    home, other = make("home"), make("other")
    edit(
        other,
        "INSERT INTO forgotten VALUES ('u', 1e300)",
        "INSERT INTO forgotten VALUES (x'00', 1)",
    )
    with closing(connect(other)) as connection:
        resum(connection, ["forgotten"])
    merge(home, [other])
    ((user, at),) = rows(home)["forgotten"]
    assert user == "u"
    assert at <= time.time()


def test_a_tombstone_is_not_adopted_while_an_update_runs(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other", run("new"))
    forget(other, "u")
    with exclusive(home), pytest.raises(UpdateRunning):
        merge(home, [other])
    assert rows(home)["forgotten"] == set()


# Homes that fail verification, or that no log wrote

HOSTILE = [
    ("UPDATE message SET body = replace(body, 'Yes', 'Now')", "its text is not what was"),
    ("UPDATE message SET body = x'ff' WHERE body LIKE '%Yes%'", "its columns are not text"),
    ("UPDATE message SET parent = NULL WHERE body LIKE '%Yes%'", "not what was recorded"),
    ("UPDATE message SET parent = x'ff' WHERE body LIKE '%Yes%'", "its columns are not text"),
    ("UPDATE message SET parent = CAST(parent AS BLOB)", "message .*: its (parent|columns)"),
    ("DELETE FROM message WHERE body LIKE '%Yes%'", "its output is missing"),
    ("DELETE FROM message WHERE body LIKE '%raining%'", "its parent is missing"),
    ("UPDATE run SET output = prompt", "answers another prompt"),
    ("UPDATE run SET prompt = output", "answers another prompt"),
    ("UPDATE run SET params = '[]'", r"its params is '\[\]', not a mapping in JSON"),
    ("UPDATE run SET metadata = 'x'", "its metadata is 'x', not a mapping in JSON"),
    ("UPDATE run SET tags = '[1]'", "its tags is"),
    ("UPDATE run SET token_ids = '[1.5]'", "its token_ids is"),
    ("UPDATE run SET logprobs = '{}'", "its logprobs is"),
    ("UPDATE run SET created_at = 9e999", "its created_at is inf"),
    ("UPDATE run SET created_at = 'soon'", "its created_at is 'soon'"),
    ("UPDATE run SET namespace = x'00ff' WHERE run_id = 'r3'", "its namespace is b"),
    ("UPDATE run SET model = CAST(x'ff' AS TEXT)", "its model is b'"),
    ("UPDATE run SET run_id = CAST(x'ff' AS TEXT) WHERE run_id = 'r3'", "its run_id is b'"),
    ("UPDATE feedback SET source = 'oracle'", "its source is 'oracle', not one of"),
    ("UPDATE feedback SET score = 'good'", "its score is 'good'"),
    ("UPDATE feedback SET value = 'no JSON'", "its value is 'no JSON', not JSON"),
    ("UPDATE feedback SET comment = x'ff'", "its comment is b"),
    ("UPDATE feedback SET run_id = 'nowhere'", "its run is missing"),
    ("UPDATE feedback SET correction = (SELECT prompt FROM run)", "its correction is missing,"),
    ("UPDATE feedback SET correction = 'gone'", "its correction is missing,"),
    ("UPDATE comparison SET winner = 'c'", "its winner is 'c', not one of a, b"),
    ("UPDATE comparison SET run_b = 'nowhere'", "one of its runs is missing"),
    ("UPDATE comparison SET run_b = 'r3'", "of different prompts or namespaces"),
]  # fmt: skip


@pytest.mark.parametrize(("tampering", "why"), HOSTILE)
def test_a_home_with_one_bad_row_gives_nothing_and_the_error_names_the_row(
    make: Make, tampering: str, why: str
) -> None:
    other = make("other", *TALK)
    forget(other, "v")
    edit(other, "DROP TRIGGER IF EXISTS feedback_changes", tampering)
    home = make("home", run("mine", "Hello.", ({"role": "user", "content": "Hi!"},)))
    before = rows(home)
    with pytest.raises(CorruptHome, match=f"fails verification, .*{why}"):
        merge(home, [other])
    assert rows(home) == before
    assert verified(home)


def test_the_error_counts_the_problems_and_names_the_cure(make: Make) -> None:
    other = make("other", *(run(f"r{n}") for n in range(9)))
    edit(other, "UPDATE run SET params = '[]'")
    with pytest.raises(CorruptHome) as error:
        merge(make("home"), [other])
    said = str(error.value)
    assert said.startswith(f"{other.path} fails verification, so nothing of it was merged: run r0")
    assert f"and 6 more; look at it with `agentpref verify --home {other.path}`, restore" in said


def test_homes_before_a_bad_one_stay_merged(make: Make) -> None:
    home, bad = make("home"), make("bad", run("r9"))
    edit(bad, "UPDATE run SET params = '[]'")
    with pytest.raises(CorruptHome):
        merge(home, [make("good", run("r1")), bad])
    assert {row[0] for row in rows(home)["run"]} == {"r1"}


@pytest.mark.parametrize(
    ("bodies", "why"),
    [
        ([b'{"role":"oracle","content":"x"}'], "has role a str of 6 characters"),
        ([b'{"content":"x"}'], "has role None"),
        ([b'{"role":"user"}'], "has content of type NoneType"),
        ([b'["a","list"]'], "is a list"),
        ([b'{"tools":[1]}'], "tool 0 is a int"),
        ([b'{"tools":[]}'], "its prompt is missing or has no message"),
        ([b'{"role":"user","content":"x"}', b'{"tools":[]}'], "has role None"),
    ],
)
def test_a_message_of_the_wrong_shape_is_refused_though_its_hash_is_right(
    make: Make, bodies: list[bytes], why: str
) -> None:
    """Whoever edits a text can hash it, too."""
    other, parent = make("other", run("r1")), None
    for body in [*bodies, b'{"role":"assistant","content":"y"}']:
        id = node_id(parent, orjson.loads(body))
        with closing(sqlite3.connect(other.database)) as connection, connection:
            connection.execute("INSERT INTO message VALUES (?, ?, ?)", (id, parent, body.decode()))
            connection.execute("UPDATE run SET prompt = ?, output = ?", (parent or id, id))
        parent = id
    home = make("home")
    with pytest.raises(CorruptHome, match=why):
        merge(home, [other])
    assert rows(home)["message"] == rows(home)["run"] == set()


@pytest.mark.parametrize("table", ["run", "feedback"])
def test_an_answer_that_is_not_an_assistants_is_refused(make: Make, table: str) -> None:
    insists = (ASK, {"role": "user", "content": "Well?"})
    other = make("other", run("r2"), run("r3", "No.", insists), Feedback("f", "r2", 1.0, "k", 1.0))
    of_a_user = "(SELECT prompt FROM run WHERE run_id = 'r3')"
    edit(
        other,
        f"UPDATE run SET output = {of_a_user} WHERE run_id = 'r2' AND 'run' = '{table}'",
        f"UPDATE feedback SET correction = {of_a_user} WHERE 'feedback' = '{table}'",
    )
    with pytest.raises(CorruptHome, match="is not an assistant's message"):
        merge(make("home"), [other])


def test_a_message_that_no_row_needs_is_left_behind(make: Make) -> None:
    home, other = make("home"), make("other", run("r1"))
    body = b'{"role":"user","content":"stray"}'
    stray = node_id(None, orjson.loads(body))
    edit(other, f"INSERT INTO message VALUES ('{stray}', NULL, '{body.decode()}')")
    merge(home, [other])
    assert stray not in {row[0] for row in rows(home)["message"]}


def test_messages_that_were_not_logged_in_order_come_over(make: Make) -> None:
    """A parent then has a higher row number than its child."""
    home, other = make("home"), make("other", *TALK)
    edit(other, "UPDATE message SET rowid = 1000 - rowid")
    merge(home, [other])
    assert rows(home)["message"] == rows(other)["message"]
    assert verified(home)


@pytest.mark.parametrize("table", ["message", "run", "feedback", "comparison", "forgotten"])
@pytest.mark.parametrize("stead", ["VIEW {0} AS SELECT * FROM old", "TABLE other_{0}(x)"])
def test_a_view_or_virtual_table_in_place_of_a_table_is_refused(
    make: Make, table: str, stead: str
) -> None:
    other = make("other", run("r1"))
    with closing(sqlite3.connect(other.database)) as connection, connection:
        views = connection.execute(
            "SELECT type, name FROM sqlite_master WHERE type IN ('view', 'trigger')"
        )
        for kind, name in views.fetchall():
            connection.execute(f"DROP {kind} {name}")
        connection.execute(f"ALTER TABLE {table} RENAME TO old")
        connection.execute(f"CREATE {stead.format(table)}")
    with pytest.raises(CorruptHome, match=f"no table '{table}'"):
        merge(make("home"), [other])


@pytest.mark.parametrize(
    "tampering",
    [
        "ALTER TABLE run RENAME COLUMN params TO parameters",
        "DELETE FROM migration WHERE version > 2",
        "DELETE FROM migration",
    ],
)
def test_an_unknown_schema_is_refused_and_the_error_names_the_home(
    make: Make, tampering: str
) -> None:
    other = make("other", *TALK)
    edit(other, tampering)
    with pytest.raises(CorruptHome, match=str(other.database)):
        merge(make("home"), [other])


def test_damaged_pages_are_refused_and_the_error_names_the_home(make: Make) -> None:
    other = make("other", *(run(f"r{n}", f"{n}" * 900) for n in range(300)))
    with closing(sqlite3.connect(other.database)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    content = bytearray(other.database.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    other.database.write_bytes(content)
    with pytest.raises(CorruptHome, match=str(other.database)):
        merge(make("home"), [other])


def test_another_programs_database_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    with closing(sqlite3.connect(tmp_path / "foreign" / "agentpref.db")) as connection:
        connection.execute("CREATE TABLE songs (title)")
    with pytest.raises(NotAHome, match="'songs'"):
        merge(make("home"), [tmp_path / "foreign"])


@pytest.mark.parametrize(
    "entry",
    [
        b"[]",
        b'{"run": 7}',
        b'{"feedback": {"x": 1}}',
        b'{"run": [], "bodies": [7]}',
        b'{"run":["r","n",1.0,"p","o",null,null,null,null,null,"{}",null,null,"[]","{}"],"bodies":[]}',
    ],
)
def test_spill_entries_that_no_log_wrote_are_left_out(make: Make, entry: bytes) -> None:
    home, other = make("home"), make("other", *TALK)
    digest = hashlib.blake2b(entry + b"\n", digest_size=16).hexdigest().encode()
    other.spill.write_bytes(digest + b" " + entry + b"\n")
    before = other.spill.read_bytes()
    merge(home, [other])
    assert rows(home)["run"] == rows(other)["run"]
    assert other.spill.read_bytes() == before


def test_a_spill_line_that_was_changed_is_refused(make: Make) -> None:
    home, other = make("home"), make("other", run("r1"))
    Spill(other).append([run_row(run("r2", "No."))])
    other.spill.write_bytes(other.spill.read_bytes().replace(b"No.", b"Yo."))
    with pytest.raises(CorruptHome, match="spill line 1: it is not what was written"):
        merge(home, [other])


def test_a_damaged_file_of_keys_is_refused(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    other.user_keys.write_text("not keys", encoding="utf-8")
    with pytest.raises(CorruptHome, match=r"user\.keys"):
        merge(home, [other])


def test_a_home_with_a_newer_breaking_schema_is_refused(make: Make) -> None:
    other = make("other", run("r1"))
    edit(other, "PRAGMA user_version = 999")
    with pytest.raises(NewerHome, match=str(other.database)):
        merge(make("home"), [other])


def test_a_merge_stops_when_a_newer_version_upgrades_the_home(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 1)
    home, other = make("home"), make("other", run("r1"), run("r2", "No."))

    def upgrade(stage: str, done: int, total: int) -> None:
        if stage == "other: run":
            edit(home, "PRAGMA user_version = 999")

    with pytest.raises(NewerHome):
        merge(home, [other], progress=upgrade)
    edit(home, "PRAGMA user_version = 0")
    assert len(rows(home)["run"]) == 1


def test_an_older_home_is_upgraded_in_the_copy(make: Make, tmp_path: Path) -> None:
    old = Home.create(tmp_path / "old")
    with pytest.MonkeyPatch.context() as patch, closing(_of_version_5(old, patch)) as connection:
        filled_row = run_row(run("r1", user_id="ada"))
        for node in filled_row.nodes:
            connection.execute(
                "INSERT INTO message VALUES (?, ?, ?)", (*node[:2], node[2].decode())
            )
        connection.execute(
            "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", filled_row[:-1]
        )
    home = make("home")
    assert one(home, old).runs.added == 1
    assert "'ada'" not in str(rows(home)["run"])
    assert one(home, old).runs == Counts(known=1), "each time it gets the same user keys"
    with closing(sqlite3.connect(old.database)) as connection:
        ((version,),) = connection.execute("SELECT max(version) FROM migration")
    assert version == 5, "only its copy is brought up to date"
    assert delete_user(home, "ada").runs == 1


def _of_version_5(home: Home, patch: pytest.MonkeyPatch) -> sqlite3.Connection:
    patch.setattr(database, "STEPS", STEPS[:5])
    return connect(home)


# What stands in the place of a file


@pytest.mark.guarantee("record", "a pipe, a device or a folder as its spill.jsonl or user.keys")
@pytest.mark.parametrize("name", ["spill.jsonl", "user.keys"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_in_the_other_home_is_refused_at_once(
    make: Make, name: str, kind: str
) -> None:
    home, other = make("home"), make("other", *TALK)
    place = other.path / name
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    with pytest.raises(NotKept, match=rf"{name} is not a plain file; remove it, or restore"):
        merge(home, [other])
    assert rows(home)["run"] == set()
