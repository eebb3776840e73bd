"""Reads a base model's digests and layers from its files, and the headers of safetensors files.

A revision can thus be checked against a base model that another process runs, without torch and
transformers. The digests equal those that training writes into manifests; the linear layers come
from the headers of the weights.

A safetensors file begins with eight bytes of length and a JSON object. The JSON is read strictly,
since parsers differ in what they accept and in which of two equal keys they keep: one program could
check what another does not read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from agentpref.errors import UnsupportedModel
from agentpref.home import is_of_system, reading
from agentpref.models.base import base_digests, find_base, identity

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base model on disk.

    ``identity`` has the ``name``, ``digest`` and ``template_digest`` that manifests record.
    ``layers`` is (out, in) of each linear layer in the model's blocks, by the module's name in
    transformers, without the head and the embeddings, which no engine adapts. It is ``None`` where
    the tensors' names do not show what the modules are called and which are linear: for families
    not listed here, for quantized weights, and where a matrix fits no pattern of its family.
    """

    name: str
    path: Path
    identity: Mapping[str, Any]
    layers: Mapping[str, tuple[int, int]] | None


class _Family(NamedTuple):
    """Patterns of the names of a family's linear layers and of its other matrices."""

    linear: str
    others: str
    root: str = ""  # a prefix of the names in a causal model, which files of the bare model omit
    transposed: bool = False
    moved: tuple[str, str] | None = None  # a prefix of names in files, and what the model calls it


_LLAMA = _Family(
    r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight",
    r"(model\.embed_tokens|lm_head)\.weight",
)
_MIXTURE = _Family(
    r"model\.layers\.\d+\.(self_attn\.\w+|mlp\.\w+_proj)\.weight",
    _LLAMA.others
    + r"|model\.layers\.\d+\.(mlp|block_sparse_moe)\.(gate|experts\.\d+\.\w+)\.weight",
)
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(
        (
            "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi",
            "phi3", "qwen2", "qwen3", "smollm3",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("mixtral", "olmoe", "qwen3_moe"), _MIXTURE),
    "gemma3": _Family(
        r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight",
        r"(model\.)?(vision_tower|multi_modal_projector)\..+"
        r"|(model\.language_model\.embed_tokens|(language_model\.)?lm_head)\.weight",
        moved=("language_model.model.", "model.language_model."),
    ),
    "gpt2": _Family(
        r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight",
        r"transformer\.(wte|wpe)\.weight|lm_head\.weight|transformer\.h\.\d+\.attn\.bias",
        root="transformer.",
        transposed=True,
    ),
    "gpt_neox": _Family(
        r"gpt_neox\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.dense_\w+)\.weight",
        r"(gpt_neox\.embed_in|embed_out)\.weight|gpt_neox\.layers\.\d+\.attention\.bias",
    ),
    "falcon": _Family(
        r"transformer\.h\.\d+\.(self_attention\.(query_key_value|dense)|mlp\.dense_\w+)\.weight",
        r"(transformer\.word_embeddings|lm_head)\.weight",
    ),
}  # fmt: skip


class BaseSize(NamedTuple):
    """How large a base model is: its parameters, and what each rank of an adapter adds to them.

    Of a family that is not known here, all matrices count as linear layers: an upper bound.
    """

    parameters: int
    per_rank: int


def measure_base(path: Path) -> BaseSize:
    """Read the size of a base model from the headers of its files; raises like :func:`read_base`.

    >>> measure_base(find_base("tiny")).per_rank * 16  # parameters of an adapter of rank 16
    350208
    """
    shapes = _shapes(path)
    layers = _linear_layers(_read_object(path / _CONFIG), shapes)
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    sides = matrices if layers is None else layers.values()
    return BaseSize(sum(map(math.prod, shapes.values())), sum(map(sum, sides)))


def read_base(name: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> BaseFiles:
    """Read a base model's files.

    Args:
        name: the bundled ``"tiny"``, a folder, or a name on a model hub.
        chat_template_kwargs: what its chat template is always given.

    Raises:
        MissingDependency: the name is not a folder, and huggingface-hub is not installed.
        ModelNotFound: no model has the name.
        UnsupportedModel: files are missing or damaged.
    """
    path = find_base(name)
    config = _read_object(path / _CONFIG)
    arguments = dict(chat_template_kwargs or {})
    found = identity(name, *base_digests(path, arguments), arguments)
    return BaseFiles(name, path, found, _linear_layers(config, _shapes(path)))


def _linear_layers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, tuple[int, int]] | None:
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or "quantization_config" in config:
        return None
    layers: dict[str, tuple[int, int]] = {}
    for stored, shape in shapes.items():
        is_whole = stored.startswith((family.root, "lm_head."))
        name = stored if is_whole else family.root + stored
        if family.moved and name.startswith(family.moved[0]):
            name = family.moved[1] + name.removeprefix(family.moved[0])
        if re.fullmatch(family.linear, name) and len(shape) == 2:
            out, into = reversed(shape) if family.transposed else shape
            layers[name.removesuffix(".weight")] = (out, into)
        elif len(shape) > 1 and not re.fullmatch(family.others, name):
            return None
    return layers or None


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files that transformers reads."""
    shapes: dict[str, tuple[int, ...]] = {}
    files = _weight_files(folder)
    try:
        for file in files:
            for name, entry in read_header(file).tensors.items():
                shapes[name] = tuple(map(int, entry["shape"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and not is_of_system(error):
            raise
        raise UnsupportedModel(
            f"{file} cannot be read as safetensors ({error}); copy or save the model again"
        ) from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    whole = folder / _WEIGHTS
    if whole.is_file():
        return [whole]
    index = folder / _INDEX
    if not index.is_file():
        raise UnsupportedModel(
            f"{folder} has neither {_WEIGHTS} nor {_INDEX}; convert it with save_pretrained first"
        )
    parts = _read_object(index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or any(Path(str(part)).name != part for part in names):
        raise UnsupportedModel(f"{index} must name files in its own folder; save the model again")
    return [folder / part for part in sorted(names)]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        with reading(file) as stream:
            value = orjson.loads(stream.read())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not is_of_system(error):
            raise
        raise UnsupportedModel(f"{file} cannot be read ({error}); copy the model again") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file} is not a JSON object; copy the model again")
    return value


class Header(NamedTuple):
    """The header of a safetensors file.

    ``tensors`` maps a name to its ``dtype``, ``shape`` and ``data_offsets``, which are unchecked
    and count from byte ``start`` of the file. ``metadata`` maps strings to strings.
    """

    start: int
    tensors: dict[str, Any]
    metadata: dict[str, Any]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file; raises like :func:`header_of`, or ``OSError``."""
    with reading(file) as stream:
        return header_of(stream, os.fstat(stream.fileno()).st_size)


def header_of(stream: BinaryIO, size: int) -> Header:
    """Read the header of a safetensors file of ``size`` bytes.

    Raises:
        ValueError: the file does not begin with such a header.
    """
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise ValueError("not a safetensors file")
    data = stream.read(length)
    if not data.startswith(b"{"):
        raise ValueError("not a safetensors file")
    tensors = parse_object(data)
    metadata = tensors.pop("__metadata__", {})
    return Header(8 + length, tensors, metadata)


def parse_object(data: bytes) -> dict[str, Any]:
    """Read a JSON object that every parser reads alike.

    Raises:
        ValueError: it is not strict JSON, not an object, or has a key twice at some depth.
    """
    try:
        value = orjson.loads(data)
        json.loads(data, object_pairs_hook=_require_unique, parse_int=len, parse_float=len)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _require_unique(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"has the key {key[:200]!r} twice")
        seen.add(key)
