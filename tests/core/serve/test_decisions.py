"""What people took back or hold, over a real registry: which revisions count, and what lifts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.errors import GenerationConflict, RevisionError
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.updates import UpdateRow, Updates, taint
from agentpref.serve.decisions import explain_taken_back, taken_back, taken_back_before
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
CONFIG = {"seed": 0, "gate": {"folds": 5}, "max_minutes": None}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[..., str]:
    """Publish weights (0, 1, …) as an update does that was trained on some pairs."""
    count = 0

    def call(weights: int, parent: str | None = None, *, pairs: str = "", **changes: object) -> str:
        nonlocal count
        count += 1
        own: Registry = changes.pop("registry", registry)
        folder = write_adapter(tmp_path / f"adapter-{count}", seed=weights)
        training = {"config": CONFIG | changes}
        revision = own.publish(folder, parent=parent, model=IDENTITY, training=training)
        name, at, roles = revision.revision_id, time.time(), dict.fromkeys(pairs, "new")
        row = UpdateRow(
            f"u{count}", own.namespace, at, at, parent, name, "passed", {}, roles, sources={}
        )
        with closing(connect(own.home)) as connection:
            Updates(connection).add(row)
        return name

    return call


def taken(registry: Registry) -> list[str]:
    with closing(connect(registry.home, readonly=True)) as connection:
        return [one.revision for one in taken_back(connection, registry.namespace)]


def repeats(registry: Registry, name: str, trained: str = "") -> str | None:
    with closing(connect(registry.home, readonly=True)) as connection:
        return taken_back_before(connection, registry.get(name), set(trained))


def explained(registry: Registry, fresh: str, **changes: object) -> str | None:
    digests = (IDENTITY["digest"], IDENTITY["template_digest"])
    with closing(connect(registry.home, readonly=True)) as connection:
        return explain_taken_back(
            connection, registry.namespace, set(fresh), CONFIG | changes, lambda: digests
        )


def test_each_rollback_takes_back_what_was_live(registry, publish) -> None:
    a, b = publish(0), publish(1)
    registry.promote(a)
    registry.promote(b)
    assert taken(registry) == []
    registry.rollback()
    assert taken(registry) == [b]
    registry.rollback()
    assert taken(registry) == [a, b]


def test_a_rollback_takes_back_the_canary_that_it_ends(registry, publish) -> None:
    a, b = publish(0), publish(1)
    registry.promote(a)
    registry.canary(b, 0.5)
    registry.rollback()
    assert taken(registry) == [a, b]


def test_to_promote_the_base_or_what_was_live_before_takes_back_what_was_live(
    registry, publish
) -> None:
    a, b, c = publish(0), publish(1), publish(2)
    registry.promote(a)
    registry.promote(b)
    registry.canary(c, 0.5)
    registry.promote(a)
    assert taken(registry) == [b], "the canary is not meant"
    registry.promote("base")
    assert taken(registry) == [a, b]
    registry.promote(b)
    assert taken(registry) == [a]


def test_the_end_of_a_canary_and_a_promotion_of_something_newer_take_nothing_back(
    registry, publish
) -> None:
    a, b = publish(0), publish(1)
    registry.canary(b, 0.5)
    registry.canary(None, 0)
    registry.promote(a)
    registry.promote(a)
    registry.promote(b)
    assert taken(registry) == []


@pytest.mark.guarantee("decisions")
@pytest.mark.parametrize("twin", [False, True])
def test_a_promotion_by_a_person_lifts_what_was_taken_back(registry, publish, twin: bool) -> None:
    a = publish(0)
    registry.promote(a)
    registry.rollback()
    b = publish(0)
    registry.canary(a, 0.1)  # a trial is no such word
    assert taken(registry) == [a]
    registry.promote(b if twin else a)
    assert taken(registry) == []
    registry.rollback()
    assert taken(registry) == [b if twin else a], "and the next rollback takes it back again"


def test_a_quarantine_counts_until_it_is_released_or_the_weights_are_promoted(
    registry, publish
) -> None:
    a, b = publish(0), publish(1)
    for name in (a, b):
        registry.quarantine(name, "it answers in Latin")
    assert taken(registry) == [a, b]
    registry.release(a)
    registry.promote(publish(1))
    assert taken(registry) == []


@pytest.mark.parametrize("by", [lambda r, a: r.rollback(), lambda r, a: r.promote(a)])
def test_to_leave_a_tainted_revision_takes_nothing_back(registry, publish, by) -> None:
    a, b = publish(0), publish(1)
    registry.promote(a)
    registry.promote(b)
    with closing(connect(registry.home)) as connection:
        taint(connection, [b], time.time())
        by(registry, a)
        taint(connection, [a], time.time() + 60)
    assert taken(registry) == []
    registry.rollback()
    assert taken(registry) == [a], "which was tainted later"


def test_decisions_are_those_of_the_namespace(registry, publish) -> None:
    a = publish(0)
    registry.promote(a)
    registry.rollback()
    other = Registry(registry.home, namespace="other")
    same = publish(0, registry=other, pairs="a")
    assert taken(other) == []
    assert repeats(other, same, "a") is None


def test_the_same_weights_repeat_a_revision_whatever_they_were_trained_with(
    registry, publish
) -> None:
    a = publish(0)
    registry.promote(a)
    registry.rollback()
    again = publish(0, pairs="xy", seed=9)
    assert repeats(registry, again, "xy") == f"it has the weights of {a}, which was rolled back"


def test_other_weights_repeat_a_revision_if_they_learned_nothing_else_in_the_same_way(
    registry, publish
) -> None:
    live = publish(7)
    registry.promote(live)
    a = publish(0, live, pairs="abc")
    registry.promote(a)
    registry.rollback()
    weaker = {"gate": {"folds": 2}, "max_minutes": 9}  # which determine no training
    assert f"{a} had not learned" in repeats(registry, publish(1, live, **weaker), "ab")
    assert repeats(registry, publish(2, live), "abcd") is None, "something new"
    assert repeats(registry, publish(3, live, seed=1), "abc") is None, "other settings"
    assert repeats(registry, publish(4, None), "abc") is None, "another parent"


def test_nothing_is_new_after_a_rollback_even_down_to_the_base(registry, publish) -> None:
    a = publish(0, pairs="ab")
    b = publish(1, a, pairs="cd")
    registry.promote(a)
    registry.promote(b)
    assert explained(registry, "cd") is None
    registry.rollback()
    words = explained(registry, "c")  # "d" was forgotten in between
    assert f"1 example was learned by {b}, which was rolled back" in words
    assert f"`agentpref adapters promote {b}` makes it live again" in words
    assert "`agentpref update --again`" in words
    assert explained(registry, "cde") is None, "something is new"
    assert explained(registry, "cd", seed=1) is None, "other settings"
    assert explained(registry, "cd", max_minutes=5.0) == explained(registry, "cd")
    registry.rollback()
    assert f"4 examples were learned by {b}" in explained(registry, "abcd")
    with closing(connect(registry.home)) as connection:
        taint(connection, [b], time.time())
    assert f"`agentpref adapters promote {a}` makes it" in explained(registry, "abcd")
    registry.quarantine(a, "it answers in Latin")
    assert "adapters promote" not in explained(registry, "abcd")


def test_to_promote_the_base_or_what_was_live_before_is_a_new_start(registry, publish) -> None:
    """As the commands of `forget` do; what was rolled back still does not come back as it was."""
    a = publish(0, pairs="ab")
    registry.promote(a)
    b = publish(1, a, pairs="cd")
    registry.promote(b)
    registry.rollback()
    assert explained(registry, "cd") is not None
    registry.promote("base")
    assert explained(registry, "abcd") is None
    registry.promote(a)
    assert f"{b} had not learned" in repeats(registry, publish(2, a), "cd")
    assert repeats(registry, publish(0, pairs="ab"), "ab") is None, "which is live again"
    c = publish(3, pairs="abcd")
    registry.promote(c)
    registry.rollback()
    assert f"learned by {c}" in explained(registry, "cd"), "until the next rollback"


def test_the_cure_of_a_quarantine_is_a_release(registry, publish) -> None:
    a = publish(0, pairs="a")
    registry.quarantine(a, "it answers in Latin")
    words = explained(registry, "a")
    assert "is in quarantine (it answers in Latin)" in words
    assert f"`agentpref adapters release {a}` ends the quarantine" in words


# Holds


def test_while_a_namespace_is_held_nothing_is_promoted_and_a_rollback_works(
    registry, publish
) -> None:
    a, b = publish(0), publish(1)
    registry.promote(a)
    registry.promote(b)
    registry.canary(a, 0.5)
    assert registry.held() is None
    state = registry.hold(" the auditors are here\n")
    assert registry.held().reason == "the auditors are here"
    assert state.generation == 4
    for change in (
        lambda: registry.promote(a),
        lambda: registry.promote("base"),
        lambda: registry.canary(a, 0.1),
    ):
        with pytest.raises(RevisionError, match=r"held \(the auditors are here\).*hold --end"):
            change()
    registry.canary(None, 0)
    assert registry.rollback().live == a
    registry.prune(keep=1)
    registry.lift()
    assert registry.held() is None
    assert registry.promote(a).live == a


def test_a_hold_keeps_its_time_and_reason_and_is_part_of_the_history(registry) -> None:
    before = registry.hold("first")
    assert registry.hold("second") == before
    assert registry.held() == (registry.history()[0].at, "first")
    assert registry.lift().generation == 2
    assert registry.lift().generation == 2, "there was nothing to end"
    registry.hold()
    assert registry.held().reason == ""
    assert [entry.action for entry in registry.history()] == ["hold", "lift", "hold"]
    with closing(connect(registry.home, readonly=True)) as connection:
        assert examine(connection).problems == []


def test_a_hold_compares_the_generation_and_is_that_of_the_namespace(registry, publish) -> None:
    registry.promote(publish(0))
    for change in (registry.hold, registry.lift):
        with pytest.raises(GenerationConflict):
            change(expected_generation=0)
    registry.hold(expected_generation=1)
    other = Registry(registry.home, namespace="other")
    assert other.held() is None
    other.promote(publish(0, registry=other))


def test_a_hold_leaves_the_way_back_as_it_is(registry, publish) -> None:
    a, b = publish(0), publish(1)
    registry.promote(a)
    registry.promote(b)
    registry.hold()
    registry.lift()
    assert registry.previous() == a
    assert registry.service(b).now == "live"
