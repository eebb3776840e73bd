"""Forgetting a user leaves no byte of theirs, and loses nothing of anybody else."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentpref
from agentpref.errors import CorruptHome, ForgottenUser, NotAHome, NotKept, UpdateRunning
from agentpref.home import Home
from agentpref.record import database
from agentpref.record.database import connect, exclusive, transaction
from agentpref.record.deletion.forget import Forgotten, forget
from agentpref.record.deletion.removal import expire
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.integrity import examine
from agentpref.record.messages import prompt_of, run_row
from agentpref.record.seals import seal
from agentpref.record.spill import Spill, drain
from agentpref.record.store import Store
from agentpref.record.updates import Role, UpdateRow, Updates
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref.types import Comparison, Feedback, Run
from tests.core.record.rows import add

SYSTEM = {"role": "system", "content": "You are terse."}
SECRET = "adas-secret"
"""In every text of Ada's, and in what is said of her runs."""


def asked(text: str) -> list[dict[str, Any]]:
    return [SYSTEM, {"role": "user", "content": text}]


def holding(home: Home, text: str) -> list[str]:
    """Name the files of a home that hold a text."""
    files = (path for path in home.path.rglob("*") if path.is_file())
    return [path.name for path in files if text.encode() in path.read_bytes()]


def chat(log: agentpref.Log, user: str, text: str, turns: int = 6) -> list[str]:
    """Log a conversation with something in every field, judged by its user and by a judge."""
    messages, runs = asked(f"{text} asks"), []
    for turn in range(turns):
        answers = [f"{text} is told {turn} {n} " * (300 if turn == 2 else 1) for n in range(2)]
        two = [
            log.record(
                messages,
                answer,
                user_id=user,
                thread_id=f"{text}-thread",
                trace_id=f"{text}-trace",
                tags=[f"{text}-tag"],
                params={"stop": f"{text}-stop"},
                metadata={"page": f"{text}-page " * 2000},
            )
            for answer in answers
        ]
        log.compare(*two, winner="a", user_id=user, comment=f"{text} likes it")
        log.correct(two[0], f"{text} corrects", user_id=user, comment=f"{text} knows better")
        log.feedback(two[1], key="page", value={"x": f"{text}-value"}, source="model")
        messages = [*messages, {"role": "assistant", "content": answers[0]}, asked(f"{text}!")[1]]
        runs += two
    return runs


