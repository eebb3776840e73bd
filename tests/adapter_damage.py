"""Ways to damage a sound adapter, or to make peft save one that is not plain LoRA.

They work for any Llama-like base model in a folder; ``bad_adapters`` lists the results.
"""

from __future__ import annotations

import functools
import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RANK = 8

Make = Callable[[Path, Path], object]
"""Called with the folder of the base model and a missing folder to make the adapter in."""


def sound(base: Path, folder: Path, **settings: Any) -> Any:
    """Save a random LoRA of two kinds of layers; return the model that it was saved from."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=16, task_type="CAUSAL_LM", **settings)
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(folder)
    return tuned


def saved(**settings: Any) -> Make:
    """Let peft save an adapter with other settings."""
    return lambda base, folder: sound(base, folder, **settings)


def saved_in_disguise(off: Mapping[str, Any], **settings: Any) -> Make:
    """Let peft save an adapter with other settings, and then edit the settings away."""

    def make(base: Path, folder: Path) -> None:
        sound(base, folder, **settings)
        _edit_settings(folder, off)

    return make


def settings(**changes: Any) -> Make:
    """Edit the settings that peft saved."""

    def make(base: Path, folder: Path) -> None:
        _copy_sound(base, folder)
        _edit_settings(folder, changes)

    return make


def tensors(change: Callable[[dict[str, Any]], object]) -> Make:
    """Change the tensors that peft saved."""

    def make(base: Path, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        _copy_sound(base, folder)
        held = load_file(folder / WEIGHTS)
        change(held)
        contiguous = {name: tensor.contiguous() for name, tensor in held.items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})

    return make


def table(change: Callable[[dict[str, Any]], object]) -> Make:
    """Edit the header of the weights, and leave the data."""

    def make(base: Path, folder: Path) -> None:
        _copy_sound(base, folder)
        header, data = _header(folder)
        held = json.loads(header)
        change(held)
        _write_weights(folder, json.dumps(held).encode(), data)

    return make


def files(change: Callable[[Path], object]) -> Make:
    """Change the files that peft saved."""

    def make(base: Path, folder: Path) -> None:
        _copy_sound(base, folder)
        change(folder)

    return make


def other_tuner(kind: str, **settings: Any) -> Make:
    """Let peft save an adapter that is not a LoRA."""

    def make(base: Path, folder: Path) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(base)
            peft.get_peft_model(model, config).save_pretrained(folder)

    return make


@functools.cache
def _sound_files(base: Path) -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        sound(base, Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _copy_sound(base: Path, folder: Path) -> None:
    """Copy an adapter that peft saved before."""
    folder.mkdir()
    for name, data in _sound_files(base).items():
        (folder / name).write_bytes(data)


def _edit_settings(folder: Path, changes: Mapping[str, Any]) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _header(folder: Path) -> tuple[bytes, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def _write_weights(folder: Path, header: bytes, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def _name(side: str, module: str = "q_proj", last: bool = False) -> Callable[[Mapping], str]:
    """Find a tensor by its side and its kind of layer, in the first layer or the last one."""

    def find(held: Mapping[str, Any]) -> str:
        names = sorted(
            (name for name in held if name.endswith(f"{module}.lora_{side}.weight")),
            key=lambda name: int(name.split(".layers.")[1].split(".")[0]),
        )
        return names[-1 if last else 0]

    return find


FIRST_A, FIRST_B = _name("A"), _name("B")
LAST_A, LAST_B = _name("A", "up_proj", last=True), _name("B", "up_proj", last=True)


def put(find: Callable[[Mapping], str], change: Callable[[Any], Any]) -> Callable[[dict], None]:
    def edit(held: dict[str, Any]) -> None:
        held[find(held)] = change(held[find(held)])

    return edit


def one_number(value: float) -> Callable[[Any], Any]:
    """Set the last number of a tensor."""

    def change(tensor: Any) -> Any:
        tensor[-1, -1] = value
        return tensor

    return change


def drop(*finds: Callable[[Mapping], str]) -> Callable[[dict], None]:
    def edit(held: dict[str, Any]) -> None:
        for name in [find(held) for find in finds]:
            del held[name]

    return edit


def drop_kind(held: dict[str, Any]) -> None:
    for name in [name for name in held if "up_proj" in name]:
        del held[name]


def add_layer(held: dict[str, Any]) -> None:
    for side in (FIRST_A, FIRST_B):
        held[side(held).replace(".layers.0.", ".layers.99.")] = held[side(held)].clone()


def add_kind(held: dict[str, Any]) -> None:
    for side in (FIRST_A, FIRST_B):
        held[side(held).replace("q_proj", "o_proj")] = held[side(held)].clone()


def halve_rank(held: dict[str, Any]) -> None:
    for name in held:
        half = held[name].shape[0 if "lora_A" in name else 1] // 2
        held[name] = held[name][:half] if "lora_A" in name else held[name][:, :half]


def swap_sides(held: dict[str, Any]) -> None:
    a, b = FIRST_A(held), FIRST_B(held)
    held[a], held[b] = held[b], held[a]


def without_prefix(held: dict[str, Any]) -> None:
    for name in list(held):
        held[name.removeprefix("base_model.model.")] = held.pop(name)


def base_weight(held: dict[str, Any]) -> None:
    held["base_model.model.model.embed_tokens.base_layer.weight"] = held[FIRST_A(held)].clone()


def twice_in_table(folder: Path) -> None:
    header, data = _header(folder)
    (name, entry), *_ = ((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    again = f',"{name}":{json.dumps(entry)}}}'.encode()
    _write_weights(folder, header.rstrip()[:-1] + again, data)


def twice_in_settings(folder: Path) -> None:
    file = folder / CONFIG
    file.write_text(file.read_text().rstrip()[:-1] + ', "lora_alpha": 4096}')


def twice_within_settings(folder: Path) -> None:
    file = folder / CONFIG
    file.write_text(file.read_text().rstrip()[:-1] + ', "auto_mapping": {"a": 1, "a": 2}}')


def padded_table(folder: Path) -> None:
    header, data = _header(folder)
    _write_weights(folder, b" " + header, data)


def endless_table(folder: Path) -> None:
    header, data = _header(folder)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + header + data)


def huge_table(folder: Path) -> None:
    """Write a header of 65 MB of spaces, in a sparse file."""
    header, data = _header(folder)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 65 << 20) + header)
        file.seek(8 + (65 << 20))
        file.write(data)


def deep_settings(folder: Path) -> None:
    file = folder / CONFIG
    deep = "[" * 1010 + "]" * 1010
    file.write_text(file.read_text().rstrip()[:-1] + f', "auto_mapping": {deep}}}')


def huge_settings(folder: Path) -> None:
    file = folder / CONFIG
    file.write_text(file.read_text() + " " * (1 << 20))


def only_a_pickle(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(folder / WEIGHTS), folder / name)
        (folder / WEIGHTS).unlink()

    return change


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        elsewhere = folder.with_name(f"{folder.name}-{name}")
        shutil.move(folder / name, elsewhere)
        (folder / name).symlink_to(elsewhere)

    return change


def linked_folder(folder: Path) -> None:
    elsewhere = folder.with_name(f"{folder.name}-elsewhere")
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return edit
