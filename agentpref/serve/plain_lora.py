"""The settings of an adapter: plain LoRA, which is all that every engine serves alike.

What peft can do beyond it is refused by its setting, known or not: engines ignore much of that in
silence. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from agentpref.errors import InvalidAdapter
from agentpref.serve.strict import parse_object, shortened

RANKS = frozenset({8, 16, 32, 64, 128, 256, 512})
"""The LoRA ranks that every engine loads."""

# Settings that may have any value, since none of them changes what the two matrices mean.
_FREE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "megatron_core", "peft_version",
        "qalora_group_size", "revision",
    }
)  # fmt: skip
# Settings that an empty list or mapping does not turn off: of peft's, an empty `kasa_config` means
# KaSA with its defaults, which cuts the base model's own weights for good.
_NEVER_EMPTY = frozenset(
    {
        "alora_invocation_tokens", "arrow_config", "bias", "corda_config", "eva_config",
        "kasa_config", "layer_replication", "layers_to_transform", "lora_ga_config",
        "megatron_config", "monteclora_config", "trainable_token_indices", "use_bdlora",
        "velora_config",
    }
)  # fmt: skip
_MAX_BYTES = 1 << 20


def read_config(file: Path) -> dict[str, Any]:
    """Read the settings of an adapter, and refuse all that is not plain LoRA.

    Raises:
        InvalidAdapter: naming the setting.
    """
    if file.stat().st_size > _MAX_BYTES:
        raise InvalidAdapter(f"{file} has more than {_MAX_BYTES} bytes; save the adapter again")
    config = parse_object(file.read_bytes(), file)
    checks = _checks(config)
    for key, holds, allowed in checks:
        _require(holds, file, key, config.get(key), allowed)
    known = _FREE.union(key for key, _, _ in checks)
    for key, value in config.items():
        holds = key in known or _is_off(key, value)
        _require(holds, file, key, value, "off: plain LoRA is all that every engine serves")
    return config


def _checks(config: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """Each setting that plain LoRA has, whether it is as it must be, and how that is."""
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    listed = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    dropout = config.get("lora_dropout", 0)
    flags = ("fan_in_fan_out", "inference_mode", "init_lora_weights", "use_rslora")
    task = config.get("task_type") in (None, "CAUSAL_LM")
    return [
        ("peft_type", config.get("peft_type") == "LORA", "LORA"),
        ("task_type", task, "CAUSAL_LM"),
        ("r", isinstance(rank, int) and rank in RANKS, f"one of {sorted(RANKS)}"),
        ("lora_alpha", _is_number(alpha) and alpha > 0, "a number above 0"),
        ("lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "a share below 1"),
        ("target_modules", bool(listed), "a list of module names"),
        ("bias", config.get("bias", "none") == "none", "none"),
        *((flag, isinstance(config.get(flag, True), bool), "true or false") for flag in flags),
    ]


def _is_number(value: object) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value)


def _is_off(key: str, value: object) -> bool:
    if value is None or value is False:
        return True
    return value in ("", [], {}) and key not in _NEVER_EMPTY


def _require(holds: bool, file: Path, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidAdapter(f"{file}: {key} is {shortened(repr(value))}, but must be {allowed}")