@pytest.fixture
def home(home: Home) -> Home:
    """A home that was opened, as each one is before it has a spill, keys or training."""
    connect(home).close()
    return home


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home where Ada is one of several, after updates, deletions and what nobody refers to."""
    home = Home.create(tmp_path_factory.mktemp("full") / "home")
    with agentpref.Log(home.path) as log:
        for n in range(8):
            chat(log, "bob", f"bob-{n}")
            chat(log, "ada", f"{SECRET}-{n}")
        run = log.record(asked("bob asks once"), "bob is told", user_id="bob", run_id="twice")
        log.record(asked(f"{SECRET} under bob's id"), "lost", user_id="ada", run_id="twice")
        log.feedback(run, key="thumbs", score=1, user_id="ada", comment=f"{SECRET} likes it")
    with closing(connect(home)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA secure_delete = OFF")  # as most builds of SQLite have it
        connection.execute("DELETE FROM feedback WHERE comment LIKE '%-3 %'")
        connection.execute("UPDATE run SET metadata = '{}' WHERE rowid % 3 = 0")
        for table in ("run", "feedback"):
            seal(connection, table)
    return home


@pytest.fixture
def busy(full: Home, tmp_path: Path) -> Home:
    """A copy of it."""
    return Home(shutil.copytree(full.path, tmp_path / "busy"))


@pytest.mark.guarantee("privacy")
def test_no_byte_of_a_forgotten_user_is_left_in_any_file_of_the_home(busy: Home) -> None:
    assert holding(busy, SECRET)
    forget(busy, "ada")
    assert holding(busy, SECRET) == []
    assert holding(busy, "bob-7 asks") == ["agentpref.db"]


def test_no_byte_is_left_while_a_log_is_open(busy: Home) -> None:
    """Its connection keeps the write-ahead log alive, where every page was written twice."""
    with agentpref.Log(busy.path) as log:
        chat(log, "ada", SECRET)
        log.flush()
        forget(busy.path, "ada")
        assert holding(busy, SECRET) == []
        chat(log, "bob", "bob-later")
        assert log.verify() == []


def test_removed_rows_are_counted_and_all_others_stay(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        theirs = chat(log, "ada", SECRET, turns=2)
        chat(log, "bob", "bob", turns=3)
    found = forget(home, "ada")
    assert (found.runs, found.feedback, found.comparisons) == (4, 4, 2)
    assert found.messages == 8, "of each turn a question, two answers, and one as it should be"
    assert found.shared == 1, "the system's"
    with closing(connect(home)) as connection:
        store = Store(connection)
        assert examine(connection).problems == []
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert store.stats()["runs"] == 6
        assert not {run.run_id for run in store.runs("default")} & set(theirs)
        assert len(list(store.feedback("default"))) == 6
        assert len(list(store.comparisons("default"))) == 3


def test_judgements_of_their_runs_and_by_them_are_removed(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        hers, his, nobodys = (
            log.record(asked("same"), f"answer {user}", user_id=user)
            for user in ("ada", "bob", None)
        )
        log.feedback(hers, key="thumbs", score=0, user_id="bob")
        log.feedback(his, key="thumbs", score=0, user_id="ada")
        kept = log.feedback(his, key="thumbs", score=1, user_id="bob")
        log.compare(hers, nobodys, winner="a", user_id="bob")
        log.compare(nobodys, hers, winner="a", user_id="bob")
        log.compare(his, nobodys, winner="a", user_id="ada")
        stays = log.compare(his, nobodys, winner="b")
    assert forget(home, "ada") == Forgotten(runs=1, feedback=2, comparisons=3, messages=1, shared=2)
    with closing(connect(home)) as connection:
        store = Store(connection)
        assert {run.run_id for run in store.runs("default")} == {his, nobodys}
        assert [said.feedback_id for said in store.feedback("default")] == [kept]
        assert [said.comparison_id for said in store.comparisons("default")] == [stays]


def test_text_that_another_user_also_wrote_stays(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        for user in ("ada", "bob"):
            log.record(asked("how are you?"), "well", user_id=user)
        log.correct(log.record(asked("alone"), "yes", user_id="ada"), "no", user_id="ada")
    found = forget(home, "ada")
    assert (found.runs, found.messages, found.shared) == (2, 3, 3)
    with agentpref.Log(home.path) as log:
        assert log.verify() == []


def test_a_correction_that_another_user_also_made_stays(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        runs = [log.record(asked("2 + 2?"), f"{n}", user_id=n) for n in ("ada", "bob")]
        for run_id, user in zip(runs, ("ada", "bob"), strict=True):
            log.correct(run_id, "four", user_id=user)
    found = forget(home, "ada")
    assert (found.runs, found.feedback, found.messages, found.shared) == (1, 1, 1, 3)
    with agentpref.Log(home.path) as log:
        assert log.verify() == []


def test_a_prompt_stays_if_it_continues_in_another_users_run(home: Home) -> None:
    """A thread that two people write in: the later run's prompt holds the earlier one's text."""
    first = [*asked("ours"), {"role": "assistant", "content": "yes"}]
    with agentpref.Log(home.path) as log:
        log.record(asked("ours"), "yes", user_id="ada")
        later = log.record([*first, {"role": "user", "content": "more"}], "no", user_id="bob")
    found = forget(home, "ada")
    assert (found.runs, found.messages, found.shared) == (1, 0, 3)
    with closing(connect(home)) as connection:
        assert [m["content"] for m in Store(connection).run(later).prompt.messages][1] == "ours"


def test_forgetting_an_unknown_user_removes_no_run(busy: Home) -> None:
    with closing(connect(busy)) as connection:
        before = list(connection.execute("SELECT run_id FROM run"))
        assert forget(busy, "eve").runs == 0
        assert list(connection.execute("SELECT run_id FROM run")) == before


def test_messages_that_no_row_refers_to_are_removed_with_any_user(busy: Home) -> None:
    """Text of a run that was ignored, its id being taken: nobody could ask for it to go."""
    assert holding(busy, "under bob's id")
    assert forget(busy, "eve").shared == 0, "nothing of Eve's is the system's"
    assert holding(busy, "under bob's id") == []
    with agentpref.Log(busy.path) as log:
        assert log.verify() == []


def test_a_user_of_a_merged_home_is_removed_under_the_hash_of_every_key(
    home: Home, tmp_path: Path
) -> None:
    other = Home.create(tmp_path / "other")
    theirs = Pseudonyms.of(other)
    Pseudonyms.of(home).adopt(theirs, home)
    with closing(connect(home)) as connection:
        for n, names in enumerate((Pseudonyms.of(home), theirs)):
            Store(connection).add_run(run(f"r{n}", user_id=names.name("ada")))
    assert forget(home, "ada").runs == 2


def run(run_id: str, text: str = "text", **fields: Any) -> Run:
    values = {"created_at": time.time(), "prompt": prompt_of(asked(text))} | fields
    return Run(run_id, "default", output={"role": "assistant", "content": text}, **values)


def test_a_user_id_that_is_not_text_is_found(home: Home) -> None:
    with agentpref.Log(home.path) as log:
        log.record(asked("x"), "y", user_id=7)  # type: ignore[arg-type]
    assert forget(home, 7).runs == 1  # type: ignore[arg-type]


def test_forgetting_fails_if_the_user_keys_are_missing(busy: Home) -> None:
    busy.user_keys.unlink()
    with pytest.raises(CorruptHome, match=r"user\.keys is missing.*restore it from a backup"):
        forget(busy, "ada")
    assert holding(busy, SECRET)
    assert not busy.user_keys.exists(), "nor is a key made that fits none of the names"


def test_a_home_without_users_needs_no_keys(home: Home) -> None:
    connect(home).close()
    assert forget(home, "ada") == Forgotten()


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAHome):
        forget(tmp_path, "ada")


# What is not in the database, or not yet


def test_entries_in_the_spill_are_removed_too(home: Home) -> None:
    name = Pseudonyms.of(home).name("ada")
    waiting = [run("r1", SECRET, user_id=name), run("r2", "bob")]
    Spill(home).append([run_row(each) for each in waiting])
    assert holding(home, SECRET) == ["spill.jsonl"]
    assert forget(home, "ada").runs == 1
    assert holding(home, SECRET) == []
    with closing(connect(home)) as connection:
        assert [each.run_id for each in Store(connection).runs("default")] == ["r2"]


def test_refused_spill_entries_are_removed_too(home: Home) -> None:
    """It names runs that the home does not have, and is kept in a file for the operator."""
    name = Pseudonyms.of(home).name("ada")
    with agentpref.Log(home.path) as log:
        hers = log.record(asked("hers"), "yes", user_id="ada")
    said = Feedback("f1", "nowhere", 1.0, "note", value=1, comment=f"{SECRET} 1", user_id=name)
    judged = Comparison("c1", 1.0, hers, "nowhere", "a", comment=f"{SECRET} 2")
    others = replace(said, feedback_id="f2", comment="bobs", user_id=None)
    Spill(home).append([said, judged, others])
    assert drain(home).refused == 3
    assert holding(home, SECRET) == ["refused.jsonl"]
    with home.refused.open("ab") as file:
        file.write(b'0123 {"feedback":{"comment":"' + SECRET.encode())
    forget(home, "ada")
    assert holding(home, SECRET) == []
    assert holding(home, "bobs") == ["refused.jsonl"]
    assert len(home.refused.read_bytes().splitlines()) == 1


def test_a_run_that_waited_in_the_spill_while_its_user_was_forgotten_is_not_kept(
    home: Home,
) -> None:
    """It waited in a spill while its user was forgotten."""
    late = run("late", SECRET, user_id=Pseudonyms.of(home).name("ada"))
    forget(home, "ada")
    Spill(home).append([run_row(late)])
    drain(home)
    assert holding(home, SECRET) == []


@pytest.mark.parametrize("entry", [b"[]", b'{"run":7}', b'{"feedback":{"x":1}}', b"7"])
def test_refused_lines_that_cannot_be_read_are_removed(home: Home, entry: bytes) -> None:
    connect(home).close()
    digest = hashlib.blake2b(entry + b"\n", digest_size=16).hexdigest().encode()
    home.refused.write_bytes(digest + b" " + entry + b"\n")
    forget(home, "ada")
    assert not home.refused.exists()


def test_the_file_of_refused_entries_is_deleted_when_no_line_is_left(home: Home) -> None:
    said = Feedback("f1", "nowhere", 1.0, "note", value=1, user_id=Pseudonyms.of(home).name("ada"))
    Spill(home).append([said])
    drain(home)
    forget(home, "ada")
    assert not home.refused.exists()


def test_older_entries_of_a_forgotten_user_are_refused_and_later_ones_are_kept(home: Home) -> None:
    name = Pseudonyms.of(home).name("ada")
    before = run("late", SECRET, user_id=name)
    with agentpref.Log(home.path) as log:
        log.record(asked("hello"), "yes", user_id="ada")
        log.flush()
        forget(home, "ada")
        back = log.record(asked("hello again"), "yes", user_id="ada")
    with closing(connect(home)) as connection:
        store = Store(connection)
        with pytest.raises(ForgottenUser):
            store.add_run(before)
        assert [each.run_id for each in store.runs("default")] == [back]
        between = run("between", SECRET, user_id=name)
        assert forget(home, "ada").runs == 1
        with pytest.raises(ForgottenUser):
            store.add_run(between)


# The weights that saw it


def learned(
    home: Home,
    folder: Path,
    number: int,
    pairs: dict[str, tuple[str, ...]],
    **roles: Role,
) -> str:
    """Keep an update that led from what serves to a new revision, and serve that."""
    registry = Registry(home)
    parent = registry.state().live
    adapter = write_adapter(folder / f"adapter-{number}", seed=number)
    identity = {"name": "tiny", "digest": "d", "template_digest": "t"}
    made = registry.publish(adapter, parent=parent, model=identity, training={})
    update = UpdateRow(
        update_id=f"u{number}",
        namespace="default",
        created_at=1.0,
        finished_at=2.0,
        parent=parent,
        candidate=made.revision_id,
        verdict="promoted",
        report={"checks": [{"name": "check mine", "words": f"it says {SECRET}"}]},
        pairs={pair: roles.get(pair, "new") for pair in pairs},
        sources=pairs,
        answers=[(prompt_of(asked(user)).id, "x", f"{user} says y") for user in ("bob", "ada")],
    )
    with closing(connect(home)) as connection:
        Updates(connection).add(update)
    registry.promote(made.revision_id)
    return made.revision_id


@pytest.fixture
def line(home: Home, tmp_path: Path) -> list[str]:
    """Three revisions in a line; Ada's words trained the second, and only proved the first."""
    said = {}
    with agentpref.Log(home.path) as log:
        for user in ("bob", "ada"):
            runs = [log.record(asked(user), text, user_id=user) for text in "xy"]
            said[user] = log.compare(*runs, winner="a", user_id="annotator")
    first = {"b": (said["bob"],), "h": (said["ada"],)}
    return [
        learned(home, tmp_path, 1, first, h="held_out"),
        learned(home, tmp_path, 2, {"a": (said["ada"], said["bob"])}),
        learned(home, tmp_path, 3, {"c": ("elsewhere",)}),
    ]


