"""One model in memory with three policies: the base, the live adapter, and the candidate.

The candidate starts as a copy of the live adapter, or as a fresh LoRA, which equals the base.
Adapters are never merged into the base. All use of peft's names and files is in this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentpref.config import LoraSettings
from agentpref.errors import InvalidAdapter, UnsupportedModel
from agentpref.models.adapter_files import AdapterFiles
from agentpref.models.base import BaseModel, language_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor
    from transformers import PreTrainedModel

Policy = Literal["base", "live", "candidate"]
Start = Literal["base", "live"]
"""What a candidate starts from."""

_PREFIX = "base_model.model."
_CURE = "roll back to a revision that fits, or use a new namespace"
# Linear layers that choose experts or weigh a shared one.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def attach(
    base: BaseModel,
    live: AdapterFiles | None,
    settings: LoraSettings,
    *,
    seed: int,
    candidate: AdapterFiles | None = None,
) -> PeftModel:
    """Wrap a base model with a trainable candidate and, if there is one, the frozen live adapter.

    This changes the base's module tree in place: load another base for each call. ``live`` are the
    bytes of an adapter that was checked; its folder is not read again. The candidate starts as its
    copy, unless the bytes of another adapter are given for it, whose shape may differ.

    Raises:
        UnsupportedModel: the model has no layers that plain LoRA adapts.
        InvalidAdapter: an adapter adapts layers that the base does not have.
    """
    if live is not None:
        _require_layers(base.model, live)
    model = wrapped(base, candidate or live, settings, seed=seed, name="candidate")
    if live is not None:
        import torch

        with torch.random.fork_rng(devices=[]):
            model.add_adapter("live", _config_of(live))
        _set_weights(model, live, "live")
        model.eval()
    _activate(_lora_layers(model), "candidate")
    return model


def wrapped(
    base: BaseModel,
    start: AdapterFiles | None,
    settings: LoraSettings,
    *,
    seed: int,
    name: str = "default",
) -> PeftModel:
    """Wrap a base model with one trainable adapter: a copy of checked bytes, or a fresh one.

    It changes the base and raises as :func:`attach` does. ``settings`` are a fresh one's.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if start is not None:
        _require_layers(base.model, start)
        config = _config_of(start)
    else:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=adaptable_layers(base.model),
            task_type="CAUSAL_LM",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PeftModel = get_peft_model(base.model, config, name)
        except ValueError as error:  # of layers that peft adapts in no model of this type
            raise UnsupportedModel(f"{base.name!r} cannot be adapted: {error}") from error
    if start is not None:
        _set_weights(model, start, name)
        model.eval()
    return model


def restart(model: PeftModel, start: Start, *, seed: int) -> None:
    """Give the candidate the weights it starts from, bit for bit those that :func:`attach` gives.

    Without a live adapter, live is the base. From the base, the candidate is a fresh LoRA of the
    shape that it has.
    """
    import torch

    source = "live" if start == "live" and "live" in model.peft_config else "fresh"
    if source == "fresh":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter("fresh", deepcopy(model.peft_config["candidate"]))
    layers: list[Any] = [*_lora_layers(model)]
    with torch.no_grad():
        for layer in layers:
            for side in (layer.lora_A, layer.lora_B):
                side["candidate"].weight.copy_(side[source].weight)
    if source == "fresh":
        model.delete_adapter("fresh")
    _activate(layers, "candidate")


def _config_of(files: AdapterFiles) -> LoraConfig:
    """The settings of a checked adapter: every other one is off."""
    from peft import LoraConfig

    known = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "fan_in_fan_out")
    settings = files.settings()
    found = {name: settings[name] for name in known if name in settings}
    return LoraConfig(task_type="CAUSAL_LM", **found)


def _set_weights(model: PeftModel, files: AdapterFiles, name: str) -> None:
    """Set each weight of an adapter of the model, and require that none is left out."""
    from peft import set_peft_model_state_dict

    own = files.folder.name
    try:
        done: Any = set_peft_model_state_dict(model, files.tensors(), adapter_name=name)
    except RuntimeError as error:  # of torch, for another shape
        raise InvalidAdapter(f"{own} does not fit the base: {error}; {_CURE}") from error
    unset = [
        key for key in done.missing_keys if ".lora_" in key and key.endswith(f".{name}.weight")
    ]
    if unset or done.unexpected_keys:
        wrong = min([*unset, *done.unexpected_keys])
        raise InvalidAdapter(f"{own} does not fit the base: {wrong} has no counterpart; {_CURE}")


