"""One model in memory with three policies: the base, the live adapter, and the candidate.

The candidate starts as a copy of the live adapter, or as a fresh LoRA, which equals the base.
Adapters are never merged into the base. All use of peft's names and files is in this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentpref.config import LoraSettings
from agentpref.models.base import BaseModel

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

Policy = Literal["base", "live", "candidate"]


def attach(base: BaseModel, live: Path | None, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Wrap a base model with a trainable candidate and, if there is one, the frozen live adapter.

    This changes the base's module tree in place: load another base for each call.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    if live is not None:
        model = PeftModel.from_pretrained(base.model, live, "candidate", is_trainable=True)
        model.load_adapter(str(live), "live", is_trainable=False)
        return model
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base.model, config, "candidate")


@contextmanager
def policy(model: PeftModel, name: Policy) -> Iterator[PeftModel]:
    """Activate one policy within the block; outside of such blocks the candidate is active.

    Every other step of training switches there and back, so this switches layer by layer: peft's
    own methods for a whole model walk through all of its modules several times.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    _activate(layers, name if name in model.peft_config else "base")
    try:
        yield model
    finally:
        _activate(layers, "candidate")


def _activate(layers: Sequence[BaseTunerLayer], name: Policy) -> None:
    """Switch adapters; gradients are on for the candidate only, and only while it is active."""
    for layer in layers:
        if name == "base":
            layer.enable_adapters(False)
        else:
            layer.set_adapter(name, inference_mode=name == "live")
            if layer.disable_adapters:
                layer.enable_adapters(True)


def save(model: PeftModel, base: BaseModel, folder: Path) -> None:
    """Write the candidate as float32 safetensors, in a folder that peft and vLLM load as it is."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(
        model, adapter_name="candidate", save_embedding_layers=False
    )
    save_file(
        {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config: Any = model.peft_config["candidate"]
    config.base_model_name_or_path = base.name
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has no fixed order
    config.save_pretrained(folder)