@pytest.mark.guarantee("privacy")
def test_answers_to_their_prompts_and_of_weights_that_saw_them_are_removed(
    home: Home, line: list[str]
) -> None:
    """The first update proved on Ada's words, and the others learned from them."""
    assert [one.after for one in home.answers("u1")] == ["bob says y", "ada says y"]
    forget(home, "ada")
    left = {name: [one.after for one in home.answers(name)] for name in ("u1", "u2", "u3")}
    assert left == {"u1": [], "u2": [], "u3": []}
    with agentpref.Log(home.path) as log:
        assert log.verify() == []


def test_answers_expire_with_their_prompts(home: Home, line: list[str]) -> None:
    time.sleep(0.01)
    expire(home, older_than=0.001, force=True)
    assert home.answers("u3") == []
    with agentpref.Log(home.path) as log:
        assert log.verify() == []


@pytest.mark.guarantee("privacy")
def test_revisions_trained_on_the_forgotten_are_named_and_tainted(
    home: Home, line: list[str]
) -> None:
    """Her own words, though it was somebody else who judged the answers to them."""
    before = time.time()
    assert forget(home, "ada").revisions == tuple(line[1:])
    marks = [revision.tainted_at for revision in Registry(home).list()]
    assert marks[0] is None
    assert before <= marks[1] == marks[2] <= time.time()


