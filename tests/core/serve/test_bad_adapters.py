"""Every adapter of the catalogue is refused, in words that name what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_damage import CONFIG, settings, sound
from bad_adapters import BAD_ADAPTERS, BadAdapter

from agentpref.errors import InvalidAdapter
from agentpref.home import Home
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_adapter, check_revision

IDENTITY = {"name": "random", "digest": "d" * 64, "template_digest": "t" * 64}

Layers = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def layers(random_base: Path) -> Layers:
    from torch.nn import Linear
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_base)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry that all of them are offered, and that takes none."""
    return Registry(Home.create(tmp_path_factory.mktemp("bad") / "home"))


@pytest.mark.parametrize("bad", BAD_ADAPTERS, ids=lambda bad: bad.name)
def test_it_is_refused_with_what_is_wrong_named(
    bad: BadAdapter, random_base: Path, layers: Layers, empty: Registry, tmp_path: Path
) -> None:
    bad.make(random_base, tmp_path / "adapter")
    with pytest.raises(InvalidAdapter, match=bad.named) as refused:
        check_adapter(tmp_path / "adapter", layers=layers)
    assert len(str(refused.value)) < 1000
    if not bad.needs_layers:
        with pytest.raises(InvalidAdapter, match=bad.named):
            publish(empty, tmp_path / "adapter")
        assert empty.list() == []
        assert list(empty.home.adapters.iterdir()) == []


def test_only_a_look_at_the_base_shows_what_the_files_do_not(random_base, tmp_path) -> None:
    for bad in BAD_ADAPTERS:
        if bad.needs_layers:
            bad.make(random_base, tmp_path / bad.name)
            check_adapter(tmp_path / bad.name)


def publish(registry: Registry, folder: Path):
    return registry.publish(folder, parent=None, model=IDENTITY, training={})


def test_what_they_are_all_made_from_is_sound(random_base, layers, tmp_path) -> None:
    sound(random_base, tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", layers=layers)
    revision = publish(Registry(Home.create(tmp_path / "home")), tmp_path / "adapter")
    check_revision(revision, base=IDENTITY, layers=layers)


def test_what_lies_beside_an_adapter_is_not_taken(random_base, layers, tmp_path) -> None:
    sound(random_base, tmp_path / "adapter")
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "README.md"):
        (tmp_path / "adapter" / name).touch()
    revision = publish(Registry(Home.create(tmp_path / "home")), tmp_path / "adapter")
    assert sorted(file.name for file in revision.path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip


HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "megatron_core", "peft_version", "qalora_group_size",
    "revision",
}  # fmt: skip


def test_of_all_that_peft_can_set_only_plain_lora_may_be_anything(random_base, tmp_path) -> None:
    """Whatever peft learns to do next is refused where it is used, and passes where it is not."""
    from peft import LoraConfig

    sound(random_base, tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG
    saved = json.loads(file.read_text())
    for key in LoraConfig().to_dict().keys() | {"a_setting_of_the_future"}:
        file.write_text(json.dumps({**saved, key: "on"}))
        if key in HARMLESS:
            check_adapter(tmp_path / "adapter")
        else:
            with pytest.raises(InvalidAdapter, match=f"{key} is 'on', but must be"):
                check_adapter(tmp_path / "adapter")


def test_to_peft_an_empty_setting_may_be_one(random_base, tmp_path) -> None:
    """Why empty is not off: loading this changes the base model under every other adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings(kasa_config={})(random_base, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(random_base)
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    after = base.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not after.equal(before)


@pytest.mark.parametrize("off", [None, False, "", [], {}])
def test_a_setting_of_the_future_that_is_off_passes(random_base, tmp_path, off: object) -> None:
    settings(a_setting_of_the_future=off)(random_base, tmp_path / "adapter")
    check_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("on", [0, 0.0, 1, "off", [None], {"": None}])
def test_a_setting_of_the_future_that_is_not_off_does_not(random_base, tmp_path, on: object):
    settings(a_setting_of_the_future=on)(random_base, tmp_path / "adapter")
    with pytest.raises(InvalidAdapter, match="a_setting_of_the_future is"):
        check_adapter(tmp_path / "adapter")


def test_names_are_unique() -> None:
    names = [bad.name for bad in BAD_ADAPTERS]
    assert len(set(names)) == len(names)
