"""The ledger of updates, over a real database and real revisions."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import orjson
import pytest

from agentpref.errors import UpdateError
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.messages import as_json, prompt_of
from agentpref.record.store import Store
from agentpref.record.updates import UpdateRow, Updates
from agentpref.types import Run

NOTHING = UpdateRow("u0", "default", 0.0, 0.5, None, None, "refused", {})


@pytest.fixture
def connection(tmp_path):
    with closing(connect(Home.create(tmp_path / "home"))) as connection:
        yield connection


@pytest.fixture
def updates(connection):
    return Updates(connection)


@pytest.fixture
def add(connection, updates):
    """Add one update after the last; a candidate becomes a revision with its parent."""
    count = 0

    def call(
        verdict="promoted",
        *,
        parent=None,
        candidate=None,
        namespace="default",
        sources=None,
        **pairs,
    ):
        nonlocal count
        count += 1
        if candidate is not None:
            connection.execute(
                "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest)"
                " VALUES (?, ?, ?, ?, ?, '{}')",
                (candidate, namespace, count, parent, float(count)),
            )
        row = UpdateRow(
            f"u{count}",
            namespace,
            float(count),
            count + 0.5,
            parent,
            candidate,
            verdict,
            {"update_id": f"u{count}", "accuracy": {"bread": 0.75}, "checks": [{"value": None}]},
            pairs,
            {pair: (f"said-{pair}",) for pair in pairs} if sources is None else sources,
        )
        updates.add(row)
        return row

    return call


@pytest.fixture
def line(add):
    """Three revisions, each trained on the one before, and a side branch off the first."""
    add(candidate="r1", a="new", b="held_out")
    add(parent="r1", candidate="r2", c="new", a="replay")
    add(parent="r2", candidate="r3", d="new", e="held_out", c="replay")
    add("insufficient", parent="r1", candidate="side", f="new", a="replay")


def test_the_base_and_unknown_revisions_have_learned_nothing(updates, line):
    assert updates.learned_by(None) == set()
    assert updates.learned_by("r9") == set()


@pytest.mark.parametrize(
    ("revision", "learned"), [("r1", "ab"), ("r2", "abc"), ("r3", "abcde"), ("side", "abf")]
)
def test_a_revision_has_learned_the_pairs_of_its_ancestors(updates, line, revision, learned):
    assert updates.learned_by(revision) == set(learned)


def test_pairs_learned_after_the_rollback_target_are_new_again(updates, line):
    assert updates.learned_by("r3") - updates.learned_by("r1") == {"c", "d", "e"}


def test_replayed_pairs_are_not_learned(updates, add):
    add(candidate="r1", a="new")
    add(candidate="other", z="new", a="replay")
    assert updates.learned_by("other") == {"z"}


def test_pairs_of_a_refused_candidate_are_not_learned(updates, add):
    add("refused", a="new", b="held_out")
    assert updates.learned_by(None) == set()


def tried(updates, namespace, live):
    found = updates.last_attempt(namespace, live)
    return None if found is None else set(found.pairs)


@pytest.mark.parametrize("verdict", ["refused", "insufficient", "nothing_usable"])
def test_the_last_attempt_has_all_that_its_parent_has_not_learned(updates, add, verdict):
    last = add(verdict, parent="r1", a="new", b="held_out", c="replay", d="left_out", e="waiting")
    assert tried(updates, "default", "r1") == {"a", "b", "d"}
    found = updates.last_attempt("default", "r1")
    assert (found.update_id, found.report) == (last.update_id, last.report)
    assert (found.waiting, found.serves, found.before) == ({"e"}, False, None)
    assert found.left_out == {"d"}


def test_the_attempt_before_the_last_one_is_known_if_it_had_the_same_parent(updates, add):
    first = add("refused", parent="r1", a="new")
    add("refused", parent="r1", a="new", b="waiting")
    assert updates.last_attempt("default", "r1").before == first.report
    add("promoted", parent="r1", candidate="r2", a="new", b="waiting")
    found = updates.last_attempt("default", "r2")
    assert (found.serves, found.pairs, found.waiting) == (True, set(), {"b"})


@pytest.mark.parametrize("verdict", ["promoted", "insufficient"])
def test_what_was_left_out_remains_when_the_candidate_serves(updates, add, verdict):
    add(verdict, parent="r1", candidate="r2", a="new", b="held_out", c="replay", d="left_out")
    assert tried(updates, "default", "r2") == {"d"}


def test_only_the_last_attempt_on_the_same_parent_counts(updates, add):
    add("refused", parent="r1", a="new")
    add("refused", parent="r1", a="new", b="new")
    assert tried(updates, "default", "r1") == {"a", "b"}
    assert tried(updates, "default", "r2") is None
    assert tried(updates, "default", None) is None


def test_the_base_has_a_last_attempt(updates, add):
    add("refused", a="new")
    assert tried(updates, "default", None) == {"a"}


def test_a_promotion_that_was_rolled_back_is_no_attempt(updates, add):
    add("refused", a="new")
    add("promoted", candidate="r1", a="new")
    assert tried(updates, "default", None) is None


def test_the_last_attempt_is_that_of_the_namespace(updates, add):
    add("refused", a="new")
    add("promoted", candidate="r1", namespace="other")
    assert tried(updates, "default", None) == {"a"}
    assert tried(updates, "other", None) is None


@pytest.mark.parametrize("role", ["left_out", "waiting"])
def test_pairs_that_could_not_be_used_are_not_learned(updates, add, role):
    add("promoted", candidate="r1", a="new", b=role)
    assert updates.learned_by("r1") == {"a"}


def test_a_report_is_read_as_it_was_written(updates, add):
    first, second = add("refused"), add("insufficient")
    elsewhere = add(namespace="other")
    assert updates.report("default") == second.report
    assert updates.report("default", first.update_id) == first.report
    assert updates.report("other") == elsewhere.report


def test_a_missing_report_is_refused_by_name(updates, add):
    with pytest.raises(UpdateError, match=r"'default' has no update yet; run 'agentpref update'"):
        updates.report("default")
    add(namespace="other")
    with pytest.raises(UpdateError, match="no update 'u1'"):
        updates.report("default", "u1")


def test_an_update_and_its_pairs_are_kept_together_or_not_at_all(connection, updates):
    with pytest.raises(sqlite3.IntegrityError):
        updates.add(replace(NOTHING, pairs={"a": "new", "b": None}))
    with pytest.raises(UpdateError):
        updates.report("default")
    assert connection.execute("SELECT count(*) FROM update_pair").fetchone() == (0,)
    assert not connection.in_transaction


def test_an_update_id_is_kept_once(updates):
    updates.add(NOTHING)
    with pytest.raises(sqlite3.IntegrityError):
        updates.add(replace(NOTHING, verdict="promoted", pairs={"a": "new"}))
    assert tried(updates, "default", None) == set()


# From what somebody said to the revisions that saw it


@pytest.mark.parametrize(
    ("said", "revisions"),
    [
        ("a", ["r1", "r2", "r3", "side"]),
        ("c", ["r2", "r3"]),
        ("d", ["r3"]),
        ("f", ["side"]),
        ("df", ["r3", "side"]),
        ("be", []),
        ("z", []),
        ("", []),
    ],
)
def test_revisions_trained_on_a_source_include_their_descendants(updates, line, said, revisions):
    assert updates.revisions_trained_on([f"said-{pair}" for pair in said]) == revisions


def test_revisions_trained_on_a_source_include_replay(updates, add):
    add(candidate="r1", a="new")
    add(candidate="other", z="new", a="replay")
    assert updates.revisions_trained_on(["said-a"]) == ["r1", "other"]


def test_an_unpublished_candidate_is_not_listed(updates, add):
    add("refused", a="new")
    assert updates.revisions_trained_on(["said-a"]) == []


def test_any_source_of_a_pair_leads_to_its_revisions(updates, add):
    add(candidate="r1", sources={"a": ("f1", "c1")}, a="new")
    add(candidate="r2", parent="r1", sources={"a": ("f1", "f2")}, a="replay")
    for source in ("f1", "c1", "f2"):
        assert updates.revisions_trained_on([source]) == ["r1", "r2"]


def test_a_pair_without_recorded_sources_counts_if_it_is_young_enough(connection, updates, add):
    """A ledger that was begun before sources were kept: better one revision too many."""
    add(candidate="r1", sources={}, a="new")
    add(candidate="r2", sources={}, b="new")
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(
        "INSERT INTO feedback (feedback_id, run_id, created_at, key, source)"
        " VALUES ('f', 'r', 1.5, 'thumbs', 'human')"
    )
    assert updates.revisions_trained_on(["f"]) == ["r2"]
    assert updates.revisions_trained_on(["stranger"]) == []


CHECKS = [
    {"name": "check polite", "passed": False, "message": "it said: call Ada"},
    {"name": "kl budget", "passed": True, "message": "0.01 nats"},
]
OLD_NAMES = {"passed": "holds", "message": "words"}


@pytest.mark.parametrize("written_by", ["this version", "0.1.0"])
def test_messages_of_user_checks_are_removed_from_reports_that_used_a_source(updates, written_by):
    old = OLD_NAMES if written_by == "0.1.0" else {}
    stored = [{old.get(name, name): value for name, value in check.items()} for check in CHECKS]
    for name in "ab":
        updates.add(
            replace(
                NOTHING,
                update_id=name,
                namespace=name,
                report={"checks": stored},
                pairs={name: "new"},
                sources={name: (f"said-{name}",)},
            )
        )
    updates.forget_words(["said-a"])
    polite, budget = updates.report("a")["checks"]
    assert "Ada" not in polite["message"]
    assert (polite["name"], polite["passed"]) == ("check polite", False)
    assert budget == CHECKS[1]
    assert updates.report("b") == {"checks": CHECKS}


def test_messages_of_user_checks_are_removed_from_reports_of_what_descends(
    connection, updates, add, line
):
    """A candidate may answer in a check what an ancestor of it learned."""
    add("refused", parent="r3", g="new")
    add(candidate="other", h="new")
    connection.execute("UPDATE updates SET report = ?", (as_json({"checks": CHECKS}),))
    updates.forget_words(["said-c"])
    kept = {f"u{n}": "Ada" in str(updates.report("default", f"u{n}")) for n in range(1, 7)}
    assert [name for name, is_kept in kept.items() if is_kept] == ["u1", "u4", "u6"]


def test_answers_are_kept_with_an_update_and_read_with_their_prompts(connection, updates):
    asked = prompt_of([{"role": "user", "content": "At nine?"}])
    answer = {"role": "assistant", "content": "Yes."}
    Store(connection).add_run(Run("r", "default", 1.0, asked, answer))
    updates.add(replace(NOTHING, update_id="u", answers=[(asked.id, "No.", "Yes, at nine.")]))
    assert updates.answers("u") == [(asked, "No.", "Yes, at nine.")]
    assert updates.answers("another") == []
    connection.execute("DROP TABLE answers")
    assert updates.answers("u") == [], "a home of an older version, which is only read"


def test_answers_of_updates_that_may_have_learned_from_a_source_are_removed(
    connection, updates, add, line
):
    """As messages of checks are: a candidate may answer what an ancestor of it learned."""
    add("refused", parent="r3", g="new")
    rows = [(f"u{n}", 0, "p", "before", "after") for n in range(1, 6)]
    connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", rows)
    updates.forget_words(["said-c"])
    kept = [name for (name,) in connection.execute("SELECT update_id FROM answers ORDER BY 1")]
    assert kept == ["u1", "u4"]


def test_a_report_of_0_1_0_is_read_with_todays_names(updates):
    counts = {"new": 3, "old_examined": 2, "examined_thumbs": 1}
    report = {"counts": counts, "retokenised": {"ids_disagree": 4}}
    updates.add(replace(NOTHING, report=report))
    assert updates.report(NOTHING.namespace) == {
        "counts": {"new": 3, "old_evaluated": 2, "evaluated_thumbs": 1},
        "retokenized": {"ids_disagree": 4},
    }


def manifest(weights, update_id=None):
    files = {"adapter_model.safetensors": weights}
    return orjson.dumps({"files": files, "watermark": {"update_id": update_id}}).decode()


@pytest.fixture
def publish(connection):
    """Add a revision without an update in the ledger."""

    def call(name, *, at, parent=None, weights=None, update_id=None):
        connection.execute(
            "INSERT INTO revision (revision_id, namespace, seq, parent, created_at, manifest)"
            " VALUES (?, 'default', ?, ?, ?, ?)",
            (name, at, parent, at, manifest(weights or name, update_id)),
        )

    return call


def test_the_same_weights_under_another_number_learned_the_same(connection, updates, add, publish):
    add(candidate="r1", a="new")
    connection.execute("UPDATE revision SET manifest = ?", (manifest("same"),))
    publish("twin", at=8.0, weights="same")
    publish("child of the twin", at=9.0, parent="twin", weights="more")
    publish("stranger", at=10.0)
    assert updates.revisions_trained_on(["said-a"]) == ["r1", "twin", "child of the twin"]


def test_a_revision_that_an_update_published_before_it_was_killed_counts_as_its_candidate(
    updates, add, publish
):
    """Killed between publishing and the ledger, resumed under its id, and published again."""
    publish("first try", at=20.0, update_id="u1")
    add(candidate="r1", a="new")
    assert updates.revisions_trained_on(["said-a"]) == ["r1", "first try"]


def test_a_revision_whose_update_is_not_in_the_ledger_may_have_learned_all_since(
    connection, updates, publish
):
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute(
        "INSERT INTO feedback (feedback_id, run_id, created_at, key, source)"
        " VALUES ('said', 'run', 5.0, 'thumbs', 'human')"
    )
    publish("older", at=4.0, update_id="lost")
    publish("newer", at=6.0, update_id="lost too")
    publish("by hand", at=7.0)
    assert updates.revisions_trained_on(["said"]) == ["newer"]
    problems = [(p.table, p.key) for p in examine(connection).problems if "ledger" in p.what]
    assert problems == [("revision", "older"), ("revision", "newer")]


def test_looks_are_those_of_updates_of_the_same_parent_that_could_decide(connection, updates):
    def row(number, look, parent="r1", namespace="default", **report):
        gain = {} if look is None else {"gain": {"look": look}}
        rest = (parent, None, "insufficient", gain | report)
        updates.add(UpdateRow(f"u{number}", namespace, number, number + 0.5, *rest))

    assert updates.looks("default", "r1") == updates.looks("default", None) == 0
    row(1, 1)
    row(2, 1)  # which could not have decided
    row(3, 2)
    row(4, 7, parent=None)
    row(5, 8, namespace="other")
    assert updates.looks("default", "r1") == 2
    assert updates.looks("default", None) == 7
    older = {"config": {"gate": {"min_pairs": 200}}}
    row(6, None, counts={"new_evaluated": 199}, **older)
    row(7, None, counts={"new_evaluated": 200}, **older)
    row(8, None, counts={"new": 3})
    assert updates.looks("default", "r1") == 3


# Ordinary answers, which nobody judged


def test_ordinary_answers_are_never_learned_and_no_part_of_an_attempt(updates, add):
    add("refused", a="new", o="anchor", p="anchor_held_out")
    assert tried(updates, "default", None) == {"a"}
    add(candidate="r1", a="new", b="held_out", o="anchor", p="anchor_held_out")
    assert updates.learned_by("r1") == {"a", "b"}
    assert updates.tried_by("r1") == {"a", "b"}
    assert tried(updates, "default", "r1") == set()


def test_revisions_are_trained_on_the_run_of_an_ordinary_answer_unless_it_was_held_out(
    updates, add
):
    sources = {"o": ("run-o",), "p": ("run-p",)}
    add(candidate="r1", sources=sources, o="anchor", p="anchor_held_out")
    assert updates.revisions_trained_on(["run-o"]) == ["r1"]
    assert updates.revisions_trained_on(["run-p"]) == []
