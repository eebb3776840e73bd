"""Revisions trained on what was forgotten: marked for good, and never served again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from agentpref.errors import GenerationConflict, RevisionError, UnknownRevision
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.updates import last_clean, rebuilds, taint
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

IDENTITY = {"name": "my model", "digest": "d" * 64, "template_digest": "t" * 64}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "ho me"))


@pytest.fixture
def line(registry: Registry, tmp_path: Path) -> list[str]:
    """Three revisions, each trained from the one before and then promoted."""
    names: list[str] = []
    for seed in range(3):
        names.append(publish(registry, tmp_path, seed, names[-1] if names else None))
        registry.promote(names[-1])
    return names


def publish(registry: Registry, tmp_path: Path, seed: int, parent: str | None) -> str:
    folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed)
    return registry.publish(folder, parent=parent, model=IDENTITY, training={}).revision_id


def mark(registry: Registry, *names: str, at: float = 5.0) -> None:
    with closing(connect(registry.home)) as connection:
        taint(connection, names, at)


def cures(registry: Registry):
    with closing(connect(registry.home)) as connection:
        return rebuilds(connection, registry.home)


def test_a_taint_keeps_its_first_time(registry, line) -> None:
    assert registry.get(line[1]).tainted_at is None
    mark(registry, line[1])
    mark(registry, line[1], line[2], at=9.0)
    assert [revision.tainted_at for revision in registry.list()] == [None, 5.0, 9.0]


@pytest.mark.guarantee("privacy")
def test_a_tainted_revision_is_neither_promoted_nor_made_a_canary(registry, line) -> None:
    mark(registry, line[1], line[2])
    before = registry.state()
    for name in line[1:]:
        with pytest.raises(
            RevisionError, match=f"{name} is tainted.* promote {line[0]} --home [^`]*`"
        ):
            registry.promote(name)
        with pytest.raises(RevisionError, match="is tainted"):
            registry.canary(name, 0.5)
        with pytest.raises(RevisionError, match="is tainted"):
            registry.require_fit(registry.get(name), released=False)
    assert registry.state() == before, "what serves is the operator's to change"
    registry.require_fit(registry.get(line[0]), released=False)
    assert registry.promote(line[0]).live == line[0]
    with pytest.raises(RevisionError, match="is tainted"):
        registry.promote(line[2])


def test_the_base_is_the_last_clean_one_when_the_whole_line_is_tainted(registry, line) -> None:
    mark(registry, *line)
    with pytest.raises(
        RevisionError, match=r"go back to base, .*`agentpref adapters promote base --home [^`]*`"
    ):
        registry.promote(line[0])


def test_a_promotion_of_the_base_can_be_rolled_back(registry, line) -> None:
    registry.canary(line[0], 0.5)
    state = registry.promote("base")
    assert (state.live, state.canary, state.weight) == (None, None, 0.0)
    assert registry.live() is None
    assert registry.history()[-1].action == "promote"
    assert registry.previous() == line[2]
    assert registry.rollback().live == line[2]
    with pytest.raises(GenerationConflict):
        registry.promote("base", expected_generation=0)


def test_promoting_none_is_refused(registry, line) -> None:
    with pytest.raises(UnknownRevision, match="no revision None"):
        registry.promote(None)
    assert registry.state().live == line[2]


def test_a_rollback_passes_over_tainted_revisions(registry, line) -> None:
    mark(registry, line[1])
    assert registry.previous() == line[0]
    assert registry.rollback().live == line[0]
    assert registry.previous() is None, "the promotion that was passed over is undone too"
    assert registry.rollback().live is None
    with pytest.raises(RevisionError, match="nothing to roll back"):
        registry.rollback()


def test_a_rollback_can_always_reach_the_base(registry, line) -> None:
    registry.promote("base")
    mark(registry, *line)
    assert registry.previous() is None
    assert registry.rollback().live is None


def test_a_child_of_a_tainted_revision_is_tainted(registry, line, tmp_path) -> None:
    mark(registry, line[2])
    child = publish(registry, tmp_path, 7, line[2])
    assert registry.get(child).tainted_at == 5.0
    assert registry.get(publish(registry, tmp_path, 8, line[1])).tainted_at is None


def test_no_rebuild_is_needed_while_no_tainted_revision_serves(registry, line) -> None:
    assert cures(registry) == ()
    mark(registry, line[1])
    assert cures(registry) == ()


def test_a_rebuild_starts_from_the_last_clean_revision_of_the_live_line(registry, line) -> None:
    mark(registry, line[1], line[2])
    (rebuild,) = cures(registry)
    assert (rebuild.namespace, rebuild.tainted, rebuild.clean) == ("default", (line[2],), line[0])
    where = f"--home '{registry.home.path}' --namespace default"
    assert rebuild.commands == (
        f"agentpref adapters promote {line[0]} {where}",
        f"agentpref update --model 'my model' {where}",
    )
    registry.promote(line[0])
    assert cures(registry) == ()


def test_a_tainted_canary_is_ended_by_promoting_the_live_revision(registry, line, tmp_path) -> None:
    trial = publish(registry, tmp_path, 7, line[2])
    registry.canary(trial, 0.1)
    mark(registry, trial)
    (rebuild,) = cures(registry)
    assert (rebuild.tainted, rebuild.clean) == ((trial,), line[2])
    assert registry.promote(rebuild.clean).canary is None
    assert cures(registry) == ()


def test_each_namespace_is_rebuilt_separately(registry, line, tmp_path) -> None:
    other = Registry(registry.home, namespace="other")
    theirs = publish(other, tmp_path, 9, None)
    other.promote(theirs)
    mark(registry, line[2], theirs)
    found = [(rebuild.namespace, rebuild.clean) for rebuild in cures(registry)]
    assert found == [("default", line[1]), ("other", "base")]


def test_a_clean_revision_is_the_last_clean_one_of_its_line(registry, line) -> None:
    with closing(connect(registry.home)) as connection:
        assert last_clean(connection, line[2]) == line[2]


def test_the_weights_of_a_tainted_revision_are_tainted_under_a_new_number(
    registry, line, tmp_path
) -> None:
    mark(registry, line[2])
    again = publish(registry, tmp_path, 2, None)
    assert registry.get(again).tainted_at == 5.0
