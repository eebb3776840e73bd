"""Damaged adapters and revisions are refused, and the error names the file or the tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from agentpref.errors import InvalidAdapter, NotKept, WrongBase
from agentpref.home import Home
from agentpref.serve.backend import Revision
from agentpref.serve.folders import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from agentpref.serve.registry import Registry
from agentpref.serve.tensors import read_tensors
from agentpref.serve.validate import check_adapter, check_revision
from agentpref.testing import write_adapter

LAYERS = {"model.layers.0.self_attn.q_proj": (16, 24), "model.layers.0.mlp.up_proj": (32, 24)}
BASE = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
UP_A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
UP_B = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"

Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", layers=LAYERS)


@pytest.fixture
def revision(tmp_path: Path, folder: Path) -> Revision:
    registry = Registry(Home.create(tmp_path / "home"))
    return registry.publish(folder, parent=None, model=BASE, training={})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def test_a_sound_adapter_passes_with_and_without_the_base_at_hand(folder: Path) -> None:
    check_adapter(folder)
    check_adapter(folder, layers={**LAYERS, "lm_head": (400, 24)})


def test_our_writer_and_reader_agree_with_safetensors(folder: Path) -> None:
    with safe_open(folder / WEIGHTS_FILE, "np") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {t.name: t.shape for t in read_tensors((folder / WEIGHTS_FILE).read_bytes())} == theirs
    assert theirs[UP_A] == (8, 24)
    assert theirs[UP_B] == (32, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 4}, "r is 4"),
        ({"r": [8]}, r"r is \[8\]"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300, so the scaling is .* must be from"),
        ({"lora_alpha": 1e-300}, r"lora_alpha is 1e-300, so the scaling is .* must be from"),
        ({"lora_alpha": 80_001, "r": 8}, r"the scaling is 10000\.1, but must be from"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future is 1"),
    ],
)
def test_settings_beyond_plain_lora_are_refused(folder: Path, changes: dict, named: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InvalidAdapter, match=named):
        check_adapter(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_scaling_with_which_numbers_overflow_is_refused(folder: Path, dtype: type) -> None:
    """Engines multiply the weights by it, in their own type."""
    file = folder / WEIGHTS_FILE
    largest = float(np.finfo(dtype).max)
    scaled = {name: np.full_like(t, largest / 4, dtype) for name, t in load_file(file).items()}
    save_file(scaled, file)
    edit_config(folder, lora_alpha=8)
    check_adapter(folder)
    edit_config(folder, lora_alpha=64)
    kind = "F16" if dtype is np.float16 else "F32"
    with pytest.raises(InvalidAdapter, match=rf"lora_alpha is 64, .* numbers that {kind} cannot"):
        check_adapter(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "none"},
        {"modules_to_save": []},
        {"use_dora": False},
        {"megatron_core": "megatron.core"},
    ],
)
def test_settings_that_are_off_pass(folder: Path, changes: dict) -> None:
    edit_config(folder, **changes)
    check_adapter(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(UP_B), "up_proj has no lora_B"),
        (lambda t: t.pop(UP_A), "up_proj has no lora_A"),
        (lambda t: t.update({UP_A: t[UP_A][:4]}), r"up_proj has lora_A \(4, 24\)"),
        (lambda t: t.update({UP_B: t[UP_B].ravel()}), r"lora_B \(256,\)"),
        (lambda t: t.update({UP_A: t[UP_A].astype("f8")}), "has dtype F64"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[UP_A]}),
            "lm_head.weight is not",
        ),
        (lambda t: (t.pop(UP_A), t.pop(UP_B)), "no tensor adapts model.layers.0.mlp.up_proj"),
        (
            lambda t: t.update({k.replace("up", "down"): v for k, v in t.items()}),
            "down_proj is adapted, but the settings",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_settings_are_refused(
    folder: Path, change: Callable[[Tensors], object], named: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(InvalidAdapter, match=named):
        check_adapter(folder)


def test_an_adapter_of_another_shape_than_the_base_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"q_proj adapts .* \(16, 24\), but .* \(16, 48\)"):
        check_adapter(folder, layers={**LAYERS, "model.layers.0.self_attn.q_proj": (16, 48)})
    with pytest.raises(InvalidAdapter, match=r"up_proj is not a linear layer"):
        check_adapter(folder, layers={"model.layers.0.self_attn.q_proj": (16, 24)})


def test_a_layer_that_the_settings_name_must_have_tensors(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "up_proj"])
    deeper = {name.replace("0", "1"): shape for name, shape in LAYERS.items()}
    check_adapter(folder, layers=LAYERS)
    with pytest.raises(InvalidAdapter, match=r"layers\.1\..* has no tensors"):
        check_adapter(folder, layers={**LAYERS, **deeper})


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_number_that_is_not_finite_is_refused(
    folder: Path, dtype: str, value: float
) -> None:
    rewrite(folder, dtype, lambda numbers: numbers)
    check_adapter(folder)
    rewrite(folder, dtype, lambda numbers: [*numbers[:-1], value])
    with pytest.raises(InvalidAdapter, match=r"up_proj.lora_B.weight contains .* not finite"):
        check_adapter(folder)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.floats(width=32), index=st.integers(0, 255))
def test_exactly_the_numbers_pass_that_are_finite_when_they_are_scaled(
    folder: Path, value: float, index: int
) -> None:
    """Weights of this adapter are multiplied by 2, its ``lora_alpha`` over its rank."""
    write_adapter(folder, layers=LAYERS)
    edit_tensors(folder, lambda t: t[UP_B].ravel().__setitem__(index, value))
    if abs(value) * 2 <= np.finfo(np.float32).max:
        check_adapter(folder)
    else:
        what = "that F32 cannot hold" if np.isfinite(value) else "not finite"
        with pytest.raises(InvalidAdapter, match=what):
            check_adapter(folder)


def rewrite(folder: Path, dtype: str, change: Callable[[list[float]], list[float]]) -> None:
    """Write the adapter's last tensor anew in some dtype, all others being left in float32."""
    pack = {
        "F32": lambda x: struct.pack("<f", x),
        "F16": lambda x: struct.pack("<e", x),
        "BF16": lambda x: struct.pack("<f", x)[2:],
    }[dtype]
    header: dict[str, object] = {}
    data = b""
    for name, tensor in sorted(
        load_file(write_adapter(folder, layers=LAYERS) / WEIGHTS_FILE).items()
    ):
        last = name == UP_B
        raw = tensor.tobytes()
        if last:
            raw = b"".join(map(pack, change(tensor.ravel().tolist())))
        offsets = [len(data), len(data) + len(raw)]
        entry = {"dtype": dtype if last else "F32", "shape": tensor.shape, "data_offsets": offsets}
        header[name] = entry
        data += raw
    table = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(table)) + table + data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data[:-4], "truncated"),
        (lambda data: data + b"pickle", "gaps"),
        (lambda data: data[:7], "not a safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "not a safetensors file"),
        (lambda data: data[:8] + b"x" + data[9:], "not a safetensors file"),
        (lambda data: data[:9] + b"x" + data[10:], "cannot be read as safetensors"),
        (lambda data: data.replace(b"data_offsets", b"data_offsetz"), "malformed"),
        (lambda data: struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
    ],
)
def test_a_damaged_weights_file_is_refused(
    folder: Path, damage: Callable[[bytes], bytes], named: str
) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InvalidAdapter, match=named):
        check_adapter(folder)


