"""What a base model is, read from its files: for engines that hold it in another process.

The digests are those that training puts into manifests, and the linear layers are read off the
headers of the weights, so that a revision can be held against its base where the base is never
loaded. Needs no torch and no transformers. Knows nothing of adapters and engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentpref.errors import UnsupportedModel
from agentpref.models.base import base_digests, find_base

_MAX_HEADER = 64 << 20
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base model that is on disk.

    ``identity`` is what manifests say of it. ``layers`` is (out, in) of each linear layer in its
    blocks, by the module's name in transformers; the head and the embeddings, which no engine
    adapts, are not among them. It is ``None`` where the names in the files do not tell for sure
    what the modules are called and which of them are linear: for families that are not known here,
    for quantized weights, and where any matrix is left unexplained.
    """

    name: str
    path: Path
    identity: Mapping[str, str]
    layers: Mapping[str, tuple[int, int]] | None


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family names its matrices: its linear layers, and the others there are."""

    linear: re.Pattern[str]
    others: re.Pattern[str]
    root: str = ""  # what some files leave off the names
    transposed: bool = False


def _family(linear: str, others: str, *, root: str = "", transposed: bool = False) -> _Family:
    return _Family(re.compile(linear), re.compile(others), root, transposed)


_LLAMA = _family(
    r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight",
    r"(model\.embed_tokens|lm_head)\.weight",
)
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(
        (
            "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi",
            "phi3", "qwen2", "qwen3", "smollm3",
        ),
        _LLAMA,
    ),
    "gpt2": _family(
        r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight",
        r"transformer\.(wte|wpe)\.weight|lm_head\.weight|transformer\.h\.\d+\.attn\.bias",
        root="transformer.",
        transposed=True,
    ),
    "gpt_neox": _family(
        r"gpt_neox\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.dense_\w+)\.weight",
        r"(gpt_neox\.embed_in|embed_out)\.weight|gpt_neox\.layers\.\d+\.attention\.bias",
    ),
    "falcon": _family(
        r"transformer\.h\.\d+\.(self_attention\.(query_key_value|dense)|mlp\.dense_\w+)\.weight",
        r"(transformer\.word_embeddings|lm_head)\.weight",
    ),
}  # fmt: skip


def read_base(name: str) -> BaseFiles:
    """Read a base model's files, by the bundled name ``"tiny"``, a folder, or a hub's name.

    Raises:
        MissingDependency: the name is no folder, and what downloads is not installed.
        ModelNotFound: the name resolves to nothing.
        UnsupportedModel: its files are missing or not whole.
    """
    path = find_base(name)
    config = _read_object(path / _CONFIG)
    digest, template_digest = base_digests(path)
    return BaseFiles(
        name=name,
        path=path,
        identity={"name": name, "digest": digest, "template_digest": template_digest},
        layers=_linear_layers(config, _shapes(path)),
    )


def _linear_layers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, tuple[int, int]] | None:
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or "quantization_config" in config:
        return None
    layers: dict[str, tuple[int, int]] = {}
    for stored, shape in shapes.items():
        name = _full_name(stored, family)
        if family.linear.fullmatch(name) and len(shape) == 2:
            out, into = reversed(shape) if family.transposed else shape
            layers[name.removesuffix(".weight")] = (out, into)
        elif len(shape) > 1 and not family.others.fullmatch(name):
            return None
    return layers or None


def _full_name(stored: str, family: _Family) -> str:
    """A parameter's name in a causal model; files of the bare model leave its root off."""
    bare = family.root and not stored.startswith((family.root, "lm_head."))
    return family.root + stored if bare else stored


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the files that transformers would read."""
    return {name: shape for file in _weight_files(folder) for name, shape in _read_header(file)}


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
        raise UnsupportedModel(f"{index} names no files beside it; save the model again")
    return [folder / part for part in sorted(names)]


def _read_header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = orjson.loads(stream.read(min(length, _MAX_HEADER)))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, tuple(int(size) for size in entry["shape"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModel(
            f"{file} cannot be read as safetensors ({error}); copy or save the model again"
        ) from error


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} cannot be read ({error}); copy the model again") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file} holds no JSON object; copy the model again")
    return value
