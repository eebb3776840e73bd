"""Pruning a real home: what is removed, what stays, and what other processes do meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import ConfigError, NotKept, RevisionError
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.updates import taint
from agentpref.serve.backend import place_in_process
from agentpref.serve.pins import Pins, find_pins
from agentpref.serve.pruning import mark_pruned
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from agentpref.testing import write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
URL = "http://127.0.0.1:8000"
MEMORY = Path("/dev/shm")  # where an fsync costs nothing


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[..., list[str]]:
    folder = write_adapter(tmp_path / "adapter")

    def publisher(count: int, parent: str | None = None, to: Registry = registry) -> list[str]:
        return [
            to.publish(folder, parent=parent, model=IDENTITY, training={}).revision_id
            for _ in range(count)
        ]

    return publisher


def there(registry: Registry) -> set[str]:
    return {path.name for path in registry.home.adapters.iterdir()}


def never(place: str, revision_id: str) -> bool:
    return False


def test_the_newest_stay(registry, publish) -> None:
    names = publish(8)
    expected = sum(file.stat().st_size for file in (registry.get(names[0]).path).iterdir()) * 3
    done = registry.prune()
    assert done.removed == tuple(names[:3])
    assert done.kept == dict.fromkeys(names[3:], "one of the newest 5")
    assert done.bytes == expected
    assert there(registry) == set(names[3:])
    assert [bool(revision.pruned_at) for revision in registry.list()] == [True] * 3 + [False] * 5
    assert registry.prune().removed == (), "twice does nothing"
    assert registry.prune(keep=1).removed == tuple(names[3:7])


def test_a_dry_run_removes_nothing(registry, publish) -> None:
    names = publish(3)
    leaving = registry.home.adapters / ".pruning-1"
    leaving.mkdir()
    would = registry.prune(keep=1, dry_run=True)
    assert would.removed == tuple(names[:2])
    assert there(registry) == {*names, ".pruning-1"}
    assert [revision.pruned_at for revision in registry.list()] == [None] * 3
    assert registry.prune(keep=1) == would
    assert there(registry) == {names[2]}


def test_what_serves_and_what_a_rollback_goes_to_stay(registry, publish) -> None:
    (first,) = publish(1)
    second, third, canary, trial, newest = publish(5, parent=first)
    for name in (first, second, third):
        registry.promote(name)
    registry.canary(canary, 0.1)
    done = registry.prune(keep=1)
    assert done.removed == (first, trial)
    assert done.kept == {
        second: "what a rollback goes to",
        third: "live",
        canary: "canary",
        newest: "one of the newest 1",
    }
    assert registry.rollback().live == second


def test_the_last_clean_one_of_the_live_line_stays(registry, publish) -> None:
    (clean,) = publish(1)
    (second,) = publish(1, parent=clean)
    (third,) = publish(1, parent=second)
    registry.promote(third)
    with closing(connect(registry.home)) as connection:
        taint(connection, [second, third], 5.0)
    done = registry.prune(keep=1)
    assert done.kept == {clean: "the last clean one of the live line", third: "live"}
    assert done.removed == (second,)


def test_only_the_newest_stay_while_the_base_serves(registry, publish) -> None:
    names = publish(3)
    assert registry.prune(keep=2).removed == (names[0],)
    registry.promote(names[1])
    registry.rollback()
    assert registry.prune(keep=1).removed == (names[1],), "a rollback has given it up"


def test_another_namespace_is_left_alone(registry, publish) -> None:
    other = Registry(registry.home, namespace="other")
    theirs = publish(3, to=other)
    ours = publish(3)
    assert registry.prune(keep=1).removed == tuple(ours[:2])
    assert [revision.pruned_at for revision in other.list()] == [None] * 3
    assert other.prune(keep=1).removed == tuple(theirs[:2])


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_no_newest_revision_is_refused(registry, keep: int) -> None:
    with pytest.raises(ConfigError, match=f"keep is {keep}"):
        registry.prune(keep=keep)


@pytest.mark.guarantee("serving")
@pytest.mark.parametrize("place", [URL, place_in_process()], ids=["server", "process"])
def test_a_revision_that_a_living_process_uses_is_not_pruned(registry, publish, place: str) -> None:
    old, _ = publish(2)
    pins = Pins(registry.home.pins, place)
    pins.take(old)
    done = registry.prune(keep=1, ask=never)
    assert done.removed == ()
    assert done.kept[old] == f"in use at {place}"
    assert registry.get(old).pruned_at is None
    pins.close()
    assert registry.prune(keep=1, ask=never).removed == (old,)
    assert find_pins(registry.home.pins) == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (True, f"loaded at {URL}"),
        (None, f"perhaps loaded at {URL}, which does not say"),
        (False, None),
    ],
)
def test_an_engine_that_outlives_its_users_is_asked(registry, publish, answer, why) -> None:
    old, _ = publish(2)
    pins = Pins(registry.home.pins, URL)
    pins.take(old)
    pins.close()
    asked = []

    def ask(place: str, revision_id: str) -> bool | None:
        asked.append((place, revision_id))
        return answer

    done = registry.prune(keep=1, ask=ask)
    assert set(asked) == {(URL, old)}
    assert done.kept.get(old) == why
    assert (done.removed == (old,)) == (why is None) == (find_pins(registry.home.pins) == [])


def test_a_revision_stays_when_nobody_asks_its_engine(registry, publish) -> None:
    old, _ = publish(2)
    pins = Pins(registry.home.pins, URL)
    pins.take(old)
    pins.close()
    assert "does not say" in registry.prune(keep=1).kept[old]


def test_pins_of_dead_processes_are_removed(registry, publish) -> None:
    (only,) = publish(1)
    code = (
        "import os, sys; from pathlib import Path; from agentpref.serve.pins import Pins;"
        "Pins(Path(sys.argv[1]), sys.argv[2]).take(sys.argv[3]); os._exit(0)"
    )
    for place in (place_in_process(), URL):
        command = [sys.executable, "-c", code, str(registry.home.pins), place, only]
        subprocess.run(command, check=True)
    assert len(find_pins(registry.home.pins)) == 2
    registry.prune(dry_run=True)
    assert len(find_pins(registry.home.pins)) == 2
    registry.prune()
    assert [pin.place for pin in find_pins(registry.home.pins)] == [URL]


def test_a_router_that_pins_after_the_mark_is_refused_and_one_before_it_keeps_the_revision(
    registry, publish
) -> None:
    """Whichever flag is set first, no router loads a revision that is being removed."""
    names = publish(3)
    late = Pins(registry.home.pins, URL)
    early = Pins(registry.home.pins, "http://127.0.0.1:8001")
    for name in names[:2]:
        early.take(name)
    early.close()
    refused = []
    asked: set[str] = set()

    def ask(place: str, name: str) -> bool:
        """Act as a router between the first look at the pins, the mark, and the second look."""
        if name in asked:
            with pytest.raises(RevisionError, match="was pruned"):
                registry.require_fit(registry.get(name), untainted=False)
            refused.append(name)
        elif name == names[1]:
            late.take(name)
            registry.require_fit(registry.get(name), untainted=False)
        asked.add(name)
        return False

    done = registry.prune(keep=1, ask=ask)
    assert done.removed == (names[0],)
    assert refused == [names[0]]
    assert done.kept[names[1]] == f"in use at {URL}"
    check_revision(registry.get(names[1]))
    registry.require_fit(registry.get(names[1]), untainted=False)
    late.close()


def test_a_revision_that_is_promoted_during_a_pruning_stays(registry, publish) -> None:
    old, _ = publish(2)
    pins = Pins(registry.home.pins, URL)
    pins.take(old)
    pins.close()

    def ask(place: str, name: str) -> bool:
        registry.promote(old)
        return False

    assert registry.prune(keep=1, ask=ask).kept[old] == "live"
    check_revision(registry.get(old))


def test_a_marked_revision_cannot_be_promoted(registry, publish) -> None:
    old, _ = publish(2)
    pins = Pins(registry.home.pins, URL)
    pins.take(old)
    pins.close()
    looks = []

    def ask(place: str, name: str) -> bool:
        looks.append(name)
        if len(looks) == 2:
            with pytest.raises(RevisionError, match="was pruned"):
                registry.promote(old)
        return False

    assert registry.prune(keep=1, ask=ask).removed == (old,)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pruning_removes_its_mark(registry, publish, kind) -> None:
    old, _ = publish(2)
    pins = Pins(registry.home.pins, URL)
    pins.take(old)
    pins.close()
    looks = []

    def ask(place: str, name: str) -> bool:
        looks.append(name)
        if len(looks) == 2:
            raise kind
        return False

    with pytest.raises(kind):
        registry.prune(keep=1, ask=ask)
    check_revision(registry.get(old))
    registry.promote(old)


def test_a_folder_that_cannot_be_removed_is_named_and_stays(registry, publish, monkeypatch) -> None:
    old, _ = publish(2)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(NotKept, match=f"{old} cannot be written"):
            registry.prune(keep=1)
    registry.promote(old)


def test_a_pruning_finishes_what_a_crash_interrupted(registry, publish) -> None:
    marked, _ = publish(2)
    with closing(connect(registry.home)) as connection:
        mark_pruned(connection, marked, 5.0)
    (registry.home.adapters / ".pruning-0").mkdir()
    assert registry.prune(keep=1, dry_run=True).removed == (marked,)
    assert registry.prune(keep=1).removed == (marked,)
    assert marked not in there(registry)
    assert ".pruning-0" not in there(registry)


@pytest.mark.parametrize("answer", [False, True, None])
def test_a_pin_of_a_removed_revision_goes_once_its_engine_says_that_it_is_not_loaded(
    registry, publish, answer: bool | None
) -> None:
    """A pruning that was killed after it removed the folder leaves the pin."""
    removed, _ = publish(2)
    registry.prune(keep=1)
    with closing(Pins(registry.home.pins, URL)) as pins:
        pins.take(removed)
        registry.prune(keep=1, ask=never)
        assert len(find_pins(registry.home.pins)) == 1, "a process uses it"
    registry.prune(keep=1, ask=lambda place, name: answer)
    assert len(find_pins(registry.home.pins)) == (answer is not False)


def test_a_revision_that_a_crash_left_marked_is_unmarked_when_it_is_needed(
    registry, publish
) -> None:
    marked, _ = publish(2)
    with closing(connect(registry.home)) as connection:
        mark_pruned(connection, marked, 5.0)
    pins = Pins(registry.home.pins, URL)
    pins.take(marked)
    assert registry.prune(keep=1).kept[marked] == f"in use at {URL}"
    registry.promote(marked)
    pins.close()


def test_publishing_cleans_up_after_a_pruning_too(registry, publish) -> None:
    (registry.home.adapters / ".pruning-0").mkdir()
    publish(1)
    assert ".pruning-0" not in there(registry)


@pytest.mark.parametrize("look", [1, 2])
def test_two_prunings_at_once_do_not_undo_each_other(registry, publish, look: int) -> None:
    """At the second look, the other pruning finds a mark and takes it for that of a crash."""
    old, _ = publish(2)
    pins = Pins(registry.home.pins, URL)
    pins.take(old)
    pins.close()
    looks = []
    inner = []

    def ask(place: str, name: str) -> bool:
        looks.append(name)
        if len(looks) == look:
            inner.append(registry.prune(keep=1, ask=never))
        return False

    outer = registry.prune(keep=1, ask=ask)
    assert inner[0].removed == (old,)
    assert outer.kept[old] == "another pruning is at it"
    assert registry.get(old).pruned_at is not None
    assert old not in there(registry)


def test_a_revision_whose_folder_somebody_deleted_is_pruned_too(registry, publish) -> None:
    old, _ = publish(2)
    for file in registry.get(old).path.iterdir():
        file.unlink()
    registry.get(old).path.rmdir()
    done = registry.prune(keep=1)
    assert (done.removed, done.bytes) == ((old,), 0)
    assert registry.get(old).pruned_at is not None


@pytest.mark.guarantee("serving")
@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["publish", "promote", "canary", "rollback", "quarantine", "prune"]),
            st.integers(0, 9),
        ),
        max_size=25,
    )
)
def test_what_serves_is_intact_after_any_sequence_of_changes(steps: list[tuple[str, int]]) -> None:
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        registry = Registry(Home.create(Path(temporary) / "home"))
        folder = write_adapter(Path(temporary) / "adapter")
        for step, number in steps:
            names = [revision.revision_id for revision in registry.list()]
            _do(registry, folder, step, number, names[number % len(names)] if names else None)
            state = registry.state()
            for revision in registry.list():
                if revision.pruned_at is None:
                    check_revision(revision)
                else:
                    assert not revision.path.exists()
                    assert revision.revision_id not in (state.live, state.canary)
            generation = state.generation
            if state.live is not None:
                assert registry.rollback(expected_generation=generation).live != state.live
                with closing(connect(registry.home)) as connection:
                    _undo_rollback(connection, state)


def _do(registry: Registry, folder: Path, step: str, number: int, name: str | None) -> None:
    try:
        if step == "publish":
            registry.publish(folder, parent=name, model=IDENTITY, training={})
        elif step == "prune":
            registry.prune(keep=1 + number % 3)
        elif step == "rollback":
            registry.rollback()
        elif name is not None and step == "promote":
            registry.promote(name)
        elif name is not None and step == "canary":
            registry.canary(name, 0.5)
        elif name is not None:
            registry.quarantine(name, "why")
    except RevisionError:
        pass  # it may be refused, but never do harm


def _undo_rollback(connection, state) -> None:
    """Take back what was tried, history and all, so that the run goes on as before."""
    connection.execute("DELETE FROM serving_history WHERE generation > ?", (state.generation,))
    connection.execute(
        "UPDATE serving SET live = ?, canary = ?, weight = ?, generation = ?",
        (state.live, state.canary, state.weight, state.generation),
    )
