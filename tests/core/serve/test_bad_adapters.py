"""Each adapter of the catalogue is refused, and the error names what is wrong with it."""

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

KINDS = 109
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
    """A registry that every bad adapter is published to, without success."""
    return Registry(Home.create(tmp_path_factory.mktemp("bad") / "home"))


@pytest.mark.guarantee("serving", f"{KINDS} kinds of bad adapters")
@pytest.mark.parametrize("bad", BAD_ADAPTERS, ids=lambda bad: bad.name)
def test_a_bad_adapter_is_refused_and_the_error_names_what_is_wrong(
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


def test_some_bad_adapters_pass_without_the_layers_of_the_base(random_base, tmp_path) -> None:
    for bad in BAD_ADAPTERS:
        if bad.needs_layers:
            bad.make(random_base, tmp_path / bad.name)
            check_adapter(tmp_path / bad.name)


def publish(registry: Registry, folder: Path):
    return registry.publish(folder, parent=None, model=IDENTITY, training={})


def test_the_adapter_that_all_bad_ones_are_made_from_passes(random_base, layers, tmp_path) -> None:
    sound(random_base, tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", layers=layers)
    revision = publish(Registry(Home.create(tmp_path / "home")), tmp_path / "adapter")
    check_revision(revision, base=IDENTITY, layers=layers)


def test_other_files_beside_an_adapter_are_not_published(random_base, layers, tmp_path) -> None:
    sound(random_base, tmp_path / "adapter")
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "README.md"):
        (tmp_path / "adapter" / name).touch()
    revision = publish(Registry(Home.create(tmp_path / "home")), tmp_path / "adapter")
    assert sorted(file.name for file in revision.path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip


HARMLESS = {"base_model_name_or_path", "peft_version", "revision"}


def test_every_setting_of_peft_beyond_plain_lora_is_refused(random_base, tmp_path) -> None:
    """A setting of a later peft is refused if it is used, and passes if it is not."""
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


def test_peft_changes_the_base_model_when_kasa_config_is_empty(random_base, tmp_path) -> None:
    """So an empty setting is not off: loading this changes the base model of every adapter."""
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
def test_an_unknown_setting_that_is_off_passes(random_base, tmp_path, off: object) -> None:
    settings(a_setting_of_the_future=off)(random_base, tmp_path / "adapter")
    check_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("on", [0, 0.0, 1, "off", [None], {"": None}])
def test_an_unknown_setting_that_is_on_is_refused(random_base, tmp_path, on: object):
    settings(a_setting_of_the_future=on)(random_base, tmp_path / "adapter")
    with pytest.raises(InvalidAdapter, match="a_setting_of_the_future is"):
        check_adapter(tmp_path / "adapter")


def test_names_are_unique() -> None:
    names = [bad.name for bad in BAD_ADAPTERS]
    assert len(set(names)) == len(names) == KINDS