def test_the_commands_rebuild_from_the_last_clean_parent(home: Home, line: list[str]) -> None:
    found = forget(home, "ada")
    where = f"--home {home.path} --namespace default"
    assert found.commands == (
        f"agentpref adapters promote {line[0]} {where}",
        f"agentpref update --model tiny {where}",
    )
    again = forget(home, "ada")
    assert (again.revisions, again.commands) == ((), found.commands), "until it is done"
    value = orjson.loads(orjson.dumps(found.to_mapping()))
    assert value["rebuild"][0]["commands"] == list(found.commands)
    assert value["rebuild"][0]["clean"] == line[0]
    assert value["revisions"] == line[1:]


def test_a_user_whose_text_trained_nothing_taints_nothing(home: Home, line: list[str]) -> None:
    with agentpref.Log(home.path) as log:
        log.feedback(log.record(asked("eve"), "z", user_id="eve"), key="thumbs", score=1)
    assert forget(home, "eve").revisions == ()
    assert forget(home, "annotator").revisions == tuple(line), "who judged both"


def test_text_that_a_users_check_quoted_is_removed_from_the_reports(
    home: Home, line: list[str]
) -> None:
    forget(home, "ada")
    with closing(connect(home)) as connection:
        reports = [report for (report,) in connection.execute("SELECT report FROM updates")]
        sources = {*connection.execute("SELECT source FROM pair_source")}
    assert [SECRET in report for report in reports] == [False, False, False], "the third descends"
    assert ("elsewhere",) in sources, "the lineage stays"
    assert len(sources) == 3


