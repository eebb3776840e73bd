"""The LoRA adapters in the layers of one model, and which of them is on.

Everything here belongs to the one thread that owns the model. This is all of the serving side that
knows how peft names, keeps and forgets things. Knows nothing of requests and text.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentpref.errors import GenerationFailed
from agentpref.types import BASE

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel


class Adapters:
    """The adapters of one model. While none is loaded, the model's layers are its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Begin with none."""
        self._model = model
        self._peft: PeftModel | None = None
        self._active: str | None = BASE

    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded, oldest first."""
        return () if self._peft is None else tuple(self._peft.peft_config)

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter; if that fails, at whatever point, take out what there is of it."""
        if name in self.names():
            return
        self._active = None
        with ExitStack() as on_failure:
            on_failure.callback(self.remove, name)
            self._inject(name, str(folder))
            on_failure.pop_all()

    def remove(self, name: str) -> None:
        """Take an adapter out of every layer that has it, whether or not peft knows its name."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        others = [other for other in self.names() if other != name]
        if self._peft is None or not others:
            self._peft, self._active = None, BASE
            _strip(self._model)
            return
        self._active = None
        self._peft.set_adapter(others[0], inference_mode=True)
        for module in self._model.modules():
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(name)
        self._peft.peft_config.pop(name, None)

    def activate(self, name: str) -> None:
        """Switch to an adapter, or to none for ``"base"``; does nothing if it is on."""
        if name == self._active:
            return
        if name != BASE and name not in self.names():
            raise GenerationFailed(f"{name} is not loaded; load it first")
        self._active = None
        if self._peft is not None and name == BASE:
            _tuner(self._peft).disable_adapter_layers()
        elif self._peft is not None:
            _tuner(self._peft).enable_adapter_layers()
            self._peft.set_adapter(name, inference_mode=True)
        self._active = name

    def _inject(self, name: str, folder: str) -> None:
        from peft import PeftModel

        # On the meta device peft draws no random weights first: a load in the middle of a training
        # run must not move the generator that makes that run repeatable.
        how: dict[str, Any] = {
            "adapter_name": name,
            "is_trainable": False,
            "torch_device": str(self._model.device),
            "low_cpu_mem_usage": True,
        }
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._model, folder, **how)
        else:
            self._peft.load_adapter(folder, **how)


def linear_layers(model: PreTrainedModel) -> Mapping[str, tuple[int, int]]:
    """(out, in) of each layer that an adapter may adapt, by module name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):  # GPT-2's, which stores its weights the other way round
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes


def _tuner(model: PeftModel) -> BaseTuner:
    """What peft wraps the layers with, which it declares as a plain module."""
    return cast("BaseTuner", model.base_model)


def _strip(model: PreTrainedModel) -> None:
    """Give a model its plain layers back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
