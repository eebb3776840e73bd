"""Refuse a broken adapter before any engine sees it.

Engines do not: vLLM answers 200 to NaN weights, half-width tensors and a wrong base; peft takes
missing keys in silence. So files, settings, names, shapes and every single number are checked here,
with the safetensors header and numpy alone. No torch, no engine, no database; nothing is changed.
Each refusal names the file or the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentpref.errors import InvalidAdapter, NotKept, WrongBase
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
from agentpref.serve.plain_lora import RANKS as RANKS
from agentpref.serve.plain_lora import read_config
from agentpref.serve.strict import shortened
from agentpref.serve.tensors import Shape, Tensor, check_finite
from agentpref.serve.tensors import read_header as read_header

# Layers that engines share with the embeddings, or pad.
_OUTPUTS = frozenset({"lm_head", "embed_out"})
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def check_revision(
    revision: Revision,
    *,
    base: Mapping[str, Any] | None = None,
    layers: Mapping[str, Shape] | None = None,
) -> None:
    """Check a published revision: its folder, its digests, its base and its adapter.

    Args:
        revision: as the registry tells it; its manifest is the truth that files are held to.
        base: ``digest`` and ``template_digest`` of the model that is to serve it, where known.
        layers: (out, in) of each linear layer of that model, by module name, where known.

    Raises:
        InvalidAdapter: for anything missing, edited, unsupported or not finite.
        WrongBase: for an adapter trained on another base model, tokenizer or chat template.
    """
    check_published(revision)
    if base is not None:
        check_base(revision, base)
    check_adapter(revision.path, layers=layers)


def check_published(revision: Revision) -> None:
    """Check that a revision's files are those that were published, byte for byte.

    Raises:
        InvalidAdapter: for a file that is missing, edited, linked or does not belong there.
        NotKept: for one that this user may not read, or the disk does not give.
    """
    with _readable(revision.path):
        _check_folder(revision)
        _check_digests(revision)


def check_adapter(folder: Path, *, layers: Mapping[str, Shape] | None = None) -> None:
    """Check the files of an adapter on their own: settings, names, shapes and values.

    Raises:
        InvalidAdapter: naming the file, the setting or the tensor that is wrong.
        NotKept: for a file that this user may not read, or the disk does not give.
    """
    with _readable(folder):
        _check_adapter(folder, layers)


def _check_adapter(folder: Path, layers: Mapping[str, Shape] | None) -> None:
    check_files(folder)
    config = read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    tensors = read_header(weights)
    modules = _check_pairs(tensors, rank=config["r"], file=weights)
    _check_targets(modules, config["target_modules"], layers, weights)
    if layers is not None:
        _check_layers(modules, layers, weights)
    for tensor in tensors:
        check_finite(weights, tensor)


def check_base(revision: Revision, base: Mapping[str, Any]) -> None:
    """Refuse a revision whose base model, tokenizer or template is not the one at hand."""
    trained_on = revision.manifest.get("base", {})
    for key, what in (("digest", "base model"), ("template_digest", "tokenizer or chat template")):
        if trained_on.get(key) != base[key]:
            raise WrongBase(
                f"{revision.revision_id} was trained on another {what} "
                f"({trained_on.get('name')!r}, {key} {_short(trained_on.get(key))}) than the one "
                f"loaded ({base.get('name')!r}, {_short(base[key])}); load the base it was "
                f"trained on, or train a new revision"
            )


def check_files(folder: Path) -> None:
    """Refuse a folder that is missing, or whose adapter files are missing or symbolic links."""
    if folder.is_symlink() or not folder.is_dir():
        raise InvalidAdapter(f"{folder} is no folder of its own; give the folder peft saved to")
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
    """Tell a file that went while it was read from one that cannot be read at all."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidAdapter(
            f"{error.filename} went while it was read; publish the adapter again"
        ) from error
    except OSError as error:
        raise NotKept(
            f"{error.filename or folder} cannot be read ({error.strerror or error}); let this user "
            f"read it, or check the disk"
        ) from error


def _check_folder(revision: Revision) -> None:
    folder = revision.path
    if folder.name != revision.revision_id:
        raise InvalidAdapter(
            f"{revision.revision_id} claims the folder {folder}; publish it through the registry"
        )
    if not folder.is_dir() or folder.is_symlink():
        raise InvalidAdapter(f"{folder} is gone or a symbolic link; publish the adapter again")
    wanted = {*ADAPTER_FILES, MANIFEST_FILE}
    for file in folder.iterdir():
        if file.name not in wanted or file.is_symlink() or not file.is_file():
            raise InvalidAdapter(
                f"{_printable(file)} does not belong in a revision, which holds "
                f"{', '.join(sorted(wanted))} as plain files; publish the adapter again"
            )


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
                f"{file} is not the file that was published (sha256 is not {_short(expected)}); "
                f"restore it from a backup, or roll back"
            )


def _check_pairs(tensors: list[Tensor], *, rank: int, file: Path) -> dict[str, Shape]:
    """Match each A with its B; return (out, in) of the layer that each pair adapts."""
    sides: dict[str, dict[str, Shape]] = {}
    for tensor in tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            raise InvalidAdapter(
                f"{file}: {shortened(tensor.name)} is no LoRA matrix of a linear layer"
            )
        if match["module"].rpartition(".")[2] in _OUTPUTS:
            raise InvalidAdapter(
                f"{file}: {tensor.name} adapts the output layer, which engines share with the "
                f"embeddings; leave it out of target_modules"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.shape
    return {module: _adapted(module, pair, rank, file) for module, pair in sides.items()}


def _adapted(module: str, pair: Mapping[str, Shape], rank: int, file: Path) -> Shape:
    for side in "AB":
        if side not in pair:
            raise InvalidAdapter(f"{file}: {module} has no lora_{side}; save the adapter again")
    a, b = pair["A"], pair["B"]
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise InvalidAdapter(
            f"{file}: {module} has lora_A {a} and lora_B {b}, but rank {rank} asks for "
            f"({rank}, in) and (out, {rank})"
        )
    return b[0], a[1]


def _check_targets(
    modules: Mapping[str, Shape],
    targets: list[str],
    layers: Mapping[str, Shape] | None,
    file: Path,
) -> None:
    """Every layer that the settings adapt has its tensors, and no other layer has any."""
    for target in targets:
        if not any(_adapts(target, module) for module in modules):
            raise InvalidAdapter(f"{file}: no tensor adapts {target}, which the settings name")
    for module in modules:
        if not any(_adapts(target, module) for target in targets):
            raise InvalidAdapter(f"{file}: {module} is adapted, but the settings do not name it")
    for layer in layers or ():
        if layer not in modules and any(_adapts(target, layer) for target in targets):
            raise InvalidAdapter(f"{file}: {layer} has no tensors, though the settings name it")


def _adapts(target: str, module: str) -> bool:
    return module == target or module.endswith("." + target)


def _check_layers(modules: Mapping[str, Shape], layers: Mapping[str, Shape], file: Path) -> None:
    for module, shape in modules.items():
        if module not in layers:
            raise InvalidAdapter(f"{file}: {module} is no linear layer of the base model")
        if tuple(layers[module]) != shape:
            raise InvalidAdapter(
                f"{file}: {module} adapts a layer of (out, in) = {shape}, but the base model's "
                f"is {tuple(layers[module])}"
            )


def _short(digest: object) -> str:
    return str(digest)[:12]


def _printable(path: Path) -> str:
    """A path as text that any terminal and log takes, whatever bytes are in its name."""
    return str(path).encode(errors="backslashreplace").decode()