def test_what_a_killed_removal_copied_of_the_refused_entries_is_removed(home: Home) -> None:
    """The copy was made when somebody else was forgotten, and the file may be gone since."""
    (home.path / ".refused.jsonl.0123456789abcdef").write_text(f"{SECRET} was refused")
    forget(home, "nobody")
    assert holding(home, SECRET) == []


def test_nothing_is_removed_while_an_update_runs(busy: Home) -> None:
    with exclusive(busy), pytest.raises(UpdateRunning, match="wait for it to end"):
        forget(busy, "ada")
    assert forget(busy, "ada").runs == 96


# Interrupted


@contextlib.contextmanager
def reading(home: Home):
    """Hold the state that the database has now, as a long report would."""
    with closing(connect(home)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM run").fetchone()
        yield


def test_a_reader_that_prevents_scrubbing_is_named_and_the_next_call_completes(
    busy: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    with (
        reading(busy),
        pytest.raises(NotKept, match=r"are deleted, but .* let it finish. Then run"),
    ):
        forget(busy, "ada")
    with closing(connect(busy)) as connection:
        assert connection.execute("SELECT count(*) FROM run").fetchone() == (97,)
    assert forget(busy, "ada").runs == 0
    assert holding(busy, SECRET) == []


FULL = """
import resource, sys
from agentpref.errors import NotKept
from agentpref.record.deletion.forget import forget
def tell(stage, done, total):
    if stage == "scrub":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    forget(sys.argv[1], "ada", progress=tell)
except NotKept as error:
    print(error)
"""


def test_a_full_disk_that_prevents_scrubbing_is_named_and_the_next_call_completes(
    busy: Home,
) -> None:
    command = [sys.executable, "-c", FULL, str(busy.path)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert words.startswith("the rows are deleted, but free pages of")
    assert words.endswith("Then run the same command again to complete the removal\n")
    assert forget(busy, "ada").runs == 0
    assert holding(busy, SECRET) == []


KILLED = """
import os, signal, sys
from agentpref.record.deletion import forget as module
home, where = sys.argv[1:]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def tell(stage, done, total):
    if where == f"{stage} {done}":
        die()
if where == "in the transaction":
    delete = module.delete
    module.delete = lambda connection: (delete(connection), die())
module.forget(home, "ada", progress=tell)
"""
STAGES = ("remove", "scrub")


@pytest.mark.guarantee("privacy")
@pytest.mark.parametrize(
    "where", ["in the transaction", *(f"{stage} {done}" for stage in STAGES for done in (0, 1))]
)
def test_the_next_call_completes_a_forgetting_that_was_killed_at_any_step(
    home: Home, line: list[str], where: str
) -> None:
    with agentpref.Log(home.path) as log:
        chat(log, "ada", f"{SECRET} chat")
    command = [sys.executable, "-c", KILLED, str(home.path), where]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    found = forget(home, "ada")
    assert found.runs == (0 if where in ("remove 1", "scrub 0", "scrub 1") else 14), "all or none"
    assert [rebuild.clean for rebuild in found.rebuild] == [line[0]]
    assert holding(home, f"{SECRET} chat") == []
    with agentpref.Log(home.path) as log:
        assert log.verify() == []


# As if they had never been here

USERS = ("ada", "bob", None)
TEXTS = st.sampled_from(["a", "b", "c"])
PROMPTS = st.lists(TEXTS, min_size=1, max_size=3)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.sampled_from(USERS), PROMPTS, TEXTS),
        st.tuples(st.just("judge"), st.sampled_from(USERS), st.integers(0, 9), st.none() | TEXTS),
        st.tuples(st.just("compare"), st.sampled_from(USERS), st.integers(0, 9), st.integers(0, 9)),
    ),
    max_size=14,
)


