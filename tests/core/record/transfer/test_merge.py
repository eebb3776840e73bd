"""Homes are united exactly once by id, in any order, and nothing is let in on trust."""

from __future__ import annotations

import hashlib
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

from agentpref.errors import ConfigError, CorruptHome, NewerHome, NotAHome, UpdateRunning
from agentpref.home import Home
from agentpref.record import database
from agentpref.record.database import connect, exclusive, transaction
from agentpref.record.deletion import tombstones
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import node_id, prompt_of, run_row
from agentpref.record.migrations import STEPS
from agentpref.record.spill import Spill, drain
from agentpref.record.store import Store
from agentpref.record.transfer import merger
from agentpref.record.transfer.merge import Merged, merge
from agentpref.types import Comparison, Feedback, Run

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
        store = Store(connection)
        for each in said:
            if isinstance(each, Run):
                store.add_run(each)
            elif isinstance(each, Feedback):
                store.add_feedback(each)
            else:
                store.add_comparison(each)
    return home


def rows(home: Home) -> dict[str, set[Any]]:
    with closing(connect(home, readonly=True)) as connection:
        return {
            table: set(connection.execute(f"SELECT * FROM {table}"))
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


def test_all_that_another_home_logged_comes_over(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    merged = one(home, other)
    assert rows(home) == rows(other)
    assert verified(home)
    done = merged.rows
    assert [done.runs.added, done.feedback.added, done.comparisons.added] == [3, 2, 1]
    assert done.messages.added == len(rows(home)["message"]) == 6
    assert done.named == []


def test_a_long_conversation_comes_over_as_one_run(make: Make) -> None:
    """A message is written after the one that it follows, also where that takes many statements."""
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(1_000)]
    home, other = make("home"), make("other", run("r1", turns=turns))
    merge(home, [other])
    assert rows(home) == rows(other)


def test_the_other_home_stays_as_it_is(make: Make) -> None:
    home, other = make("home", run("mine")), make("other", *TALK)
    other.user_keys.unlink()
    before = rows(other)
    merge(home, [other])
    assert rows(other) == before
    assert {path.name for path in other.path.iterdir()} == {"adapters", "agentpref.db", "reports"}


def test_several_homes_at_once_in_their_order(make: Make) -> None:
    home = make("home", run("mine"))
    merged = merge(home, [make("b", *TALK), make("c", run("r1"), run("r9"))])
    assert [Path(each.home).name for each in merged] == ["b", "c"]
    assert merged[1].rows.runs.added == 1
    assert len(rows(home)["run"]) == 5


def test_what_is_known_is_counted_and_changes_nothing(make: Make) -> None:
    home, other = make("home", *TALK[:3]), make("other", *TALK)
    assert one(home, other).rows.runs.known == 3
    before = rows(home)
    again = one(home, other).rows
    assert [again.runs.known, again.feedback.known, again.comparisons.known] == [3, 2, 1]
    assert again.runs.added == again.messages.added == again.feedback.added == 0
    assert rows(home) == before


def test_of_two_rows_with_one_id_the_first_stays_and_it_is_said(make: Make) -> None:
    home = make("home", run("r1", "mine"), Feedback("f1", "r1", 11.0, "thumbs", 1.0))
    other = make("other", run("r1", "theirs"), Feedback("f1", "r1", 11.0, "thumbs", 0.0))
    before = rows(home)
    done = one(home, other).rows
    assert rows(home) == before
    assert (done.runs.conflicts, done.feedback.conflicts) == (1, 1)
    assert [refusal[:2] for refusal in done.named] == [("run", "r1"), ("feedback", "f1")]


def test_batches_are_bounded_and_each_is_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merger, "BATCH", 2)
    home, other = make("home"), make("other", *(run(f"r{n}", f"{n}") for n in range(5)))
    told: list[tuple[str, int, int]] = []
    seen: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))
        seen.append(len(rows(home)["run"]))

    merge(home, [other], progress=progress)
    assert told == [("other: run", 2, 5), ("other: run", 4, 5), ("other: run", 5, 5)]
    assert seen == [2, 4, 5]


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


