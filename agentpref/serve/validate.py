"""Refuse a broken adapter before any engine sees it.

Engines do not: vLLM answers 200 to NaN weights, half-width tensors and a wrong base; peft takes
missing keys in silence. So files, settings, names, shapes and every single number are checked here,
with the safetensors header and numpy alone. No torch, no engine, no database; nothing is changed.
Each refusal names the file or the tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentpref.errors import InvalidAdapter, MissingDependency, WrongBase
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

RANKS = frozenset({8, 16, 32, 64, 128, 256, 512})
"""The LoRA ranks that every engine loads."""

Shape = tuple[int, ...]

# Settings that may have any value, since none of them changes what the two matrices mean.
_FREE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type",
        "use_rslora",
    }
)  # fmt: skip
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Bytes per number, and the exponent bits that are all set in an infinity and in a NaN.
_DTYPES = {"F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
_BLOCK = 1 << 22
_MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header: ``begin`` and ``end`` are offsets into the file."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


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
    """
    _check_folder(revision)
    _check_digests(revision)


def check_adapter(folder: Path, *, layers: Mapping[str, Shape] | None = None) -> None:
    """Check the files of an adapter on their own: settings, names, shapes and values.

    Raises:
        InvalidAdapter: naming the file, the setting or the tensor that is wrong.
    """
    check_files(folder)
    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    tensors = read_header(weights)
    modules = _check_pairs(tensors, rank=config["r"], file=weights)
    _check_targets(modules, config["target_modules"], layers, weights)
    if layers is not None:
        _check_layers(modules, layers, weights)
    for tensor in tensors:
        _check_finite(weights, tensor)


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


def read_header(file: Path) -> list[Tensor]:
    """Read the table of a safetensors file, and check that it describes exactly that file.

    Raises:
        InvalidAdapter: for a file that is truncated, padded, or no safetensors at all.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise InvalidAdapter(f"{file} is no safetensors file; save the adapter again")
        header = _parse_object(stream.read(length), file)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = [_tensor(name, entry, start, file) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.begin)
    ends = [start, *(tensor.end for tensor in tensors)]
    if any(t.begin != end for t, end in zip(tensors, ends, strict=False)) or ends[-1] != size:
        raise InvalidAdapter(f"{file} is truncated or has gaps; copy or save the adapter again")
    return tensors


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
                f"{file} does not belong in a revision, which holds {', '.join(sorted(wanted))} "
                f"as plain files; publish the adapter again"
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


def _read_config(file: Path) -> dict[str, Any]:
    config = _parse_object(file.read_bytes(), file)
    _require(config.get("peft_type") == "LORA", file, "peft_type", config.get("peft_type"), "LORA")
    rank = config.get("r")
    ranked = isinstance(rank, int) and rank in RANKS
    _require(ranked, file, "r", rank, f"one of {sorted(RANKS)}")
    init = config.get("init_lora_weights", True)
    _require(isinstance(init, bool), file, "init_lora_weights", init, "true or false")
    alpha = config.get("lora_alpha")
    scales = isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0
    _require(scales, file, "lora_alpha", alpha, "a number above 0")
    targets = config.get("target_modules")
    listed = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    _require(bool(listed), file, "target_modules", targets, "a list of module names")
    for key, value in config.items():
        off = key in _FREE or not value or (key == "bias" and value == "none")
        _require(off, file, key, value, "off: plain LoRA is all that every engine serves")
    return config


def _require(holds: bool, file: Path, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidAdapter(f"{file}: {key} is {value!r}, but must be {allowed}")


def _parse_object(data: bytes, file: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidAdapter(f"{file} is not readable ({error}); save the adapter again") from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{file} holds no JSON object; save the adapter again")
    return value


def _tensor(name: str, entry: Any, start: int, file: Path) -> Tensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (start + int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidAdapter(f"{file}: the entry of {name} is malformed; save it again") from error
    if dtype not in _DTYPES:
        allowed = ", ".join(sorted(_DTYPES))
        raise InvalidAdapter(f"{file}: {name} has dtype {dtype}, but must be one of {allowed}")
    if min(shape, default=1) < 1 or end - begin != math.prod(shape) * _DTYPES[dtype][0]:
        raise InvalidAdapter(f"{file}: {name} does not hold {shape} numbers; save it again")
    return Tensor(name, dtype, shape, begin, end)


def _check_pairs(tensors: list[Tensor], *, rank: int, file: Path) -> dict[str, Shape]:
    """Match each A with its B; return (out, in) of the layer that each pair adapts."""
    sides: dict[str, dict[str, Shape]] = {}
    for tensor in tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            raise InvalidAdapter(f"{file}: {tensor.name} is no LoRA matrix of a linear layer")
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


def _check_finite(file: Path, tensor: Tensor) -> None:
    """Look at the exponent bits themselves: no cast, and so no dtype that numpy lacks."""
    try:
        import numpy as np
    except ImportError as error:
        raise MissingDependency(
            "checking weights needs numpy; install it with: pip install 'agentpref[train]'"
        ) from error
    width, exponent = _DTYPES[tensor.dtype]
    for block in _blocks(file, tensor):
        bits = np.frombuffer(block, dtype=f"<u{width}")
        if ((bits & exponent) == exponent).any():
            raise InvalidAdapter(
                f"{file}: {tensor.name} holds a number that is not finite; the training diverged"
            )


def _blocks(file: Path, tensor: Tensor) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(tensor.begin)
        for begin in range(tensor.begin, tensor.end, _BLOCK):
            yield stream.read(min(_BLOCK, tensor.end - begin))


def _short(digest: object) -> str:
    return str(digest)[:12]