def play(store: Store, names: Pseudonyms, events: Any, *, without: str | None = None) -> None:
    """Write what happened, or what would have happened without somebody."""
    runs: list[tuple[str, Run]] = []
    for n, (kind, user, first, second) in enumerate(events):
        name = None if user is None else names.name(user)
        at = float(n)
        if kind == "run":
            made = run(f"r{n}", second, user_id=name, created_at=at, prompt=_prompt(first))
            runs.append((user, made))
            said: list[Any] = [made]
            about = [user]
        else:
            chosen = [runs[i % len(runs)] for i in (first, second) if isinstance(i, int) and runs]
            about = [user, *(owner for owner, _ in chosen)]
            said = _judged(kind, n, at, name, [made for _, made in chosen], second)
        if without is None or without not in about:
            add(store, *said)


def _prompt(texts: list[str]):
    roles = ("user", "assistant", "user")
    return prompt_of([{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)])


def _judged(kind: str, n: int, at: float, name: str | None, runs: list[Run], text: Any) -> list:
    if kind == "judge":
        fixed = None if text is None else {"role": "assistant", "content": text}
        judged = runs[:1]
        return [
            Feedback(f"f{n}", r.run_id, at, "k", 1.0, user_id=name, correction=fixed)
            for r in judged
        ]
    if len(runs) < 2 or runs[0].prompt.id != runs[1].prompt.id:
        return []
    return [Comparison(f"c{n}", at, runs[0].run_id, runs[1].run_id, "a", user_id=name)]


