"""Refuse a broken adapter before an engine loads it.

Engines accept much in silence: vLLM answers 200 to NaN weights, half-width tensors and a wrong base
model; peft ignores missing keys and settings that it does not know. So the files, settings, names,
shapes and every single number are checked here, without torch and without an engine. Each refusal
names the file, the setting or the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from agentpref.errors import InvalidAdapter, NotKept, WrongBase
from agentpref.models.base_files import parse_object
from agentpref.serve.backend import Revision
from agentpref.serve.manifest import (
    ADAPTER_FILES,
    CONFIG_FILE,
    FORMAT,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    digest_file,
    encode,
)
from agentpref.serve.tensors import Shape, check_weights, shortened
from agentpref.types import LORA_RANKS

_MAX_CONFIG_BYTES = 1 << 20
# Settings that may have any value, since none of them changes what the two matrices mean.
_FREE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "megatron_core", "peft_version",
        "qalora_group_size", "revision",
    }
)  # fmt: skip
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


def check_revision(
    revision: Revision,
    *,
    base: Mapping[str, Any] | None = None,
    layers: Mapping[str, Shape] | None = None,
) -> None:
    """Check a published revision: its folder, its digests, its base model and its adapter.

    Args:
        revision: as the registry returns it; its files must match its manifest.
        base: ``digest`` and ``template_digest`` of the model that is to serve it, where known.
        layers: (out, in) of each linear layer of that model, by module name, where known.

    Raises:
        InvalidAdapter: something is missing, edited, unsupported or not finite.
        WrongBase: it was trained on another base model, tokenizer or chat template.
        NotKept: a file cannot be read.
    """
    check_published(revision)
    if base is not None:
        _check_base(revision, base)
    check_adapter(revision.path, layers=layers)


def check_published(revision: Revision) -> None:
    """Check that a revision's files are those that were published, byte for byte.

    Raises:
        InvalidAdapter: a file is missing, edited, a link, or does not belong there.
        NotKept: a file cannot be read.
    """
    folder, wanted = revision.path, {*ADAPTER_FILES, MANIFEST_FILE}
    if folder.name != revision.revision_id:
        raise InvalidAdapter(
            f"{revision.revision_id} is in the folder {folder}; publish it through the registry"
        )
    with _readable(folder):
        if not folder.is_dir() or folder.is_symlink():
            raise InvalidAdapter(
                f"{folder} is missing or a symbolic link; publish the adapter again"
            )
        for file in folder.iterdir():
            if file.name not in wanted or file.is_symlink() or not file.is_file():
                printable = str(file).encode(errors="backslashreplace").decode()
                raise InvalidAdapter(
                    f"{printable} does not belong in a revision, which contains "
                    f"{', '.join(sorted(wanted))} as plain files; publish the adapter again"
                )
        _check_digests(revision)


def check_adapter(folder: Path, *, layers: Mapping[str, Shape] | None = None) -> None:
    """Check the files of an adapter on their own: settings, names, shapes and numbers.

    Raises:
        InvalidAdapter: naming the file, the setting or the tensor that is wrong.
        NotKept: a file cannot be read.
    """
    with _readable(folder):
        check_files(folder)
        config = _read_config(folder / CONFIG_FILE)
        rank, targets = config["r"], config["target_modules"]
        check_weights(folder / WEIGHTS_FILE, rank=rank, targets=targets, layers=layers)


def check_files(folder: Path) -> None:
    """Refuse a folder that is missing, or whose adapter files are missing or symbolic links."""
    if folder.is_symlink() or not folder.is_dir():
        raise InvalidAdapter(f"{folder} is not a folder; give the folder that peft saved to")
    for name in ADAPTER_FILES:
        file = folder / name
        if file.is_symlink():
            raise InvalidAdapter(f"{file} is a symbolic link; copy the file itself (cp -L)")
        if not file.is_file():
            raise InvalidAdapter(
                f"{folder} has no {name}; save the adapter with "
                f"save_pretrained(folder, safe_serialization=True)"
            )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Part a file that was removed while it was read from one that cannot be read at all."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidAdapter(
            f"{error.filename} was removed while it was read; publish the adapter again"
        ) from error
    except OSError as error:
        raise NotKept(
            f"{error.filename or folder} cannot be read ({error.strerror or error}); let this user "
            f"read it, or check the disk"
        ) from error


def _check_digests(revision: Revision) -> None:
    written_by = revision.manifest.get("format")
    if written_by != FORMAT:
        raise InvalidAdapter(
            f"{revision.revision_id} has manifest format {written_by!r}, this agentpref reads "
            f"{FORMAT}; upgrade agentpref"
        )
    check_files(revision.path)
    manifest = revision.path / MANIFEST_FILE
    if not manifest.is_file() or manifest.read_bytes() != encode(revision.manifest):
        raise InvalidAdapter(f"{manifest} is not the manifest published; publish it again")
    for name in ADAPTER_FILES:
        file, expected = revision.path / name, revision.manifest["files"].get(name)
        if digest_file(file) != expected:
            raise InvalidAdapter(
                f"{file} is not the file that was published (sha256 is not {str(expected)[:12]}); "
                f"restore it from a backup, or roll back"
            )


def _check_base(revision: Revision, base: Mapping[str, Any]) -> None:
    trained_on = revision.manifest.get("base", {})
    for key, what in (("digest", "base model"), ("template_digest", "tokenizer or chat template")):
        if trained_on.get(key) != base[key]:
            raise WrongBase(
                f"{revision.revision_id} was trained on another {what} "
                f"({trained_on.get('name')!r}, {key} {str(trained_on.get(key))[:12]}) than the one "
                f"loaded ({base.get('name')!r}, {base[key][:12]}); load the base it was "
                f"trained on, or train a new revision"
            )


def _read_config(file: Path) -> dict[str, Any]:
    """Read an adapter's settings, and refuse all but plain LoRA, which every engine serves alike.

    Settings that are unknown must be off: engines ignore in silence what they do not implement.
    """
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise InvalidAdapter(
            f"{file} has more than {_MAX_CONFIG_BYTES} bytes; save the adapter again"
        )
    try:
        config = parse_object(file.read_bytes())
    except ValueError as error:
        raise InvalidAdapter(f"{file} is not readable ({error}); save the adapter again") from error
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
    ]
    known = _FREE.union(key for key, _, _ in checks)
    others = ((key, _is_off(key, config[key])) for key in config if key not in known)
    off = "off: every engine serves plain LoRA, and no other kind"
    for key, is_allowed, allowed in [*checks, *((key, is_off, off) for key, is_off in others)]:
        if not is_allowed:
            value = shortened(repr(config.get(key)))
            raise InvalidAdapter(f"{file}: {key} is {value}, but must be {allowed}")
    return config


def _is_number(value: object) -> TypeGuard[float]:
    is_bool = isinstance(value, bool)
    return isinstance(value, int | float) and not is_bool and math.isfinite(value)


def _is_off(key: str, value: object) -> bool:
    if value is None or value is False:
        return True
    return value in ("", [], {}) and key not in _NEVER_EMPTY
