"""One model in memory, three policies: the base, the live adapter, and the candidate being trained.

The candidate starts as a copy of the live adapter's weights (or as a fresh LoRA, which is the base
exactly) and nothing is ever merged. This module is all that knows how peft names and saves things.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentpref.config import LoraSettings
from agentpref.learn.base import BaseModel

if TYPE_CHECKING:
    from peft import PeftModel

Policy = Literal["base", "live", "candidate"]


def attach(base: BaseModel, live: Path | None, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Wrap a base model with a trainable candidate and, if there is one, the frozen live adapter.

    The base's own module tree is changed in place: load a base of your own for each call.
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
    """Let the model speak as one policy; outside of this it is the candidate."""
    if name == "base" or (name == "live" and "live" not in model.peft_config):
        with model.disable_adapter():
            yield model
        return
    _activate(model, name)
    try:
        yield model
    finally:
        _activate(model, "candidate")


def save(model: PeftModel, base: BaseModel, folder: Path) -> None:
    """Write the candidate as a folder that plain peft and plain vLLM load: float32 safetensors."""
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
    config.target_modules = sorted(config.target_modules)  # a set: its order is another each time
    config.save_pretrained(folder)


def _activate(model: PeftModel, name: str) -> None:
    """Switch adapters; peft freezes what is not active, so the candidate is thawed again."""
    model.set_adapter(name)
    for parameter_name, parameter in model.named_parameters():
        if ".candidate." in parameter_name:
            parameter.requires_grad_(True)
        elif ".live." in parameter_name:
            parameter.requires_grad_(False)