def adaptable_layers(model: PreTrainedModel) -> list[str]:
    """The names of the layers to adapt: all linear ones of the language model.

    Left out are towers for images or sound, the head, the routers of mixtures of experts, and what
    peft would turn into something else than plain LoRA: transformers 5 holds experts as stacked
    parameters, and peft takes a shared expert's layers for those that version 4 had.

    Raises:
        UnsupportedModel: none is left.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    language: Any = language_model(model)
    heads = [part.get_output_embeddings() for part in (language, model)]
    inside = set(language.modules()).difference(heads)
    linear = [
        name
        for name, module in model.named_modules()
        if module in inside
        and isinstance(module, nn.Linear | Conv1D)
        and name.rpartition(".")[2] not in _ROUTERS
    ]
    plain = LoraConfig(target_modules=linear)
    convert_peft_config_for_transformers(plain, model, None)
    if not plain.target_modules:
        raise UnsupportedModel(
            f"{type(model).__name__} has no linear layers outside of its experts, head and towers, "
            f"so there is nothing to adapt; use another model"
        )
    return sorted(plain.target_modules)


def layer_shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(out, in) of each of the :func:`adaptable_layers`: what an adapter from elsewhere may adapt.

    Raises:
        UnsupportedModel: there are none.
    """
    from torch import nn

    found: dict[str, tuple[int, int]] = {}
    for name in adaptable_layers(base.model):
        layer: Any = base.model.get_submodule(name)
        if isinstance(layer, nn.Linear):  # whose weight may be packed
            found[name] = (layer.out_features, layer.in_features)
        else:
            found[name] = (layer.weight.shape[1], layer.weight.shape[0])
    return found


def _require_layers(model: PreTrainedModel, files: AdapterFiles) -> None:
    """Require that the model has the layers that an adapter adapts: peft would only warn."""
    adapted = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in files.tensors()}
    stray = adapted.difference(name for name, _ in model.named_modules())
    if stray:
        raise InvalidAdapter(
            f"{files.folder.name} adapts {min(stray)} and {len(stray) - 1} other layers that a "
            f"{type(model).__name__} does not have; {_CURE}"
        )


@contextmanager
def policy(model: PeftModel, name: Policy) -> Iterator[PeftModel]:
    """Activate one policy within the block, and then the one before; the candidate is the first.

    Every other step of training switches there and back, so this switches layer by layer: peft's
    own methods for a whole model walk through all of its modules several times.
    """
    layers = _lora_layers(model)
    before = _active(layers)
    _activate(layers, name if name in model.peft_config else "base")
    try:
        yield model
    finally:
        _activate(layers, before)


def _lora_layers(model: PeftModel) -> list[BaseTunerLayer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _active(layers: Sequence[BaseTunerLayer]) -> Policy:
    """Which policy is active: the same in all layers."""
    if layers[0].disable_adapters:
        return "base"
    active: Policy = layers[0].active_adapters[0]
    return active


def _activate(layers: Sequence[BaseTunerLayer], name: Policy) -> None:
    """Switch adapters; gradients are on for the candidate only, and only while it is active."""
    for layer in layers:
        if name == "base":
            layer.enable_adapters(False)
        else:
            layer.set_adapter(name, inference_mode=name == "live")
            if layer.disable_adapters:
                layer.enable_adapters(True)


def weights(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the candidate's weights, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_weights(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Give the candidate the weights that :func:`weights` has copied."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])


def detach(model: PeftModel) -> None:
    """Take all adapters out of a model again; its base can then be given to :func:`attach` anew."""
    from agentpref.learn.kernels.fuse import unfuse

    unfuse(model)
    model.unload()


def save(model: PeftModel, base: BaseModel, folder: Path, *, name: str = "candidate") -> None:
    """Write an adapter as float32 safetensors, in a folder that peft and vLLM load as it is."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    save_file(
        {key: tensor.detach().float().cpu().contiguous() for key, tensor in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config: Any = model.peft_config[name]
    config.base_model_name_or_path = base.name
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has no fixed order
    config.save_pretrained(folder)
