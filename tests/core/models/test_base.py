"""The base model: found offline, known again by its bytes, and refused where it cannot be used."""

from __future__ import annotations

import fnmatch
import json
import shutil

import pytest
import torch

from agentpref.errors import ModelNotFound, UnsupportedModel
from agentpref.models.base import digest_files, find_base, load_base


@pytest.fixture
def folder(random_base, tmp_path):
    """A copy of the base that a test may spoil."""
    return shutil.copytree(random_base, tmp_path / "base")


def identity(folder):
    base = load_base(str(folder))
    return base.digest, base.template_digest


def test_the_bundled_model_loads_without_a_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", None)
    base = load_base("tiny")
    assert 3e6 <= base.model.num_parameters() <= 8e6
    assert sum(file.stat().st_size for file in base.path.iterdir()) <= 8e6
    assert base.identity == {
        "name": "tiny",
        "digest": base.digest,
        "template_digest": base.template_digest,
    }


def test_a_base_is_frozen_float32_and_in_eval_mode_on_a_cpu(random_base):
    model = load_base(str(random_base)).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if not torch.cuda.is_available():
        assert model.dtype == torch.float32


def test_loading_writes_nothing_to_the_terminal(random_base, capfd):
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    load_base(str(random_base))
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == shown, "the host's setting is put back"


@pytest.mark.parametrize("name", ["agentpref/no-such-model", "no such name!", "/no/such/folder"])
def test_a_name_that_resolves_to_nothing_is_named(name):
    with pytest.raises(ModelNotFound, match=r"named '.*'.*check the network"):
        load_base(name)


def test_all_that_is_read_is_fetched_from_the_hub(folder, monkeypatch):
    fetched = []

    def fetch(name, *, allow_patterns):
        fetched.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_base("someone/model") == folder
    read = ["model-1.safetensors", "tokenizer.json", "merges.txt", "vocab.json", "tokenizer.model"]
    read += ["additional_chat_templates/rag.jinja", "added_tokens.json", "adapter_config.json"]
    for file in read:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in fetched), file


def test_weights_that_are_not_safetensors_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        load_base(str(folder))


def test_a_model_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModel, match=r"no chat template.*chat_template\.jinja"):
        load_base(str(folder))


def test_code_of_the_models_own_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}, "architectures": ["M"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("config.json", lambda f: f.write_text('{"model_type": "t5"}')),
        ("model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:1000])),
        ("tokenizer.json", lambda f: f.unlink()),
    ],
)
def test_what_transformers_cannot_load_is_refused_by_name(folder, file, spoil):
    spoil(folder / file)
    with pytest.raises(UnsupportedModel, match=str(folder)):
        load_base(str(folder))


def test_digests_are_of_the_bytes_and_not_of_the_place(random_base, folder):
    assert identity(random_base) == identity(folder)


def test_a_changed_weight_changes_the_digest_of_weights_alone(folder):
    weights, template = identity(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert identity(folder)[0] != weights
    assert identity(folder)[1] == template


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_changed_template_changes_the_digest_of_the_template_alone(folder, name):
    weights, template = identity(folder)
    file = folder / name
    file.write_text(file.read_text() + "\n")
    assert identity(folder)[0] == weights
    assert identity(folder)[1] != template


def test_digests_tell_names_sizes_and_contents_apart(tmp_path):
    def digest(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return digest_files(folder, ("*",))

    digests = [digest(a="xy"), digest(b="xy"), digest(a="x", b="y"), digest(a="", b="xy")]
    digests += [digest(a="xb\0y"), digest(a="xb\0\0y")]
    assert len(set(digests)) == 6
    assert digest(a="xy") == digests[0]


def test_a_folder_is_found_from_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_base("~/base") == folder
