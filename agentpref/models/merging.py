"""Merges an adapter into its base, for tools that load whole models and no LoRA.

W + s·BA is computed in float32, layer by layer, and rounded once, to the number format that the
weight has in the base's files. All other files are the base's own, byte for byte: the settings, the
tokenizer, the chat template, and how to generate.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from agentpref.errors import InvalidAdapter, NotKept, UnsupportedModel
from agentpref.models.adapter_files import AdapterFiles
from agentpref.models.base import BaseModel, base_digests, find_base, load_base, tokenizer_files
from agentpref.models.loading import quiet
from agentpref.types import Progress

_PREFIX = "base_model.model."
_CONFIG = "config.json"
_COPIED = (_CONFIG, "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*")
_SHARD = "5GB"


def load_stored(name: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> BaseModel:
    """Load a base in the number format of its files, to be merged into.

    Raises:
        UnsupportedModel: its files are quantized, or cannot be loaded, as :func:`load_base` says.
    """
    config = find_base(name) / _CONFIG
    try:
        is_packed = bool(orjson.loads(config.read_bytes()).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        is_packed = False  # loading says what is wrong with it
    if is_packed:
        raise UnsupportedModel(
            f"{name!r} is quantized, and merging would round its weights a second time; serve the "
            f"adapter beside it: `agentpref adapters export` without --merged copies it"
        )
    return load_base(name, precision="stored", chat_template_kwargs=chat_template_kwargs)


def linear_layers(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(out, in) of each layer of a base that an adapter may adapt, by module name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            wide, narrow = module.weight.shape
            found[name] = (narrow, wide) if isinstance(module, Conv1D) else (wide, narrow)
    return found


def merge(base: BaseModel, files: AdapterFiles, progress: Progress | None = None) -> None:
    """Add a checked adapter to the weights of its base, in place.

    Raises:
        InvalidAdapter: a merged weight is too large for the number format of the base.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    settings, tensors = files.settings(), files.tensors()
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    adapted = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors})
    for done, name in enumerate(adapted, start=1):
        layer: Any = base.model.get_submodule(name)
        weight = layer.weight
        a, b = (tensors[f"{_PREFIX}{name}.lora_{side}.weight"].to(weight.device) for side in "AB")
        change = scale * (b.float() @ a.float())
        merged = weight.float() + (change.T if isinstance(layer, Conv1D) else change)
        weight.data = merged.to(weight.dtype)
        if not torch.isfinite(weight).all():
            raise InvalidAdapter(
                f"merged, {name} has numbers too large for the base's {weight.dtype}; serve the "
                f"adapter beside the base instead"
            )
        if progress is not None:
            progress("merging (layers)", done, len(adapted))


def write_model(base: BaseModel, folder: Path) -> None:
    """Write a model whose weights were changed into a new folder, with the base's other files.

    Raises:
        NotKept: the disk is full.
        UnsupportedModel: somebody changed the base's files since they were loaded.
    """
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    model: Any = base.model
    plain: Any = GenerationConfig
    model.generation_config = plain()  # the base's own is copied, even if transformers refuses it
    try:
        with quiet():
            model.save_pretrained(folder, max_shard_size=_SHARD)
    except SafetensorError as error:
        raise NotKept(
            f"{folder.parent} cannot be written ({error}); free space on its disk, and let this "
            "user write the folder"
        ) from error
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in _files_beside_weights(base.path):
        copy = folder / file.relative_to(base.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    _, copied = base_digests(folder, base.chat_template_kwargs)
    if copied != base.template_digest:
        raise UnsupportedModel(
            f"the tokenizer of {base.name!r} in {base.path} changed while it was copied; wait "
            f"until it is complete, then export again"
        )


def _files_beside_weights(folder: Path) -> set[Path]:
    patterns = (*_COPIED, *tokenizer_files(folder))
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