def test_a_merge_that_was_killed_is_completed_by_the_next(make: Make) -> None:
    said = [run(f"r{n}", f"answer {n}") for n in range(30)]
    said += [Feedback(f"f{n}", f"r{n}", 11.0, "k", 1.0) for n in range(30)]  # type: ignore[misc]
    home, other = make("home"), make("other", *said)
    for when in (1, 3, 5):
        script = f"""if True:
            import os
            from agentpref.record.transfer import merge
            from agentpref.record.transfer import merger
            merger.BATCH = 7
            told = []
            def progress(stage, done, total):
                told.append(stage)
                if len(told) > {when}:
                    os._exit(9)
            merge.merge({str(home.path)!r}, [{str(other.path)!r}], progress=progress)
        """
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
        assert verified(home)
        assert rows(home)["run"] < rows(other)["run"] or when == 5
    merge(home, [other])
    assert rows(home) == rows(other)


def test_what_waits_in_the_other_home_s_spill_comes_too(make: Make) -> None:
    home, other = make("home"), make("other", run("r1"))
    Spill(other).append([run_row(run("r2", "No."))])
    assert one(home, other).rows.runs.added == 2


def test_a_home_that_is_being_written_to_is_read_at_one_moment(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merger, "BATCH", 1)
    home, other = make("home"), make("other", run("r1"), run("r2", "No."))

    def write(stage: str, done: int, total: int) -> None:
        late = f"{stage}-{done}"
        assert done < 100, "what comes in meanwhile is not for this merge"
        filled(other.path, run(late, late), Feedback(f"f-{late}", late, 11.0, "k", 1.0))

    (merged,) = merge(home, [other], progress=write)
    assert merged.rows.runs.added == 2
    assert merged.rows.feedback.added == merged.rows.feedback.refused == 0
    assert verified(home)
    assert one(home, other).rows.feedback.added == 2


