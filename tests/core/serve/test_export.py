"""Exported revisions: complete, byte for byte, loaded by plain peft, only into a free folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agentpref.errors import ConfigError, InvalidAdapter, NotKept, RevisionError, UnknownRevision
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.updates import taint
from agentpref.serve import registry as module
from agentpref.serve.backend import Revision
from agentpref.serve.folders import MANIFEST_FILE, WEIGHTS_FILE
from agentpref.serve.pruning import mark_pruned
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

IDENTITY = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def revision(registry: Registry, tmp_path: Path) -> Revision:
    folder = write_adapter(tmp_path / "adapter")
    return registry.publish(folder, parent=None, model=IDENTITY, training={})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".unfinished-" in path.name]


def test_an_export_is_the_revision_byte_for_byte(registry, revision, tmp_path) -> None:
    place = registry.export(revision.revision_id, tmp_path / "new" / "exported")
    assert place == tmp_path / "new" / "exported"
    assert contents(place) == contents(revision.path)
    assert MANIFEST_FILE in contents(place)
    assert place.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in place.iterdir()} == {0o644}
    assert unfinished(tmp_path) == []


def test_export_opens_no_folder_above_the_target(registry, revision, tmp_path, monkeypatch) -> None:
    """A user may not read the folder above their own: /home, of mode 0711."""
    (tmp_path / "user").mkdir()
    synced: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    registry.export(revision.revision_id, tmp_path / "user" / "exported")
    assert tmp_path / "user" in synced
    assert all(path.is_relative_to(tmp_path / "user") for path in synced)


def test_export_accepts_an_empty_folder(registry, revision, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    registry.export(revision.revision_id, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(revision.path)


def test_plain_peft_loads_an_export(registry, tmp_path, random_base) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(random_base)
    get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "trained"
    )
    revision = registry.publish(tmp_path / "trained", parent=None, model=IDENTITY, training={})
    place = registry.export(revision.revision_id, tmp_path / "exported")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_base), place)
    loaded = {
        name.replace(".default", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    saved = load_file(revision.path / WEIGHTS_FILE)
    assert loaded.keys() == saved.keys()
    assert all(loaded[name].equal(saved[name]) for name in saved)


def _full(place: Path, registry: Registry) -> Path:
    place.mkdir()
    (place / "thesis.txt").touch()
    return place


def _file(place: Path, registry: Registry) -> Path:
    place.touch()
    return place


def _link(place: Path, registry: Registry) -> Path:
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")
    return place


def _dangling(place: Path, registry: Registry) -> Path:
    place.symlink_to(place.parent / "nowhere")
    return place


def _inside(place: Path, registry: Registry) -> Path:
    return registry.home.adapters / "rev-000009-0123456789ab"


def _inside_by_dots(place: Path, registry: Registry) -> Path:
    return registry.home.path.parent / "x" / ".." / "home" / "adapters" / "mine"


def _inside_by_link(place: Path, registry: Registry) -> Path:
    place.symlink_to(registry.home.adapters)
    return place / "mine"


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (_full, "contains 'thesis.txt'"),
        (_file, "is not a folder"),
        (_link, "is not a folder"),
        (_dangling, "is not a folder"),
        (_inside, "inside the home"),
        (_inside_by_dots, "inside the home"),
        (_inside_by_link, "inside the home"),
    ],
)
def test_export_refuses_a_target_that_is_not_free(
    registry, revision, tmp_path, hostile: Callable[[Path, Registry], Path], words: str
) -> None:
    place = hostile(tmp_path / "target", registry)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=words):
        registry.export(revision.revision_id, place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_that_cannot_be_written_raises_not_kept(registry, revision, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotKept, match="file"):
        registry.export(revision.revision_id, tmp_path / "file" / "exported")


def test_an_edited_revision_is_not_exported(registry, revision, tmp_path) -> None:
    file = revision.path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(InvalidAdapter, match=WEIGHTS_FILE):
        registry.export(revision.revision_id, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.guarantee("serving")
def test_a_revision_that_changes_after_its_check_is_exported_as_it_was_checked(
    registry, revision, tmp_path, monkeypatch
) -> None:
    file, check = revision.path / WEIGHTS_FILE, module.check_published
    published = file.read_bytes()

    def check_and_edit(revision):
        files = check(revision)
        file.write_bytes(bytes(len(published)))
        return files

    monkeypatch.setattr(module, "check_published", check_and_edit)
    place = registry.export(revision.revision_id, tmp_path / "exported")
    assert (place / WEIGHTS_FILE).read_bytes() == published


def test_a_pruned_or_tainted_revision_is_not_exported(registry, revision, tmp_path) -> None:
    with pytest.raises(UnknownRevision):
        registry.export("base", tmp_path / "exported")
    registry.quarantine(revision.revision_id, "it answers in Latin")
    registry.export(revision.revision_id, tmp_path / "to look into")
    with closing(connect(registry.home)) as connection:
        taint(connection, [revision.revision_id], 5.0)
    with pytest.raises(RevisionError, match="is tainted"):
        registry.export(revision.revision_id, tmp_path / "exported")
    with closing(connect(registry.home)) as connection:
        connection.execute("UPDATE revision SET tainted_at = NULL")
        mark_pruned(connection, revision.revision_id, 5.0)
    with pytest.raises(RevisionError, match="was pruned"):
        registry.export(revision.revision_id, tmp_path / "exported")
