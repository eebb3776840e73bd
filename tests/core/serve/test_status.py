"""Revisions in quarantine or pruned: what refuses them, and with which message."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import agentpref.serve.registry as module
from agentpref.errors import InvalidAdapter, RevisionError, UnknownRevision
from agentpref.home import Home
from agentpref.models.adapter_files import AdapterFiles
from agentpref.record.database import connect
from agentpref.record.updates import last_clean, rebuilds, taint
from agentpref.serve.backend import Revision
from agentpref.serve.folders import WEIGHTS_FILE
from agentpref.serve.pruning import mark_pruned
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}

Unfit = Callable[[Registry, str], object]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def line(registry: Registry, tmp_path: Path) -> list[str]:
    """Three revisions, each trained from the one before and then promoted."""
    names: list[str] = []
    for seed in range(3):
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
        parent = names[-1] if names else None
        revision = registry.publish(folder, parent=parent, model=IDENTITY, training={})
        names.append(revision.revision_id)
        registry.promote(names[-1])
    return names


def quarantined(registry: Registry, name: str) -> None:
    registry.quarantine(name, "it answers in Latin")


def pruned(registry: Registry, name: str) -> None:
    with closing(connect(registry.home)) as connection:
        mark_pruned(connection, name, 5.0)


def tainted(registry: Registry, name: str) -> None:
    with closing(connect(registry.home)) as connection:
        taint(connection, [name], 5.0)


UNFIT = pytest.mark.parametrize(
    ("unfit", "words"),
    [
        (quarantined, "is in quarantine: it answers in Latin; .*adapters release rev-000002"),
        (pruned, "was pruned: its files are gone"),
        (tainted, "is tainted"),
    ],
)


@UNFIT
def test_an_unfit_revision_is_neither_promoted_nor_made_a_canary(
    registry, line, unfit: Unfit, words: str
) -> None:
    registry.promote("base")
    unfit(registry, line[1])
    before = registry.state()
    for change in (registry.promote, lambda name: registry.canary(name, 0.5)):
        with pytest.raises(RevisionError, match=f"{line[1]} {words}"):
            change(line[1])
    assert registry.state() == before


@UNFIT
def test_a_rollback_passes_over_unfit_revisions(registry, line, unfit: Unfit, words) -> None:
    unfit(registry, line[1])
    assert registry.previous() == line[0]
    assert registry.rollback().live == line[0]
    assert registry.rollback().live is None


@UNFIT
def test_a_rollback_never_stays_at_the_live_revision(registry, line, unfit: Unfit, words) -> None:
    registry.promote(line[1])
    registry.promote(line[2])
    unfit(registry, line[1])
    assert registry.rollback().live == line[0], "not to what is live already"
    assert registry.previous() is None


@UNFIT
def test_a_rollback_from_the_base_stays_there_when_no_revision_may_serve(
    registry, line, unfit, words
):
    registry.promote("base")
    for name in line:
        unfit(registry, name)
    assert registry.previous() is None
    assert registry.rollback().live is None


@UNFIT
def test_a_rebuild_starts_from_a_revision_that_may_serve(
    registry, line, unfit: Unfit, words
) -> None:
    tainted(registry, line[2])
    unfit(registry, line[1])
    with closing(connect(registry.home)) as connection:
        (rebuild,) = rebuilds(connection, registry.home)
        assert last_clean(connection, line[2]) == rebuild.clean == line[0]
    assert rebuild.tainted == (line[2],)


def test_only_a_tainted_live_revision_needs_a_rebuild(registry, line) -> None:
    quarantined(registry, line[2])
    with closing(connect(registry.home)) as connection:
        assert rebuilds(connection, registry.home) == ()


@pytest.mark.parametrize("unfit", [quarantined, pruned])
def test_a_router_asks_whether_a_revision_may_be_loaded(registry, line, unfit: Unfit) -> None:
    revision = registry.get(line[0])
    registry.require_fit(revision, untainted=False)
    unfit(registry, line[0])
    with pytest.raises(RevisionError, match=line[0]):
        registry.require_fit(revision, untainted=False)


def test_a_revision_that_is_pruned_during_a_promotion_is_reported_as_pruned(
    registry, line, monkeypatch
) -> None:
    registry.promote("base")
    check = module.check_published

    def prune_and_check(revision: Revision) -> AdapterFiles:
        assert line[0] in registry.prune(keep=1).removed
        return check(revision)

    monkeypatch.setattr(module, "check_published", prune_and_check)
    with pytest.raises(RevisionError, match=f"{line[0]} was pruned"):
        registry.promote(line[0])


def test_a_quarantine_records_its_time_and_reason(registry, line) -> None:
    assert registry.get(line[0]).quarantined_at is None
    first = registry.quarantine(line[0], " it answers in Latin\n")
    assert first == registry.get(line[0])
    assert first.quarantined_at is not None
    assert first.quarantine_reason == "it answers in Latin"
    assert registry.quarantine(line[0], "something else") == first, "it stays the first"
    assert [bool(revision.quarantined_at) for revision in registry.list()] == [True, False, False]


def test_a_quarantine_does_not_change_what_serves(registry, line) -> None:
    before = registry.state()
    registry.quarantine(line[2], "it answers in Latin")
    assert registry.state() == before


def test_a_quarantine_needs_a_revision_and_a_reason(registry, line) -> None:
    with pytest.raises(RevisionError, match="has no reason"):
        registry.quarantine(line[0], " ")
    for call in (lambda name: registry.quarantine(name, "why"), registry.release):
        with pytest.raises(UnknownRevision):
            call("rev-000009-0123456789ab")
        with pytest.raises(UnknownRevision):
            call("base")


def test_a_released_revision_serves_again(registry, line) -> None:
    registry.quarantine(line[0], "it answers in Latin")
    released = registry.release(line[0])
    assert released == registry.get(line[0])
    assert released.quarantined_at is released.quarantine_reason is None
    assert registry.promote(line[0]).live == line[0]
    assert registry.release(line[0]) == released, "twice does nothing"


def test_a_broken_revision_is_not_released(registry, line) -> None:
    file = registry.get(line[0]).path / WEIGHTS_FILE
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:-1])
    registry.quarantine(line[0], "its weights are broken")
    with pytest.raises(InvalidAdapter, match=WEIGHTS_FILE):
        registry.release(line[0])
    assert registry.get(line[0]).quarantined_at is not None
    file.write_bytes(whole)
    assert registry.release(line[0]).quarantined_at is None


def test_a_pruned_revision_is_not_released(registry, line) -> None:
    registry.quarantine(line[0], "it answers in Latin")
    pruned(registry, line[0])
    with pytest.raises(RevisionError, match="was pruned"):
        registry.release(line[0])
    assert registry.get(line[0]).quarantined_at is not None


def test_a_released_revision_stays_tainted(registry, line) -> None:
    tainted(registry, line[0])
    registry.quarantine(line[0], "it answers in Latin")
    registry.release(line[0])
    with pytest.raises(RevisionError, match="is tainted"):
        registry.promote(line[0])
