"""Refuse a broken adapter before an engine loads it.

Engines accept much in silence: vLLM answers 200 to NaN weights, half-width tensors and a wrong base
model; peft ignores missing keys and settings that it does not know. So the files, settings, names,
shapes and every single number are checked here, with numpy and without an engine. Each refusal
names the file, the setting or the tensor. Each check returns the bytes that it checked, for the
caller to use: the files themselves may change at any time.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from agentpref.errors import InvalidAdapter, WrongBase
from agentpref.models.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    read_adapter,
    read_plain,
    readable,
)
from agentpref.serve.backend import Revision
from agentpref.serve.folders import (
    ADAPTER_FILES,
    FORMAT,
    MANIFEST_FILE,
    encode,
    is_named_by_content,
)
from agentpref.serve.tensors import (
    Shape,
    Tensor,
    check_scaling,
    largest_numbers,
    read_tensors,
    shortened,
)
from agentpref.types import LORA_RANKS

# AutoPeftModel imports this module for the class of the base. peft writes it where there is no
# task_type, and Unsloth adds a flag.
_LIBRARY = re.compile(r"transformers\.models\.\w+\.modeling_\w+", re.ASCII)
_MAPPED = {"parent_library": str, "base_model_class": str, "unsloth_fixed": bool}
_NAMES = ("base_model_name_or_path", "revision", "peft_version")
# Settings that an empty list or mapping does not turn off. In peft, an empty `kasa_config` means
# KaSA with its defaults, which changes the base model's own weights for good.
_NEVER_EMPTY = frozenset(
    {
        "alora_invocation_tokens", "arrow_config", "bias", "corda_config", "eva_config",
        "kasa_config", "layer_replication", "layers_to_transform", "lora_ga_config",
        "megatron_config", "monteclora_config", "trainable_token_indices", "use_bdlora",
        "velora_config",
    }
)  # fmt: skip

# Layers that engines share with the embeddings, or pad.
_OUTPUTS = frozenset({"lm_head", "embed_out"})
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def check_revision(
    revision: Revision,
    *,
    base: Mapping[str, Any] | None = None,
    layers: Mapping[str, Shape] | None = None,
) -> AdapterFiles:
    """Check a published revision: its folder, its digests, its base model and its adapter.

    Args:
        revision: as the registry returns it; its files must match its manifest.
        base: ``digest`` and ``template_digest`` of the model that is to serve it, where known.
        layers: (out, in) of each linear layer of that model, by module name, where known.

    Returns:
        The bytes that were checked: use these, and do not read the files again.

    Raises:
        InvalidAdapter: something is missing, edited, unsupported or not finite.
        WrongBase: it was trained on another base model, tokenizer or chat template.
        NotKept: a file cannot be read.
    """
    files = check_published(revision)
    trained_on, loaded = revision.manifest.get("base", {}), base or {}
    for key, what in (("digest", "base model"), ("template_digest", "tokenizer or chat template")):
        if base is not None and trained_on.get(key) != base[key]:
            given = "chat_template_kwargs"
            raise WrongBase(
                f"{revision.revision_id} was trained on another {what} "
                f"({trained_on.get('name')!r}, {key} {str(trained_on.get(key))[:12]}, "
                f"{given} {trained_on.get(given, {})}) than the one loaded "
                f"({loaded.get('name')!r}, {base[key][:12]}, {loaded.get(given, {})}); load the "
                f"base it was trained on, with its {given}, or train a new revision"
            )
    check_bytes(files, layers=layers)
    return files


def check_published(revision: Revision) -> AdapterFiles:
    """Check that a revision's files are those that were published, and return their bytes.

    Raises:
        InvalidAdapter: a file is missing, edited, a link, or does not belong there.
        NotKept: a file cannot be read.
    """
    folder, manifest = revision.path, revision.manifest
    if folder.name != revision.revision_id:
        raise InvalidAdapter(
            f"{revision.revision_id} is in the folder {folder}; publish it through the registry"
        )
    if manifest.get("format") != FORMAT:
        raise InvalidAdapter(
            f"{revision.revision_id} has manifest format {manifest.get('format')!r}, this "
            f"agentpref reads {FORMAT}; upgrade agentpref"
        )
    if not is_named_by_content(revision.revision_id, manifest):
        raise InvalidAdapter(
            f"{revision.revision_id} is not the name of the digests in its manifest: somebody "
            f"edited it; restore the home from a backup, or roll back"
        )
    names = (*ADAPTER_FILES, MANIFEST_FILE)
    with readable(folder):
        if not folder.is_dir() or folder.is_symlink():
            raise InvalidAdapter(
                f"{folder} is missing or a symbolic link; publish the adapter again"
            )
        for file in folder.iterdir():
            if file.name not in names or file.is_symlink() or not file.is_file():
                printable = str(file).encode(errors="backslashreplace").decode()
                raise InvalidAdapter(
                    f"{printable} does not belong in a revision, which contains "
                    f"{', '.join(sorted(names))} as plain files; publish the adapter again"
                )
        for name in names:
            if not (folder / name).is_file():
                raise _edited(folder / name, "it is missing")
        files = read_adapter(folder)
        content = encode(manifest)
        if read_plain(folder / MANIFEST_FILE, len(content) + 1) != content:
            raise _edited(
                folder / MANIFEST_FILE,
                f"its sha256 is not {hashlib.sha256(content).hexdigest()[:12]}",
            )
    for name, digest in files.digests.items():
        published = manifest["files"].get(name)
        if digest != published:
            raise _edited(folder / name, f"its sha256 is not {str(published)[:12]}")
    return files


def _edited(file: Path, how: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"{file} is not the file that was published ({how}); restore it from a backup, or roll back"
    )


def check_adapter(folder: Path, *, layers: Mapping[str, Shape] | None = None) -> AdapterFiles:
    """Check the files of an adapter on their own, and return their bytes.

    Raises:
        InvalidAdapter: naming the file, the setting or the tensor that is wrong.
        NotKept: a file cannot be read.
        MissingDependency: numpy is not installed.
    """
    files = read_adapter(folder)
    check_bytes(files, layers=layers)
    return files


def check_bytes(files: AdapterFiles, *, layers: Mapping[str, Shape] | None = None) -> None:
    """Check an adapter's settings, names, shapes and numbers; raises like :func:`check_adapter`."""
    with _naming(files.folder / CONFIG_FILE):
        config = _read_config(files)
    with _naming(files.folder / WEIGHTS_FILE):
        tensors = read_tensors(files.weights)
        _check_layers(_adapted_layers(tensors, config["r"]), config["target_modules"], layers)
        largest = largest_numbers(files.weights, tensors)
    with _naming(files.folder / CONFIG_FILE):
        check_scaling(config, tensors, largest)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Refuse a file in which the block finds an error, and begin the message with its path."""
    try:
        yield
    except ValueError as error:
        raise InvalidAdapter(f"{file}: {error}") from error


def _read_config(files: AdapterFiles) -> dict[str, Any]:
    """Read an adapter's settings, and refuse all but plain LoRA, which every engine serves alike.

    Settings that are unknown must be off: engines ignore in silence what they do not implement.
    """
    try:
        config = files.settings()
    except ValueError as error:
        raise ValueError(f"is not readable ({error}); save the adapter again") from error
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    is_list = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    dropout = config.get("lora_dropout", 0)
    flags = ("fan_in_fan_out", "inference_mode", "init_lora_weights", "use_rslora")
    checks = [
        ("peft_type", config.get("peft_type") == "LORA", "LORA"),
        ("task_type", config.get("task_type") in (None, "CAUSAL_LM"), "CAUSAL_LM"),
        ("r", isinstance(rank, int) and rank in LORA_RANKS, f"one of {list(LORA_RANKS)}"),
        ("lora_alpha", _is_number(alpha) and alpha > 0, "a number above 0"),
        ("lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "a share below 1"),
        ("target_modules", is_list, "a list of module names"),
        ("bias", config.get("bias", "none") == "none", "none"),
        *((flag, isinstance(config.get(flag, True), bool), "true or false") for flag in flags),
        # The rest does not change what the two matrices mean, but loaders import what two name.
        ("auto_mapping", _is_built_in(config.get("auto_mapping")), "null, or name transformers'"),
        ("megatron_core", config.get("megatron_core") in (None, "megatron.core"), "null"),
        ("qalora_group_size", type(config.get("qalora_group_size", 0)) is int, "a whole number"),
        *((key, isinstance(config.get(key), str | None), "text or null") for key in _NAMES),
    ]
    known = {key for key, _, _ in checks}
    off = "off: every engine serves plain LoRA, and no other kind"
    checks += [(key, _is_off(key, config[key]), off) for key in config if key not in known]
    for key, is_allowed, allowed in checks:
        if not is_allowed:
            raise ValueError(f"{key} is {shortened(repr(config.get(key)))}, but must be {allowed}")
    return config


def _is_number(value: object) -> TypeGuard[float]:
    is_bool = isinstance(value, bool)
    return isinstance(value, int | float) and not is_bool and math.isfinite(value)


def _is_built_in(mapping: object) -> bool:
    """Whether peft's name for the class of a base names one of transformers' own, or none."""
    if mapping is None:
        return True
    if not isinstance(mapping, dict) or not mapping.keys() <= _MAPPED.keys():
        return False
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    return (
        all(type(value) is _MAPPED[key] for key, value in mapping.items())
        and _LIBRARY.fullmatch(library or "") is not None
        and (name or "").isidentifier()
    )


def _is_off(key: str, value: object) -> bool:
    if value is None or value is False:
        return True
    return value in ("", [], {}) and key not in _NEVER_EMPTY


def _adapted_layers(tensors: list[Tensor], rank: int) -> dict[str, Shape]:
    """Match each A with its B; return (out, in) of the layer that each pair adapts."""
    sides: dict[str, dict[str, Shape]] = {}
    for tensor in tensors:
        match = _LORA.fullmatch(tensor.name)
        if match is None:
            raise ValueError(f"{shortened(tensor.name)} is not a LoRA matrix of a linear layer")
        if match["module"].rpartition(".")[2] in _OUTPUTS:
            raise ValueError(
                f"{tensor.name} adapts the output layer, which engines share with the embeddings; "
                f"leave it out of target_modules"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.shape
    shapes: dict[str, Shape] = {}
    for module, pair in sides.items():
        if len(pair) < 2:
            raise ValueError(
                f"{module} has no lora_{'B' if 'A' in pair else 'A'}; save the adapter again"
            )
        a, b = pair["A"], pair["B"]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise ValueError(
                f"{module} has lora_A {a} and lora_B {b}, but rank {rank} asks for ({rank}, in) "
                f"and (out, {rank})"
            )
        shapes[module] = (b[0], a[1])
    return shapes


def _check_layers(
    adapted: Mapping[str, Shape], targets: list[str], layers: Mapping[str, Shape] | None
) -> None:
    """Require matrices of the right shape for each layer that the settings name, and no other.

    A target is a module's whole name, or its last parts.
    """

    def names(target: str, module: str) -> bool:
        return module == target or module.endswith("." + target)

    for target in targets:
        if not any(names(target, module) for module in adapted):
            raise ValueError(f"no tensor adapts {target}, which the settings name")
    for module, shape in adapted.items():
        if not any(names(target, module) for target in targets):
            raise ValueError(f"{module} is adapted, but the settings do not name it")
        found = shape if layers is None else layers.get(module)
        if found is None:
            raise ValueError(f"{module} is not a linear layer of the base model")
        if tuple(found) != shape:
            raise ValueError(
                f"{module} adapts a layer of (out, in) = {shape}, but the base model's is "
                f"{tuple(found)}"
            )
    for layer in layers or ():
        if layer not in adapted and any(names(target, layer) for target in targets):
            raise ValueError(f"{layer} has no tensors, though the settings name it")