def test_what_a_host_has_learned_stays_with_it(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    edit(
        other,
        "INSERT INTO updates (update_id, namespace, created_at) VALUES ('u', 'default', 1.0)",
        "INSERT INTO serving (namespace, live) VALUES ('default', 'rev-1')",
        "INSERT INTO logp VALUES ('p', 'r', 1.0, 1)",
    )
    merge(home, [other])
    with closing(connect(home)) as connection:
        for table in ("updates", "serving", "logp", "revision"):
            assert connection.execute(f"SELECT * FROM {table}").fetchall() == []


def test_users_of_the_other_home_are_found_again(tmp_path: Path) -> None:
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


def test_a_home_is_not_merged_into_itself(make: Make, tmp_path: Path) -> None:
    home = make("home", *TALK)
    (tmp_path / "link").symlink_to(home.path)
    for other in (home, str(home.path), tmp_path / "link"):
        with pytest.raises(ConfigError, match="the home itself"):
            merge(home, [make(f"fine-{id(other)}", run("r")), other])
    assert len(rows(home)["run"]) == 3, "nothing was merged before all homes were looked at"


def test_what_is_no_home_is_refused_before_anything_is_merged(make: Make, tmp_path: Path) -> None:
    home = make("home")
    with pytest.raises(NotAHome):
        merge(home, [make("other", *TALK), tmp_path / "nowhere"])
    assert rows(home)["run"] == set()


# Forgetting


def forget(home: Home, *users: str, at: float = 50.0) -> None:
    tombstones.adopt(home, dict.fromkeys(users, at), lambda stage, done, total: None)


THEIRS = (
    run("r1", user_id="u"),
    run("r2", "No."),
    Feedback("f1", "r1", 11.0, "k", 1.0, user_id="v"),
    Feedback("f2", "r2", 11.0, "k", 1.0, user_id="u"),
    Feedback("f3", "r2", 11.0, "k", 1.0, user_id="v"),
    Comparison("c1", 12.0, "r1", "r2", "a"),
)


def test_what_was_forgotten_here_is_not_let_in(make: Make) -> None:
    home, other = make("home"), make("other", *THEIRS)
    forget(home, "u")
    done = one(home, other).rows
    assert {row[0] for row in rows(home)["run"]} == {"r2"}
    assert {row[0] for row in rows(home)["feedback"]} == {"f3"}
    assert [c.forgotten for c in (done.runs, done.feedback, done.comparisons)] == [1, 2, 1]
    assert [c.refused for c in (done.runs, done.feedback, done.comparisons)] == [0, 0, 0]
    assert verified(home)


def test_what_was_said_after_the_forgetting_is_let_in(make: Make) -> None:
    home, other = make("home"), make("other", run("r1", user_id="u", created_at=50.5))
    forget(home, "u", at=50.0)
    assert one(home, other).rows.runs.added == 1


def test_who_was_forgotten_there_is_forgotten_here(make: Make) -> None:
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


def test_revisions_that_saw_what_was_forgotten_there_are_tainted_here(make: Make) -> None:
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


def test_what_the_spill_could_not_store_of_them_goes_too(make: Make) -> None:
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


def test_a_removal_that_fails_halfway_leaves_nothing_done(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other")
    forget(other, "u")
    edit(home, "CREATE TRIGGER no BEFORE DELETE ON run BEGIN SELECT RAISE(ABORT, 'no'); END")
    before = rows(home)
    with pytest.raises(sqlite3.IntegrityError):
        merge(home, [other])
    assert rows(home) == before


def test_of_two_tombstones_the_later_one_stands(make: Make) -> None:
    home, later, earlier = make("home"), make("later"), make("earlier")
    for each, at in ((home, 40.0), (later, 60.0), (earlier, 20.0)):
        forget(each, "u", at=at)
    merge(home, [later, earlier])
    assert rows(home)["forgotten"] == {("u", 60.0)}


def test_a_clock_that_is_ahead_forgets_nothing_to_come(make: Make) -> None:
    home, other = make("home"), make("other")
    edit(
        other,
        "INSERT INTO forgotten VALUES ('u', 1e300)",
        "INSERT INTO forgotten VALUES (x'00', 1)",
    )
    merge(home, [other])
    ((user, at),) = rows(home)["forgotten"]
    assert user == "u"
    assert at <= time.time()


def test_somebody_is_not_forgotten_in_the_middle_of_an_update(make: Make) -> None:
    home, other = make("home", *THEIRS), make("other", run("new"))
    forget(other, "u")
    with exclusive(home), pytest.raises(UpdateRunning):
        merge(home, [other])
    assert rows(home)["forgotten"] == set()


# Hostile homes

HOSTILE = [
    ("UPDATE message SET body = replace(body, 'Yes', 'Now')", "run", "its text is not what was"),
    ("UPDATE message SET body = x'ff' WHERE body LIKE '%Yes%'", "run", "its text is not what was"),
    ("UPDATE message SET parent = NULL WHERE body LIKE '%Yes%'", "run", "not what was recorded"),
    ("UPDATE message SET parent = x'ff' WHERE body LIKE '%Yes%'", "run", "columns are not text"),
    ("DELETE FROM message WHERE body LIKE '%Yes%'", "run", "it is missing"),
    ("DELETE FROM message WHERE body LIKE '%raining%'", "run", "it is missing"),
    ("UPDATE run SET output = prompt", "run", "no answer to its prompt"),
    ("UPDATE run SET prompt = output", "run", "no answer to its prompt"),
    ("UPDATE run SET params = '[]'", "run", "its params is '[]', not a mapping in JSON"),
    ("UPDATE run SET metadata = 'x'", "run", "its metadata is 'x', not a mapping in JSON"),
    ("UPDATE run SET tags = '[1]'", "run", "its tags is"),
    ("UPDATE run SET token_ids = '[1.5]'", "run", "its token_ids is"),
    ("UPDATE run SET logprobs = '{}'", "run", "its logprobs is"),
    ("UPDATE run SET created_at = 9e999", "run", "its created_at is inf"),
    ("UPDATE run SET created_at = 'soon'", "run", "its created_at is 'soon'"),
    ("UPDATE run SET namespace = x'00ff'", "run", "its namespace is b"),
    ("UPDATE run SET model = CAST(x'ff' AS TEXT)", "run", "its model is b'"),
    ("UPDATE run SET run_id = CAST(x'ff' AS TEXT) WHERE run_id = 'r3'", "run", "its run_id is b'"),
    ("UPDATE feedback SET source = 'oracle'", "feedback", "its source is 'oracle'"),
    ("UPDATE feedback SET score = 'good'", "feedback", "its score is 'good'"),
    ("UPDATE feedback SET value = 'no JSON'", "feedback", "its value is"),
    ("UPDATE feedback SET comment = x'ff'", "feedback", "its comment is b"),
    ("UPDATE feedback SET run_id = 'nowhere'", "feedback", "its run nowhere is not there"),
    ("UPDATE feedback SET correction = (SELECT prompt FROM run)", "feedback", "no answer to its"),
    ("UPDATE feedback SET correction = 'gone'", "feedback", "it is missing"),
    ("UPDATE comparison SET winner = 'c'", "comparison", "its winner is 'c', not one of a, b, tie"),
    ("UPDATE comparison SET run_b = 'nowhere'", "comparison", "its run nowhere is not there"),
    ("UPDATE comparison SET run_b = 'r3'", "comparison", "of different prompts or namespaces"),
]  # fmt: skip


@pytest.mark.parametrize(("tampering", "table", "why"), HOSTILE)
def test_a_row_that_no_log_would_have_written_is_refused_and_named(
    make: Make, tampering: str, table: str, why: str
) -> None:
    other = make("other", *TALK)
    edit(other, "DROP TRIGGER IF EXISTS feedback_changes", tampering)
    home = make("home", run("mine", "Hello.", ({"role": "user", "content": "Hi!"},)))
    done = one(home, other).rows
    counts = {"run": done.runs, "feedback": done.feedback, "comparison": done.comparisons}
    assert counts[table].refused >= 1
    assert any(named.table == table and why in named.why for named in done.named), done.named
    assert verified(home)


def test_a_message_that_was_edited_is_counted_and_named(make: Make) -> None:
    other = make("other", *(run(f"r{n}") for n in range(5)))
    edit(other, "UPDATE message SET body = replace(body, 'Yes', 'No')")
    done = one(make("home"), other).rows
    assert (done.messages.refused, done.messages.added, done.runs.refused) == (1, 0, 5)
    (named,) = [named for named in done.named if named.table == "message"]
    assert named.why == "its text is not what was recorded"


def test_of_many_refused_rows_the_first_are_named(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merger, "NAMED", 3)
    other = make("other", *(run(f"r{n}") for n in range(9)))
    edit(other, "UPDATE run SET params = '[]'")
    done = one(make("home"), other).rows
    assert (done.runs.refused, len(done.named)) == (9, 3)


@pytest.mark.parametrize(
    ("bodies", "why"),
    [
        ([b'{"role":"oracle","content":"x"}'], "has role 'oracle'"),
        ([b'{"content":"x"}'], "has role None"),
        ([b'{"role":"user"}'], "has content of type NoneType"),
        ([b'["a","list"]'], "is a list"),
        ([b'{"tools":[1]}'], "tool 0 is a int"),
        ([b'{"tools":[]}'], "its prompt has no message"),
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
    done = one(home, other).rows
    assert done.runs.refused == 1
    assert any(why in named.why for named in done.named), done.named
    assert rows(home)["message"] == rows(home)["run"] == set()


def test_an_answer_that_is_known_here_must_be_one_too(make: Make) -> None:
    """Its text is not looked at again, but whose it is and what it follows is."""
    insists = (ASK, {"role": "user", "content": "Well?"})
    home = make("home", run("r1", "No.", insists))
    other = make("other", run("r2"), run("r3", "No.", insists))
    prompt_of_r3 = "(SELECT prompt FROM run WHERE run_id = 'r3')"
    edit(other, f"UPDATE run SET output = {prompt_of_r3} WHERE run_id = 'r2'")
    done = one(home, other).rows
    assert (done.runs.refused, done.runs.added) == (1, 1)
    assert "is no answer to its prompt" in done.named[0].why


def test_text_that_nothing_hangs_on_is_left_behind(make: Make) -> None:
    home, other = make("home"), make("other", run("r1"))
    edit(other, "INSERT INTO message VALUES ('stray', NULL, '{}')")
    merge(home, [other])
    assert "stray" not in {row[0] for row in rows(home)["message"]}


@pytest.mark.parametrize("table", ["message", "run", "feedback", "comparison", "forgotten"])
@pytest.mark.parametrize("stead", ["VIEW {0} AS SELECT * FROM old", "TABLE other_{0}(x)"])
def test_something_else_in_place_of_a_table_is_not_read(make: Make, table: str, stead: str) -> None:
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
def test_tables_that_are_not_ours_are_said_of_the_home_that_has_them(
    make: Make, tampering: str
) -> None:
    other = make("other", *TALK)
    edit(other, tampering)
    with pytest.raises(CorruptHome, match=str(other.database)):
        merge(make("home"), [other])


def test_damaged_pages_are_said_of_the_home_that_has_them(make: Make) -> None:
    other = make("other", *(run(f"r{n}", f"{n}" * 900) for n in range(300)))
    with closing(sqlite3.connect(other.database)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    content = bytearray(other.database.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    other.database.write_bytes(content)
    with pytest.raises(CorruptHome, match=str(other.database)):
        merge(make("home"), [other])


def test_another_program_s_database_is_no_home(make: Make, tmp_path: Path) -> None:
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
def test_a_spill_that_no_log_wrote_is_not_read(make: Make, entry: bytes) -> None:
    home, other = make("home"), make("other", *TALK)
    digest = hashlib.blake2b(entry + b"\n", digest_size=16).hexdigest().encode()
    other.spill.write_bytes(digest + b" " + entry + b"\n")
    merge(home, [other])
    assert rows(home)["run"] == rows(other)["run"]
    assert other.refused.read_bytes() == digest + b" " + entry + b"\n"


def test_keys_that_are_none_are_refused(make: Make) -> None:
    home, other = make("home"), make("other", *TALK)
    other.user_keys.write_text("not keys", encoding="utf-8")
    with pytest.raises(CorruptHome, match=r"user\.keys"):
        merge(home, [other])


def test_a_home_of_a_breaking_later_version_is_not_read(make: Make) -> None:
    other = make("other", run("r1"))
    edit(other, "PRAGMA user_version = 999")
    with pytest.raises(NewerHome):
        merge(make("home"), [other])


def test_a_merge_stops_where_a_later_version_takes_the_home_over(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merger, "BATCH", 1)
    home, other = make("home"), make("other", run("r1"), run("r2", "No."))
    with pytest.raises(NewerHome):
        merge(home, [other], progress=lambda *stage: edit(home, "PRAGMA user_version = 999"))
    edit(home, "PRAGMA user_version = 0")
    assert len(rows(home)["run"]) == 1


def test_an_older_home_is_brought_up_to_date_first(make: Make, tmp_path: Path) -> None:
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
    assert one(home, old).rows.runs.added == 1
    assert "ada" not in str(rows(home)["run"])


def _of_version_5(home: Home, patch: pytest.MonkeyPatch) -> sqlite3.Connection:
    patch.setattr(database, "STEPS", STEPS[:5])
    return connect(home)