def state(home: Home) -> dict[str, Any]:
    with closing(connect(home)) as connection:
        store = Store(connection)
        assert examine(connection).problems == []
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        return {
            "runs": list(store.runs("default")),
            "feedback": list(store.feedback("default")),
            "comparisons": list(store.comparisons("default")),
            "messages": {*connection.execute("SELECT id, parent, body FROM message")},
            "stats": [store.stats(), store.stats("default")],
        }


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = Home.create(tmp_path_factory.mktemp("empty") / "home")
    connect(home).close()
    return home.path


@given(events=EVENTS)
@settings(max_examples=40)
def test_a_home_that_forgot_a_user_equals_one_that_never_knew_them(
    events: Any, empty: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = (Path(folder) / name for name in ("forgot", "never"))
        forgot, never = (Home(shutil.copytree(empty, path)) for path in paths)
        names = Pseudonyms.of(forgot)
        for home, without in ((forgot, None), (never, "ada")):
            with closing(connect(home)) as connection, transaction(connection):
                play(Store(connection), names, events, without=without)
        knew = state(forgot)
        removed = forget(forgot, "ada")
        left = state(forgot)
        assert left == state(never)
        for name in ("runs", "feedback", "comparisons", "messages"):
            assert getattr(removed, name) == len(knew[name]) - len(left[name])


def test_other_users_may_be_logged_during_a_removal(busy: Home) -> None:
    """What they share with her is theirs too, whenever it comes."""
    stop = threading.Event()
    written: list[str] = []

    def write() -> None:
        with agentpref.Log(busy.path) as log:
            while not stop.is_set():
                asks = f"{SECRET}-{len(written) % 8} asks"
                written.append(log.record(asked(asks), "x", user_id="bob"))
                log.flush()

    thread = threading.Thread(target=write)
    thread.start()
    forget(busy, "ada")
    stop.set()
    thread.join()
    with closing(connect(busy)) as connection:
        store = Store(connection)
        assert examine(connection).problems == []
        assert {run.run_id for run in store.runs("default")} >= {*written}


def test_an_older_backup_still_holds_the_text(busy: Home, tmp_path: Path) -> None:
    """What a guide must say, since no program can do anything about it."""
    backup = Home(shutil.copytree(busy.path, tmp_path / "backup"))
    forget(busy, "ada")
    assert holding(backup, SECRET)


def test_interrupted_training_is_deleted_whoever_is_forgotten(home: Home, tmp_path: Path) -> None:
    """Half-trained weights may have seen them, and nobody is to find out which did."""
    home.training.mkdir()
    for name in ("one.safetensors", "two.safetensors", "two.part"):
        (home.training / name).write_bytes(b"weights")
    candidate = home.path / ".candidate-of-a-killed-update"
    candidate.mkdir()
    (candidate / "adapter_model.safetensors").write_bytes(b"weights")
    forget(home, "nobody")
    assert not home.training.exists()
    assert not candidate.exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    home.training.symlink_to(elsewhere)
    forget(home, "nobody")
    assert not home.training.exists()
    assert (elsewhere / "mine").exists()


@pytest.mark.guarantee("privacy")
def test_the_same_weights_under_two_numbers_are_both_tainted(
    home: Home, line: list[str], tmp_path: Path
) -> None:
    """As a kill between publishing and the ledger left them in 0.1."""
    registry = Registry(home)
    twin = registry.publish(registry.get(line[1]).path, parent=line[0], model={}, training={})
    assert forget(home, "ada").revisions == (*line[1:], twin.revision_id)
    assert registry.get(twin.revision_id).tainted_at is not None