def test_pickles_and_links_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / WEIGHTS_FILE
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match="safe_serialization=True"):
        check_adapter(folder)
    weights.symlink_to(folder / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match="symbolic link"):
        check_adapter(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(InvalidAdapter, match="is not a folder"):
        check_adapter(link)


def test_a_published_revision_passes(revision: Revision) -> None:
    check_revision(revision, base=BASE, layers=LAYERS)


@pytest.mark.parametrize("key", ["digest", "template_digest"])
def test_another_base_is_refused(revision: Revision, key: str) -> None:
    with pytest.raises(WrongBase, match=rf"{revision.revision_id} .*, {key} "):
        check_revision(revision, base={**BASE, key: "e" * 64})


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE])
def test_one_changed_byte_is_refused(revision: Revision, name: str) -> None:
    file = revision.path / name
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidAdapter, match=name):
        check_revision(revision)


def test_an_extra_file_in_a_revision_is_refused(revision: Revision) -> None:
    (revision.path / "adapter_model.bin").touch()
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.bin does not belong"):
        check_revision(revision)


def test_a_linked_file_in_a_revision_is_refused(revision: Revision, tmp_path: Path) -> None:
    file = revision.path / WEIGHTS_FILE
    os.replace(file, tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(InvalidAdapter, match="does not belong"):
        check_revision(revision)


def test_a_revision_serves_from_its_own_folder_only(revision: Revision, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="is in the folder"):
        check_revision(replace(revision, path=tmp_path))
    revision.path.rename(tmp_path / revision.revision_id)
    with pytest.raises(InvalidAdapter, match="is missing"):
        check_revision(revision)
    revision.path.symlink_to(tmp_path / revision.revision_id)
    with pytest.raises(InvalidAdapter, match="symbolic link"):
        check_revision(revision)


@pytest.mark.parametrize(
    ("error", "refusal", "words"),
    [
        (
            FileNotFoundError(2, "No such file", "weights"),
            InvalidAdapter,
            "weights was removed",
        ),
        (PermissionError(13, "Permission denied", "weights"), NotKept, "weights cannot be read"),
        (OSError(5, "Input/output error"), NotKept, r"rev-\S+ cannot be read \(Input/output error"),
    ],
)
def test_a_file_that_disappears_or_cannot_be_read_is_reported(
    revision: Revision, monkeypatch: pytest.MonkeyPatch, error, refusal, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "open", fail)
    for check in (lambda: check_revision(revision), lambda: check_adapter(revision.path)):
        with pytest.raises(refusal, match=words):
            check()


def test_a_manifest_of_another_format_is_refused(revision: Revision) -> None:
    newer = replace(revision, manifest={**revision.manifest, "format": 2})
    with pytest.raises(InvalidAdapter, match="upgrade agentpref"):
        check_revision(newer)


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "os", "base_model_class": "system"},
        {"parent_library": "transformers.models.llama.modeling_llama\n", "base_model_class": "A"},
        {"parent_library": "transformers.models.llama", "base_model_class": "A"},
        {"parent_library": "transformers.utils.hub", "base_model_class": "A"},
        {"parent_library": "transformers.models.llama.modeling_llama", "base_model_class": "A.b"},
        {"parent_library": "transformers.models.llama.modeling_llama"},
        {"parent_library": ["os"], "base_model_class": "A"},
        {"base_model_class": "A", "parent_library": None},
        {"own": "module"},
        "os",
        [],
    ],
)
def test_an_adapter_that_names_a_module_to_import_is_refused(folder: Path, mapping: object) -> None:
    edit_config(folder, auto_mapping=mapping)
    with pytest.raises(InvalidAdapter, match=r"auto_mapping is .*must be null, or name transf"):
        check_adapter(folder)


@pytest.mark.parametrize("flag", [{}, {"unsloth_fixed": True}])
def test_what_peft_names_where_there_is_no_task_passes(folder: Path, flag: dict) -> None:
    named = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    edit_config(folder, auto_mapping=named | flag, task_type=None)
    check_adapter(folder)


@pytest.mark.parametrize(
    "changes",
    [{"megatron_core": "os"}, {"base_model_name_or_path": ["x"]}, {"revision": 1},
     {"peft_version": {}}, {"qalora_group_size": "x"}],
    ids=str,
)  # fmt: skip
def test_names_that_loaders_use_have_their_type(folder: Path, changes: dict) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InvalidAdapter, match=f"{next(iter(changes))} is"):
        check_adapter(folder)
